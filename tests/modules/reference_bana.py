"""BANA as its maths reads: box by box, cell by cell, and stage 2 on features as large as the image."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def looped_prototypes(features: Tensor, mask: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Background queries (B, Q, D) and counts (B, Q), cell by cell."""
    batch, channels, height, width = features.shape
    rows, columns = ([n * mask.shape[a] // s for n in range(s)] for a, s in ((2, height), (3, width)))
    small = mask[:, 0][:, rows][:, :, columns]
    starts, sizes = [], []
    for side in (height, width):
        missing = -side % grid
        starts.append(missing // 2 if missing % 2 == 0 else 0)
        sizes.append((side + missing) // grid)
    total = features.new_zeros(batch, grid * grid, channels)
    count = features.new_zeros(batch, grid * grid)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                cell = (y + starts[0]) // sizes[0] * grid + (x + starts[1]) // sizes[1]
                total[b, cell] += small[b, y, x] * features[b, :, y, x]
                count[b, cell] += small[b, y, x]
    return total / (count[..., None] + 1e-12), count


def looped_pool(x: Tensor, weight: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Weighted averages of one map (D, H, W) with weights (H, W), window by window."""
    (high, wide), (height, width) = output_size, weight.shape
    if height < high:
        x = torch.cat([x, x[:, -1:].expand(-1, high - height, -1)], 1)
        weight = torch.cat([weight, weight[-1:].expand(high - height, -1)])
    if width < wide:
        x = torch.cat([x[:, :, :1].expand(-1, -1, wide - width), x], 2)
        weight = torch.cat([weight[:, :1].expand(-1, wide - width), weight], 1)
    windows = []
    for side, count in zip(weight.shape, output_size, strict=True):
        stride = max(side // count, 1)
        windows.append([(n * stride, n * stride + max(side - (count - 1) * stride, 1)) for n in range(count)])
    out = x.new_zeros(len(x), high, wide)
    for i, (top, bottom) in enumerate(windows[0]):
        for j, (left, right) in enumerate(windows[1]):
            w = weight[top:bottom, left:right]
            out[:, i, j] = (x[:, top:bottom, left:right] * w).sum((1, 2)) / (w.sum() + 1e-12)
    return out


def looped_bap(features: Tensor, boxes: Tensor, mask: Tensor, grid: int) -> Tensor:
    """Vectors (K, D, 2, 2) of boxes (K, 5) in pixels, one box after the other."""
    prototypes, count = looped_prototypes(features, mask, grid)
    size, cells = mask.shape[2:], features.shape[2:]
    pooled = []
    for image, x1, y1, x2, y2 in boxes.tolist():
        b = int(image)
        axes = []
        for low, high, side, n in ((x1, x2, size[1], cells[1]), (y1, y2, size[0], cells[0])):
            start, end = (torch.tensor(v / ((side - 1) / 2) - 1, dtype=features.dtype) for v in (low, high))
            half = (n - 1) / 2
            extent = max(1, math.ceil(end * half + half) - math.floor(start * half + half))
            axes.append(torch.linspace(start.item(), end.item(), extent, dtype=torch.float32).to(features.dtype))
        x, y = axes
        points = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1)
        region = F.grid_sample(features[b : b + 1], points[None], align_corners=False)[0]
        weight = region.new_ones(region.shape[1:])
        valid = count[b] > 0
        if mask[b].mean() > 0.125 and valid.any():
            near = F.normalize(prototypes[b][valid], dim=1, eps=1e-12)
            weight = 1 - torch.einsum("qd,dhw->qhw", near, F.normalize(region, dim=0, eps=1e-12)).relu().mean(0)
        pooled.append(looped_pool(region, weight, (2, 2)))
    return torch.stack(pooled)


def full_size_labels(
    features: Tensor,
    weight: Tensor,
    boxes: Tensor,
    classes: Tensor,
    size: tuple[int, int],
    crf: Callable[[Tensor], Tensor] = lambda scores: scores,
    threshold: float = 0.99,
) -> dict[str, Tensor]:
    """Stage 2 for one image with a single background query: all on (D, H, W) features, as released."""
    full = F.interpolate(features[None], size, mode="bilinear", align_corners=True)[0]
    mask = full.new_ones(size)
    regions = [(slice(y1, y2), slice(x1, x2)) for x1, y1, x2, y2 in boxes.long().tolist()]
    for region in regions:
        mask[region] = 0
    normal = F.normalize(full, dim=0, eps=1e-12)
    attention = full.new_zeros(size)
    if mask.any():
        query = (full * mask).sum((1, 2)) / (mask.sum() + 1e-12)
        attention = torch.einsum("d,dhw->hw", F.normalize(query, dim=0, eps=1e-12), normal).relu()
    attention[attention < threshold * attention.max()] = 0
    keys = sorted(set(classes.tolist()))
    planes, own = [attention], [torch.ones_like(mask)]
    for key in keys:
        scores, plane, where = torch.einsum("d,dhw->hw", weight[key], full).relu(), full.new_zeros(size), 0 * mask
        for region, label in zip(regions, classes.tolist(), strict=True):
            if label == key and scores[region].numel():
                plane[region] = scores[region] / (scores[region].max() + 1e-12)
                where[region] = 1
        planes.append(plane)
        own.append(where)
    scores = torch.stack(planes).softmax(0)
    scores[:, mask > 0] = 0
    scores[0, mask > 0] = 1
    names, allowed = torch.tensor([0, *keys]), torch.stack(own)
    y_crf = names[(crf(scores) * allowed).argmax(0)]
    maps = []
    for key in (0, *keys):
        where = y_crf == key
        prototype = full[:, where].mean(1) if where.any() else weight[key]
        maps.append(torch.einsum("d,dhw->hw", F.normalize(prototype, dim=0, eps=1e-12), normal).relu())
    correlation = torch.stack(maps) * allowed
    correlation[0, mask > 0] = 1
    y_ret = names[correlation.argmax(0)]
    return {"y_crf": y_crf, "y_ret": y_ret, "scores": scores, "correlation": correlation, "attention": attention}
