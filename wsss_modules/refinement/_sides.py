"""What SEAM's head and L2G's have in common: earlier maps of the backbone and the image as keys of a correlation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_ndim, check_shape


def side_layers(channels: tuple[int, int], widths: tuple[int, int]) -> tuple[nn.Conv2d, nn.Conv2d]:
    """Two 1 x 1 convolutions for the earlier maps."""
    low, high = (nn.Conv2d(c, width, 1, bias=False) for c, width in zip(channels, widths, strict=True))
    for layer in (low, high):
        nn.init.kaiming_normal_(layer.weight)
    return low, high


def check_sides(
    features: Tensor, low: Tensor, high: Tensor, images: Tensor, layers: tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d]
) -> None:
    """Raise unless the inputs have the channels of ``layers``, which are those of features, low and high."""
    of_features, of_low, of_high = layers
    check_ndim("features", features, 4, "(B, D, h, w)")
    batch = len(features)
    check_shape("features", features, (None, of_features.in_channels, None, None), "for this head")
    check_shape("low", low, (batch, of_low.in_channels, None, None), "for this head and features")
    check_shape("high", high, (batch, of_high.in_channels, None, None), "for this head and features")
    check_shape("images", images, (batch, 3, None, None), "to match features")


def on_grid_of(features: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """Maps, resized to the grid of the features bilinearly with aligned corners, and joined."""
    return torch.cat([resized(x.to(features.dtype), features.shape[2:]) for x in maps], 1)


def resized(x: Tensor, grid: torch.Size) -> Tensor:
    """Maps on another grid, bilinearly with aligned corners."""
    return x if x.shape[2:] == grid else F.interpolate(x, grid, mode="bilinear", align_corners=True)
