"""AEFT written from its specification with loops over images, classes and pixels: what the fast forms must equal."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_modules import minmax_cam


def bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(h, w) to ``size``, half-pixel centres, edges repeated."""
    (height, width), out = x.shape, x.new_zeros(size)
    for row in range(size[0]):
        for column in range(size[1]):
            y = min(max((row + 0.5) * height / size[0] - 0.5, 0), height - 1)
            z = min(max((column + 0.5) * width / size[1] - 0.5, 0), width - 1)
            top, left = int(y), int(z)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            above = x[top, left] * (1 - (z - left)) + x[top, right] * (z - left)
            below = x[bottom, left] * (1 - (z - left)) + x[bottom, right] * (z - left)
            out[row, column] = above * (1 - (y - top)) + below * (y - top)
    return out


def level(x: Tensor, cells: int) -> Tensor:
    """(H, W) averaged over ``cells`` x ``cells`` boxes that cover it, and back to its size."""
    height, width = x.shape
    pooled = x.new_zeros(cells, cells)
    for i in range(cells):
        for j in range(cells):
            rows = slice(i * height // cells, math.ceil((i + 1) * height / cells))
            columns = slice(j * width // cells, math.ceil((j + 1) * width / cells))
            pooled[i, j] = x[rows, columns].mean()
    return bilinear(pooled, (height, width))


def gate_of(weight: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
    """Sigmoid of a 3 x 3 convolution (2, 2K, 3, 3) of two maps (K, H, W): (2, H, W)."""
    evidence = torch.cat([coarse, fine])
    _, height, width = evidence.shape
    out = evidence.new_zeros(2, height, width)
    for row in range(height):
        for column in range(width):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    y, x = row + dy, column + dx
                    if 0 <= y < height and 0 <= x < width:
                        out[:, row, column] += weight[:, :, dy + 1, dx + 1] @ evidence[:, y, x]
    return out.sigmoid()


def sign_preserving_gate(positive: Tensor, negative: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
    """Two maps (K, H, W), fused."""
    zero = torch.zeros_like(coarse)
    out = zero.clone()
    for weight, sign in ((positive, 1), (negative, -1)):
        x, y = torch.maximum(sign * coarse, zero), torch.maximum(sign * fine, zero)
        gate = gate_of(weight, x, y)
        out = out + sign * (x * gate[0] + y * gate[1]) / 2
    return out


def gated_pyramid(cam: Tensor, gates: Sequence[tuple[Tensor, Tensor]], levels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logits (K,) and pyramid (K, H, W) of one image."""
    pyramid = [torch.stack([level(x, cells) for x in cam]) for cells in levels]
    gpp = pyramid[0]
    for (positive, negative), finer in zip(gates, pyramid[1:], strict=True):
        gpp = sign_preserving_gate(positive, negative, gpp, finer)
    scores = []
    for x, y in zip(cam.flatten(1), gpp.flatten(1), strict=True):
        agreed = [a * b * (1 if a > 0 else -1) for a, b in zip(x, y, strict=True) if a * b > 0]
        scores.append(sum(agreed, start=x.new_zeros(())) / len(x))
    return torch.stack(scores), gpp


def minmax(x: Tensor, eps: float) -> Tensor:
    """One map (H, W), rectified and stretched."""
    x = torch.maximum(x, torch.zeros_like(x))
    return torch.maximum(x - x.min() - eps, torch.zeros_like(x)) / (x.max() - x.min() + eps)


def soft_erase_mask(cam: Tensor, labels: Tensor, size: tuple[int, int], threshold: float, eps: float) -> Tensor:
    """(1, H, W) of one image."""
    mask = cam.new_zeros(size)
    for x, present in zip(cam, labels.tolist(), strict=True):
        if present:
            mask = torch.maximum(mask, minmax(bilinear(torch.maximum(x, torch.zeros_like(x)), size), eps))
    return torch.tensor([[value if value < threshold else 0.0 for value in row] for row in mask.tolist()])[None]


def soft_erase_of_all(cam: Tensor, labels: Tensor, size: tuple[int, int], threshold: float = 0.6) -> Tensor:
    """The mask of a batch as the released code makes it: every class is upsampled, then the absent ones are dropped."""
    large = F.interpolate(F.relu(cam), size, mode="bilinear", align_corners=False)
    shown = (minmax_cam(large) * labels[:, :, None, None]).amax(1, keepdim=True)
    return shown * (shown < threshold)


def repulsion(
    gpp: Tensor, cam: Tensor, labels: Tensor, negatives: Sequence[int], margin: float, thresholds: tuple[float, float]
) -> tuple[list[float], int, float]:
    """Distances, number of hard anchors, and the mean cost of these."""
    eps = 1e-5
    vectors = []
    for image in range(len(gpp)):
        pair = torch.zeros(2, gpp.shape[1], dtype=gpp.dtype)
        for k in range(gpp.shape[1]):
            if labels[image, k]:
                shape = gpp[image, k] / (gpp[image, k].abs().max() + eps)
                shown = minmax(cam[image, k], eps)
                for side, threshold in enumerate(thresholds):
                    kept = [s for s, n in zip(shape.flatten(), shown.flatten(), strict=True) if n < threshold]
                    pair[side, k] = sum(kept) / (len(kept) + eps)
        vectors.append(pair)
    distances = [float(((vectors[i][0] - vectors[j][1]) ** 2).sum()) for i, j in enumerate(negatives)]
    hard = [d for d in distances if d < margin]
    return distances, len(hard), sum(margin - d for d in hard) / max(1, len(hard))


def search_negatives(labels: Tensor, source: random.Random) -> tuple[list[int], list[list[int]]]:
    """The released search: an image's classes are compared with those of all images, in a list that is reshuffled.

    Each comparison brings both sets of classes to the host and intersects them there; a partner that shares a class is
    looked for as well, and not used. Images without a partner are outside of what the search can do.

    Returns the negatives, and for each image the order in which the others were looked at.
    """
    order, negatives, orders = list(range(len(labels))), [], []
    for i, row in enumerate(labels):
        own, alike, unlike = row.nonzero().cpu().numpy(), [], []
        for j in order:
            shared = np.intersect1d(own, labels[j].nonzero().cpu().numpy())
            (alike if len(shared) else unlike).append(j)
        if not unlike:
            raise ValueError(f"labels: image {i} shares a class with all others")
        negatives.append(unlike[0])
        orders.append(list(order))
        source.shuffle(order)
    return negatives, orders


def draws_of(orders: Sequence[Sequence[int]]) -> Tensor:
    """(B, B) draws with which our sampler looks at the images in these orders."""
    draws = torch.zeros(len(orders), len(orders))
    for row, order in zip(draws, orders, strict=True):
        row[torch.tensor(order)] = torch.arange(len(order), 0, -1.0)
    return draws
