"""RCA's memory, read-out and accumulation as the released code does them: one region, one image, one map at a time."""

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_modules import RegionMemoryBank, SemanticAggregation


def regions(cam: Tensor) -> Tensor:
    """(K, H, W) class maps of one image -> bool."""
    probability = cam.softmax(0)
    return torch.stack(
        [p > p.mean() if p.max() > p.min() else torch.zeros_like(p, dtype=torch.bool) for p in probability]
    )


def update(bank: RegionMemoryBank, features: Tensor, cam: Tensor, labels: Tensor, probability: Tensor) -> None:
    """Write into ``bank`` region by region."""
    size = bank.slots.shape[1]
    for x, maps, tags, sure in zip(features, cam, labels, probability, strict=True):
        mask, x = regions(maps), x.clone()
        for k in range(len(tags)):
            if tags[k] == 0 or sure[k] <= bank.threshold or not mask[k].any():
                continue
            if bank.legacy_intersection:
                x *= mask[k]
            region = (x * mask[k]).sum((1, 2)) / mask[k].sum()
            if not region.isfinite().all():
                continue
            place = int(bank.pointer[k])
            if place < bank.filled[k]:
                region = bank.momentum * bank.slots[k, place] + (1 - bank.momentum) * region
            bank.slots[k, place] = region
            bank.pointer[k] = (place + 1) % size
            bank.filled[k] = max(int(bank.filled[k]), place + 1)


def aggregate(layer: SemanticAggregation, features: Tensor, prototypes: Tensor) -> Tensor:
    """The read-out with its (B, H W, P) similarities, as released or with a softmax."""
    batch, _, height, width = features.shape
    num_classes, per_class, channels = prototypes.shape
    rows = prototypes.reshape(num_classes * per_class, channels)
    query = layer.query(features).flatten(2).transpose(1, 2)  # (B, H W, D)
    similarity = torch.matmul(query, layer.key(rows).t())
    if layer.softmax:
        similarity = (similarity / channels**0.5).softmax(2)
    else:
        similarity = similarity / per_class * num_classes
    read = torch.matmul(similarity, layer.value(rows)).transpose(1, 2).reshape(batch, channels, height, width)
    return layer.project(torch.cat([features, layer.aggregate(read)], 1))


def attention_byte(cam: Tensor) -> Tensor:
    """One map (H, W) as 8 bits."""
    positive = F.relu(cam)
    return (255 * positive / (positive.max() + 1e-8)).round().to(torch.uint8)
