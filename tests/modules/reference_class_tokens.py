"""The naive forms of what MCTformer reads off its attention: every block's matrix kept, every class by itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def run_and_stack(blocks: nn.ModuleList, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens after the blocks, with explicit attention, and that of all blocks and heads: (L, B, J, T, T)."""
    found = []
    for block in blocks:
        batch, count, _ = tokens.shape
        qkv = block.attn.qkv(block.norm1(tokens)).reshape(batch, count, 3, block.attn.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        found.append(weights)
        tokens = tokens + block.attn.proj((weights @ value).transpose(1, 2).reshape(batch, count, -1))
        tokens = tokens + block.mlp(block.norm2(tokens))
    return tokens, torch.stack(found)


def class_maps(attention: Tensor, num_classes: int, n_layers: int) -> Tensor:
    """Class rows of the last blocks: (B, K, N)."""
    return attention.mean(2)[-n_layers:].sum(0)[:, :num_classes, num_classes:]


def refine_by_class(cam: Tensor, patch_attention: Tensor) -> Tensor:
    """One product for each class: (B, K, h, w)."""
    affinity = patch_attention.sum(0)
    refined = [(affinity @ cam[:, k].reshape(len(cam), -1, 1)).reshape(cam[:, k].shape) for k in range(cam.shape[1])]
    return torch.stack(refined, 1)


def seeds_of_all_classes(
    maps: list[Tensor], patch_attention: list[Tensor], labels: Tensor, size: tuple[int, int]
) -> dict[int, Tensor]:
    """Seeds of one image from maps (1, K, h, w), plain and mirrored by turns; all classes enlarged, then masked."""
    total = torch.zeros(1, len(labels), *size, dtype=maps[0].dtype)
    for i, (cam, attention) in enumerate(zip(maps, patch_attention, strict=True)):
        refined = refine_by_class(cam, attention)
        large = F.interpolate(refined, size, mode="bilinear", align_corners=False) * labels[None, :, None, None]
        total = total + (large.flip(-1) if i % 2 else large)
    seeds = {}
    for k in labels.nonzero()[:, 0].tolist():
        cam = total[0, k]
        seeds[k + 1] = (cam - cam.min()) / (cam.max() - cam.min() + 1e-8)
    return seeds


def rank_pool(maps: Tensor, decay: float) -> Tensor:
    """Sorted values weighted one by one: (B, K)."""
    pooled = torch.zeros(maps.shape[:2], dtype=maps.dtype)
    for b, image in enumerate(maps):
        for k, values in enumerate(image):
            ranked = sorted(values.flatten().tolist(), reverse=True)
            weights = [decay**r for r in range(len(ranked))]
            pooled[b, k] = sum(w * v for w, v in zip(weights, ranked, strict=True)) / sum(weights)
    return pooled
