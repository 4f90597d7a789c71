"""Attention-based fusion as the specification writes it: the residual resized first, attention on the concatenation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_modules import AttentionBasedFusion, FusedMaps


def fuse_concatenated(
    fusion: AttentionBasedFusion, x: Tensor, residual: Tensor | None, out_size: tuple[int, int] | None = None
) -> FusedMaps:
    x = fusion.reduce(x)
    if residual is not None:
        y = F.interpolate(residual, x.shape[-2:], mode="nearest")
        share = torch.sigmoid(fusion.attention(torch.cat([x, y], 1)))
        x = x * share[:, 0].view(len(x), 1, *x.shape[-2:]) + y * share[:, 1].view(len(x), 1, *x.shape[-2:])
    if out_size is not None and out_size != tuple(x.shape[-2:]):
        x = F.interpolate(x, out_size, mode="nearest")
    return FusedMaps(fusion.expand(x), x)
