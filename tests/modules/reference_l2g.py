"""L2G's parts word by word: features propagated, a sort for the winner, the points of a box one by one."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.modules.reference_refinement import pixel_correlation


def propagate_then_classify(features: Tensor, weight: Tensor, keys: Tensor) -> Tensor:
    """fc8(x) + fc8(PCM(x)): (B, D, h, w) features, (C, D, 1, 1) weights and (B, E, h, w) keys -> (B, C, h, w)."""
    return F.conv2d(features, weight) + F.conv2d(pixel_correlation(features, keys), weight)


def attention(scores: Tensor, labels: Tensor, eps: float = 1e-8) -> Tensor:
    """Normalised maps of the background and the present classes, (n, 1+K, h, w)."""
    a = scores.clamp(min=0)
    a = a / (a.amax((2, 3), keepdim=True) + eps)
    return torch.cat([a[:, :1], a[:, 1:] * (labels > 0)[:, :, None, None]], 1)


def winner_by_sort(maps: Tensor) -> Tensor:
    """Keep the largest channel of each pixel: a sort of all channels, and a one-hot matrix of the pixels."""
    order = torch.argsort(-maps, dim=1)[:, 0]  # (n, h, w)
    hot = torch.eye(maps.shape[1], dtype=maps.dtype, device=maps.device)[order.flatten()]  # (P, C)
    return maps * hot.view(*order.shape, -1).permute(0, 3, 1, 2)


def target_by_sort(scores: Tensor, labels: Tensor, saliency: Tensor, threshold: float = 1e-3) -> Tensor:
    """The binary target with saliency on the grid of the maps, by `winner_by_sort`."""
    hot = (winner_by_sort(attention(scores, labels)) > threshold).to(scores.dtype)
    return torch.cat([hot[:, :1] * (1 - saliency), hot[:, 1:] * saliency], 1)


def target_by_loops(
    scores: Tensor, labels: Tensor, saliency: Tensor | None, threshold: float, background: str, empty: str
) -> Tensor:
    """The target pixel by pixel."""
    a, out = attention(scores, labels), torch.zeros_like(scores)
    n, channels, height, width = scores.shape
    for i in range(n):
        blank = saliency is not None and not bool((saliency[i] != 0).any())
        for y in range(height):
            for x in range(width):
                values = a[i, :, y, x].tolist()
                best = max(values)
                classes = [k for k in range(1, channels) if values[k] == best]
                winner = classes[0] if classes else 0
                if saliency is None:
                    out[i, winner, y, x] = best
                    continue
                s = saliency[i, 0, y * saliency.shape[2] // height, x * saliency.shape[3] // width].item()
                if winner > 0:
                    shape = best if blank and empty == "attention" else float(best > threshold) * s
                else:
                    shape = (best if background == "value" else float(best > threshold)) * (1 - s)
                out[i, winner, y, x] = shape
    return out


def roi_align(features: Tensor, boxes: Tensor, size: tuple[int, int], stride: float, aligned: bool) -> Tensor:
    """Every point of every bin interpolated on its own; boxes must not be longer than the maps."""
    n, (height, width) = len(boxes), size
    out = features.new_zeros(n, features.shape[1], height, width)
    for i, (index, *corners) in enumerate(boxes.tolist()):
        x1, y1, x2, y2 = (c / stride - (0.5 if aligned else 0.0) for c in corners)
        length_y, length_x = y2 - y1, x2 - x1
        if not aligned:
            length_y, length_x = max(1.0, length_y), max(1.0, length_x)
        points_y, points_x = max(1, math.ceil(length_y / height)), max(1, math.ceil(length_x / width))
        for row in range(height):
            for column in range(width):
                total = features.new_zeros(features.shape[1])
                for j in range(points_y):
                    for k in range(points_x):
                        y = y1 + (row + (j + 0.5) / points_y) * length_y / height
                        x = x1 + (column + (k + 0.5) / points_x) * length_x / width
                        total = total + _interpolated(features[int(index)], y, x)
                out[i, :, row, column] = total / (points_y * points_x)
    return out


def _interpolated(maps: Tensor, y: float, x: float) -> Tensor:
    height, width = maps.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return maps.new_zeros(maps.shape[0])
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    down, right = min(top + 1, height - 1), min(left + 1, width - 1)
    fy, fx = y - top, x - left
    upper = maps[:, top, left] * (1 - fx) + maps[:, top, right] * fx
    lower = maps[:, down, left] * (1 - fx) + maps[:, down, right] * fx
    return upper * (1 - fy) + lower * fy
