"""AFA's affinity and walk with N x N matrices and every intermediate kept, as the released code keeps them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def dense_head(attentions: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """All maps side by side, made symmetric, then a 1 x 1 convolution: (B, N, N)."""
    stacked = torch.cat(list(attentions), 1)
    return torch.conv2d(stacked + stacked.transpose(2, 3), weight, bias)[:, 0].sigmoid()


def loop_window(size: tuple[int, int], radius: int) -> Tensor:
    height, width = size
    mask = torch.zeros(height * width, height * width)
    for i in range(height):
        for j in range(width):
            for y in range(max(0, i - radius), min(height, i + radius + 1)):
                for x in range(max(0, j - radius), min(width, j + radius + 1)):
                    mask[i * width + j, y * width + x] = 1
    return mask


def dense_walk(x: Tensor, affinity: Tensor, window: Tensor, power: float = 2.0, eps: float = 0.1) -> Tensor:
    near = affinity.clone()
    near[:, window == 0] = 0
    near = near**power
    transition = near / (near.sum(1, keepdim=True) + eps)
    return (x.flatten(2) @ transition).view(x.shape)


def repeated_labels(mask: Tensor, window: Tensor) -> Tensor:
    """Both labels of every pair, repeated into N x N."""
    cells = mask.flatten(1)
    one = cells[:, None].repeat(1, cells.shape[1], 1)
    other = one.transpose(1, 2)
    label = (one == other).type(torch.long)
    label[one == 255] = 255
    label[other == 255] = 255
    label[:, window == 0] = 255
    return label


def dense_affinity_loss(affinity: Tensor, label: Tensor) -> Tensor:
    positive, negative = (label == 1).type(torch.int16), (label == 0).type(torch.int16)
    attract = ((1 - affinity) * positive).sum() / (positive.sum() + 1)
    return 0.5 * attract + 0.5 * (affinity * negative).sum() / (negative.sum() + 1)
