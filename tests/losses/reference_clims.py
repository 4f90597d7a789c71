"""A step of CLIMS the way it was released: all maps enlarged, pairs in a loop, the encoders called three times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def looped_pairs(activation: Tensor, images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor, list[int]]:
    """Masked images (n, 3, S, S), their complements, and the class of each pair."""
    maps = F.interpolate(activation, (size, size), mode="bilinear", align_corners=True)
    scenes = F.interpolate(images, (size, size), mode="bilinear", align_corners=True)
    shown, left, classes = [], [], []
    for b in range(len(labels)):
        for k in range(labels.shape[1]):
            if labels[b, k] == 1:
                shown.append(maps[b, k] * scenes[b])
                left.append((1 - maps[b, k]) * scenes[b])
                classes.append(k)
    return torch.stack(shown), torch.stack(left), classes


def cosine(u: Tensor, v: Tensor) -> Tensor:
    return (u / u.norm(dim=-1, keepdim=True) * (v / v.norm(dim=-1, keepdim=True))).sum(-1)


def released_step(
    activation: Tensor,
    images: Tensor,
    labels: Tensor,
    encode_image: Callable[[Tensor], Tensor],
    encode_text: Callable[[Sequence[str]], Tensor],
    prompts: Sequence[str],
    backgrounds: Sequence[str],
    *,
    size: int,
    hyper: tuple[float, float, float, float] = (10.0, 24.0, 1.0, 0.2),
    threshold: float = 0.26,
) -> Tensor:
    """The total; three calls of each encoder."""
    shown, left, classes = looped_pairs(activation, images, labels, size)
    own = [prompts[k] for k in classes]
    object_text = -cosine(encode_image(shown), encode_text(own)).clamp(1e-4, 0.9999).log().mean()
    remaining = -(1 - cosine(encode_image(left), encode_text(own)).clamp(1e-4, 0.9999)).log().mean()
    similarity = cosine(encode_image(shown)[:, None], encode_text(backgrounds)[None])
    suppression = -(1 - similarity[similarity > threshold]).log().sum()
    terms = object_text, remaining, suppression, activation.mean()
    return torch.stack([weight * term for weight, term in zip(hyper, terms, strict=True)]).sum()


def looped_class_suppression(similarity: Tensor, related: Tensor) -> Tensor:
    """The camera-ready version's suppression, pair by pair."""
    total = similarity.new_zeros(())
    for row, mine in zip(similarity, related, strict=True):
        if mine.any():
            total = total - torch.log(1 - row[mine]).mean()
    return total
