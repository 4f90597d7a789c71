"""Slow references for centroids and components, written from the specification with loops."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def flood_fill(labels: Tensor) -> Tensor:
    """Number the 4-connected components of equal non-zero labels of one map, in raster order of the first pixel."""
    height, width = labels.shape
    values, out, count = labels.tolist(), [[0] * width for _ in range(height)], 0
    for y in range(height):
        for x in range(width):
            if not values[y][x] or out[y][x]:
                continue
            count += 1
            out[y][x], queue = count, [(y, x)]
            while queue:
                cy, cx = queue.pop()
                for ny, nx in ((cy - 1, cx), (cy + 1, cx), (cy, cx - 1), (cy, cx + 1)):
                    inside = 0 <= ny < height and 0 <= nx < width
                    if inside and not out[ny][nx] and values[ny][nx] == values[y][x]:
                        out[ny][nx] = count
                        queue.append((ny, nx))
    return torch.tensor(out, dtype=torch.int64).reshape(height, width)


def centroid_of(displacement: Tensor, y: int, x: int, iterations: int) -> tuple[int, int]:
    """Where one cell leads to, in the precision of Python."""
    _, h, w = displacement.shape
    field = displacement.double().tolist()
    cy, cx = float(y), float(x)
    for _ in range(iterations):
        y0, x0, y1, x1 = math.floor(cy), math.floor(cx), math.ceil(cy), math.ceil(cx)
        fy, fx = cy - y0, cx - x0
        vy, vx = (
            part[y0][x0] * (1 - fy) * (1 - fx)
            + part[y0][x1] * (1 - fy) * fx
            + part[y1][x0] * fy * (1 - fx)
            + part[y1][x1] * fy * fx
            for part in field
        )
        cy, cx = min(max(cy + vy, 0), h - 1), min(max(cx + vx, 0), w - 1)
    return round(cy), round(cx)  # half to even, as Python does


def centroids_numpy(displacement: np.ndarray, iterations: int) -> np.ndarray:
    """The released form: four corners of two components gathered one by one, for all steps."""
    _, h, w = displacement.shape
    y, x = (part.astype(np.float32) for part in np.mgrid[:h, :w])
    for _ in range(iterations):
        y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
        y1, x1 = np.ceil(y).astype(int), np.ceil(x).astype(int)
        fy, fx = y - y0, x - x0
        steps = []
        for part in displacement:
            top = part[y0, x0] * (1 - fx) + part[y0, x1] * fx
            bottom = part[y1, x0] * (1 - fx) + part[y1, x1] * fx
            steps.append(top * (1 - fy) + bottom * fy)
        y, x = np.clip(y + steps[0], 0, h - 1), np.clip(x + steps[1], 0, w - 1)
    return np.stack([np.round(y), np.round(x)]).astype(np.int64)


def detections(
    scores: Tensor, classes: list[int], threshold: float, min_area: float
) -> list[tuple[Tensor, int, float]]:
    """(mask, class, score) of each detection, channel by channel."""
    winner = torch.cat([torch.full_like(scores[:1], threshold), scores]).argmax(0)
    found = []
    for j, label in enumerate(classes):
        components = flood_fill((winner == j + 1).long())
        for number in range(1, int(components.max()) + 1):
            mask = components == number
            large = int(mask.sum()) >= min_area * mask.numel()
            found.append((mask, label, float(scores[j][mask].max()) if large else 0.0))
    return found
