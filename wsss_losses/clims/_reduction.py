"""Reduction of the costs of pairs or images, over the processes of a distributed run if asked to."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_modules._distributed import sum_over_processes


def reduce_over_processes(costs: Tensor, weight: Tensor | None, reduction: str, sync: bool) -> Tensor:
    """Costs (n,) with their weights; the mean divides by their number, over the processes with ``sync``."""
    weighted = costs if weight is None else costs * weight.to(costs.dtype)
    if reduction == "none":
        return weighted
    count = weighted.new_tensor(float(len(weighted)))
    total, number = sum_over_processes(torch.stack([weighted.sum(), count]), sync).unbind()
    return total if reduction == "sum" else total / number.clamp(min=1)
