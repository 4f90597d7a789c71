"""SIPE's seeds, prototypes and image-specific CAM as released: every product in memory before it is summed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def similarity(features: Tensor) -> Tensor:
    """Rectified cosine of all cells (B, N, N), lengths enlarged by 1e-5."""
    z = (features / (features.norm(dim=1, keepdim=True) + 1e-5)).flatten(2)
    return F.relu(z.transpose(1, 2) @ z)


def broadcast_iou(scores: Tensor, affinity: Tensor) -> Tensor:
    """Overlap (B, C, H, W) through a (B, C, N, N) tensor."""
    flat = scores.flatten(2)
    shared = (affinity[:, None] * flat[:, :, None, :]).sum(3)
    union = affinity.sum(2)[:, None] + flat.sum(2, keepdim=True) - shared
    return (shared / union).view_as(scores)


def broadcast_seeds(scores: Tensor, valid: Tensor, features: Tensor, bg_weight: float = 0.5) -> tuple[Tensor, Tensor]:
    """One-hot seeds and probabilities (B, C, H, W)."""
    overlap = broadcast_iou(scores, similarity(features))
    overlap[:, 0] *= bg_weight
    probs = overlap.softmax(1)
    winner = overlap.argmax(1)
    return F.one_hot(winner, scores.shape[1]).movedim(-1, 1).to(scores) * valid, probs


def broadcast_prototypes(seeds: Tensor, features: Tensor) -> Tensor:
    """Means (B, C, S) through a (B, C, S, H, W) tensor."""
    products = seeds[:, :, None] * features[:, None]
    return F.adaptive_avg_pool2d(products.flatten(0, 1), 1).view(products.shape[:3])


def broadcast_cosine(prototypes: Tensor, features: Tensor) -> Tensor:
    """Image-specific CAM (B, C, H, W) through (B, C, S, H, W) tensors."""
    return F.relu(F.cosine_similarity(features[:, None], prototypes[..., None, None], dim=2))


def explore_one_image(
    class_maps: Tensor, features: Tensor, labels: Tensor, seed_features: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, seeds and image-specific CAM (C, H, W) of one image in training, cell by cell and class by class."""
    height, width = class_maps.shape[1:]
    cells = [(row, column) for row in range(height) for column in range(width)]
    positive = class_maps.clamp(min=0)
    cam = torch.stack([one / (one.max() + 1e-5) for one in positive])
    present = torch.cat([labels.new_ones(1), labels])
    scores = torch.cat([1 - cam.max(0).values[None], cam]) * present[:, None, None]
    unit = seed_features / (seed_features.norm(dim=0) + 1e-5)
    seeds = torch.zeros_like(scores)
    for here in cells:
        similar = torch.zeros(height, width, dtype=scores.dtype)
        for there in cells:
            similar[there] = (unit[:, here[0], here[1]] @ unit[:, there[0], there[1]]).clamp(min=0)
        best, winner = -1.0, 0
        for c, one in enumerate(scores):
            shared = (similar * one).sum()
            overlap = float(shared / (similar.sum() + one.sum() - shared)) * (0.5 if c == 0 else 1.0)
            if overlap > best:
                best, winner = overlap, c
        seeds[(winner, *here)] = present[winner]
    is_cam = torch.zeros_like(scores)
    for c, marks in enumerate(seeds):
        prototype = (features * marks).sum((1, 2))
        if not prototype.any():
            continue
        for here in cells:
            x = features[:, here[0], here[1]]
            is_cam[(c, *here)] = (prototype @ x / prototype.norm() / x.norm()).clamp(min=0)
    return scores, seeds, is_cam
