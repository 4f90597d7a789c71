"""C2AM's losses as they are released: all pairs, ranks from the indices of a sort of the indices of a sort."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def clamped_cosine(a: Tensor, b: Tensor) -> Tensor:
    return (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T).clamp(0.0005, 0.9995)


def sim_min(bg: Tensor, fg: Tensor) -> Tensor:
    return -torch.log(1 - clamped_cosine(bg, fg)).mean()


def sim_max(features: Tensor, alpha: float) -> Tensor:
    similarity = clamped_cosine(features, features)
    cost = -torch.log(similarity)
    cost[cost < 0] = 0
    _, order = similarity.sort(descending=True, dim=1)
    _, rank = order.sort(dim=1)
    return (torch.exp(-alpha * (rank.to(cost.dtype) - 1)) * cost).mean()


def pool_two_regions(features: Tensor, probability: Tensor) -> tuple[Tensor, Tensor]:
    """Both regions (B, D) by two products with a transposed copy of the features."""
    batch, channels, height, width = features.shape
    p = probability.reshape(batch, 1, height * width)
    x = features.reshape(batch, channels, height * width).permute(0, 2, 1).contiguous()
    fg = torch.matmul(p, x) / (height * width)
    bg = torch.matmul(1 - p, x) / (height * width)
    return fg.reshape(batch, channels), bg.reshape(batch, channels)
