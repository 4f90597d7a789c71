"""Multi-scale CAM of all classes, as the papers write it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def dense_reference(
    maps: Sequence[Tensor], size: tuple[int, int], mirrored: Sequence[bool], grid: tuple[int, int]
) -> Tensor:
    """Up-sample all (B, K, h, w) maps to ``grid``, flip back, sum, cut to ``size`` and divide by each maximum."""
    total = 0
    for scale, flip in zip(maps, mirrored, strict=True):
        large = F.interpolate(scale, grid, mode="bilinear", align_corners=False)
        total = total + (large.flip(-1) if flip else large)
    total = total[..., : size[0], : size[1]]
    return total / (total.amax((2, 3), keepdim=True) + 1e-5)
