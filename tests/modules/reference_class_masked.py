"""Class-masked pooling as ReCAM was released: features times masks, all of it in memory, then the spatial mean."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def broadcast_pooling(features: Tensor, cam: Tensor) -> Tensor:
    """Features (B, D, H, W) under masks (B, K, H, W) through a (B, K, D, H, W) tensor to (B, K, D)."""
    masked = features[:, None] * cam[:, :, None]
    return F.adaptive_avg_pool2d(masked.flatten(0, 1), 1).view(masked.shape[:3])


def looped_pooling(features: Tensor, cam: Tensor, image: int, channel: int) -> Tensor:
    """The vector (D,) of one image and class, pixel by pixel."""
    height, width = features.shape[2:]
    total = features.new_zeros(features.shape[1])
    for row in range(height):
        for column in range(width):
            total = total + cam[image, channel, row, column] * features[image, :, row, column]
    return total / (height * width)
