"""The hierarchical context loss as the specification writes it: both maps pooled at each level."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def hcl_loop(student: Sequence[Tensor], teacher: Sequence[Tensor], levels: Sequence[int] = (4, 2, 1)) -> Tensor:
    total = student[0].new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        cost, count, weights = F.mse_loss(s, t), 1.0, 1.0
        for level in levels:
            if level >= s.shape[2]:
                continue
            count /= 2
            cost = cost + count * F.mse_loss(F.adaptive_avg_pool2d(s, level), F.adaptive_avg_pool2d(t, level))
            weights += count
        total = total + cost / weights
    return total
