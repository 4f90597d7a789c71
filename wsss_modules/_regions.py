"""The part of each image of a batch that is not padding, as ``x1, y1, x2, y2`` in pixels, half-open."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_modules._checks import check_integer, check_shape


def check_regions(regions: Tensor, batch: int) -> None:
    """Raise unless ``regions`` is (B, 4) integers."""
    check_shape("regions", regions, (batch, 4), "(B, 4) of x1, y1, x2, y2")
    check_integer("regions", regions)


def inside_regions(regions: Tensor, size: tuple[int, int]) -> Tensor:
    """Which pixels lie in the region of their image: bool (B, H, W)."""
    x1, y1, x2, y2 = regions[:, :, None].unbind(1)  # (B, 1) each
    row, column = (torch.arange(side, device=regions.device) for side in size)
    return ((row >= y1) & (row < y2))[:, :, None] & ((column >= x1) & (column < x2))[:, None, :]
