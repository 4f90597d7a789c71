"""BBAM one object, one proposal, one pixel at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def looped_iou(a: Tensor, b: Tensor) -> Tensor:
    """Overlap of each box of ``a`` (n, 4) with one box (4,), corners cut to integers, read one by one."""
    found = []
    for box in a:
        x1, y1, x2, y2 = (int(v) for v in box)
        u1, v1, u2, v2 = (int(v) for v in b)
        shared = max(0, min(x2, u2) - max(x1, u1)) * max(0, min(y2, v2) - max(y1, v1))
        found.append(shared / ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - shared))
    return torch.tensor(found, dtype=torch.float64)


def looped_objective(
    logits: Tensor, deltas: Tensor, mask: Tensor, clean_logits: Tensor, clean_deltas: Tensor, label: int, area: float
) -> Tensor:
    """The objective of one object without smoothness."""
    total = area * mask.abs().sum()
    for p in range(len(logits)):
        columns = range(4 * label, 4 * label + 4)
        moved = torch.stack([(clean_deltas[p, c] - deltas[p, c]).abs() for c in columns]).mean()
        fell = (clean_logits[p].softmax(0)[label] - logits[p].softmax(0)[label]).abs()
        total = total + (0.5 * moved + 0.5 * fell) / len(logits)
    return total


def descend_alone(
    detector: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    image: Tensor,
    boxes: Tensor,
    label: int,
    mask: Tensor,
    steps: int,
    lr: float,
    area: float,
) -> Tensor:
    """One object by backward passes, weights and all, with the clean detections made anew in every step."""
    leaf = mask.clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=lr)
    proposals = F.pad(boxes, (1, 0))
    for _ in range(steps):
        with torch.no_grad():
            clean = detector(image[None], proposals)
        hidden = image[None] * F.interpolate(leaf[None], image.shape[1:], mode="bilinear", align_corners=True)
        loss = looped_objective(*detector(hidden, proposals), leaf, *clean, label, area)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            leaf.clamp_(0, 1)
    return leaf.detach()


def sorted_rank_value(x: Tensor, rank: int) -> float:
    """The value at a rank of all pixels, sorted downwards as a Python list."""
    return sorted(x.flatten().tolist(), reverse=True)[rank]


def looped_blur(x: Tensor, radius: int) -> Tensor:
    """Gaussian blur with deviation = radius and a mirrored border that does not repeat the edge, pixel by pixel."""
    weights = [math.exp(-(d**2) / (2 * max(1, radius) ** 2)) for d in range(-radius, radius + 1)]
    total = sum(weights)

    def along(rows: list[list[float]]) -> list[list[float]]:
        out = []
        for row in rows:
            n = len(row)
            period = max(1, 2 * (n - 1))
            mirrored = [
                row[min(i % period, period - i % period)] if n > 1 else row[0] for i in range(-radius, n + radius)
            ]
            out.append([sum(w * mirrored[i + d] for d, w in enumerate(weights)) / total for i in range(n)])
        return out

    once = along(x.tolist())
    twice = along([list(column) for column in zip(*once, strict=True)])
    return torch.tensor(twice, dtype=torch.float64).T
