"""EDAM's attention as released: one class after the other, scores of all tokens in memory, softmax, product."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_modules import CollaborativeMultiAttention, EDAMHead, PreNormTransformerBlock


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Unbiased deviation, and 1e-6 added to it."""
    return weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + bias


def transform(block: PreNormTransformerBlock, x: Tensor, index: int = 0) -> Tensor:
    """Tokens (B, T, d) through one block, without dropout."""
    p = {name: value[index] for name, value in block.named_parameters()}
    width, heads = block.width, block.heads
    normed = norm(x, p["norm1_weight"], p["norm1_bias"])
    q, k, v = (
        F.linear(normed, p["qkv_weight"][i * width : (i + 1) * width], p["qkv_bias"][i * width : (i + 1) * width])
        .view(*x.shape[:2], heads, width // heads)
        .transpose(1, 2)
        for i in range(3)
    )
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(width // heads)
    read = torch.matmul(F.softmax(scores, dim=-1), v).transpose(1, 2).reshape(x.shape)
    x = x + F.linear(read, p["out_weight"], p["out_bias"])
    inner = F.linear(norm(x, p["norm2_weight"], p["norm2_bias"]), p["inner_weight"], p["inner_bias"])
    inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    return x + F.linear(inner, p["outer_weight"], p["outer_bias"])


def looped_attention(module: CollaborativeMultiAttention, class_features: Tensor, keys: list[int]) -> Tensor:
    """Logits (n, S) of one group of n images, class by class."""
    images, _, width, height, columns = class_features.shape
    cells = height * columns
    logits = []
    for s, key in enumerate(keys):
        tokens = class_features[:, s].flatten(2).transpose(1, 2)  # (n, N, d)
        waves = torch.zeros(cells, width, dtype=tokens.dtype)
        for p in range(cells):
            for i in range(0, width, 2):
                angle = torch.tensor(p * math.exp(-i * math.log(10000.0) / width))
                waves[p, i] = angle.sin()
                waves[p, i + 1 : i + 2] = angle.cos()
        tokens = tokens + waves + module.embedding.segment.weight[:images, None]
        tokens = tokens.reshape(1, images * cells, width)
        for block in module.blocks:
            tokens = transform(block, tokens, key - 1)
        logits.append(tokens.view(images, cells, width).mean(1) @ module.classifier[key - 1])
    return torch.stack(logits, 1)


def looped_head(head: EDAMHead, features: Tensor, keys: list[int]) -> Tensor:
    """Logits (n, S) of one group: the features are masked first and projected then, as the paper has it."""
    maps = F.conv2d(features, head.activation.conv.weight, padding=1)
    masks = (maps / maps.square().sum(1, keepdim=True).sqrt()).abs()
    seen = torch.stack([head.project(features * masks[:, key, None]) for key in keys], 1)
    return looped_attention(head.attention, seen, keys)
