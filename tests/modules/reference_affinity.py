"""Slow and obvious: dense matrices and gathered pairs, written from the papers' formulas. They live only here."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def disc(radius: int) -> list[tuple[int, int]]:
    """Upper half of the open disc, row by row."""
    plane = [(dy, dx) for dy in range(radius) for dx in range(-radius, radius + 1)]
    return [(dy, dx) for dy, dx in plane if (dy, dx) > (0, 0) and math.hypot(dy, dx) < radius]


def line(dy: int, dx: int) -> list[tuple[int, int]]:
    """Points of the bounding box closer than 1 to the line through (0, 0) and (dy, dx)."""
    xs = range(min(0, dx), max(0, dx) + 1)
    # the squared distance is an integer over an integer: compare without a root
    return [(y, x) for y in range(dy + 1) for x in xs if (dy * x - dx * y) ** 2 < dy * dy + dx * dx]


def path_order(radius: int) -> list[tuple[int, int]]:
    return sorted(disc(radius), key=lambda offset: len(line(*offset)))


def sources(size: tuple[int, int], radius: int, border: str) -> list[tuple[int, int]]:
    height, width = size
    margin = 0 if border == "full" else radius - 1
    return [(y, x) for y in range(height - margin) for x in range(margin, width - margin)]


def in_map(size: tuple[int, int], y: int, x: int) -> bool:
    return 0 <= y < size[0] and 0 <= x < size[1]


def edge_to_affinity(edge: Tensor, radius: int, border: str) -> Tensor:
    """(B, 1, H, W) -> (B, P, n), pair by pair; 0 for partners outside."""
    size = tuple(edge.shape[2:])
    rows = []
    for dy, dx in path_order(radius):
        row = []
        for y, x in sources(size, radius, border):
            if in_map(size, y + dy, x + dx):
                row.append(1 - torch.stack([edge[:, 0, y + py, x + px] for py, px in line(dy, dx)]).amax(0))
            else:
                row.append(torch.zeros_like(edge[:, 0, 0, 0]))
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


def edge_matrix(edge: Tensor, radius: int) -> Tensor:
    """(B, 1, H, W) -> dense affinity (B, N, N) of all pairs inside the map."""
    size = tuple(edge.shape[2:])
    pairs = edge_to_affinity(edge, radius, "full")
    return matrix_from_pairs(pairs, path_order(radius), sources(size, radius, "full"), size)


def matrix_from_pairs(
    pairs: Tensor, offsets: list[tuple[int, int]], source: list[tuple[int, int]], size: tuple[int, int]
) -> Tensor:
    n_pixels = size[0] * size[1]
    matrix = torch.eye(n_pixels, dtype=pairs.dtype).repeat(len(pairs), 1, 1)
    for p, (dy, dx) in enumerate(offsets):
        for i, (y, x) in enumerate(source):
            if in_map(size, y + dy, x + dx):
                a, b = y * size[1] + x, (y + dy) * size[1] + x + dx
                matrix[:, a, b] = matrix[:, b, a] = pairs[:, p, i]
    return matrix


def random_walk(x: Tensor, matrix: Tensor, beta: float, n_steps: int) -> Tensor:
    """Released form: ``x T^n``, T column-normalised, by matrix powers. x (B, C, H, W), matrix (B, N, N)."""
    sharp = matrix**beta
    transition = sharp / sharp.sum(1, keepdim=True)
    return (x.flatten(2) @ torch.linalg.matrix_power(transition, n_steps)).view(x.shape)


def pair_labels(mask: Tensor, offsets: list[tuple[int, int]], radius: int, border: str, ignored: set[int]) -> Tensor:
    """(B, H, W) -> (3, B, P, n) bool: bg_pos, fg_pos, neg."""
    size = tuple(mask.shape[1:])
    source = sources(size, radius, border)
    labels = torch.zeros(3, len(mask), len(offsets), len(source), dtype=torch.bool)
    for b in range(len(mask)):
        for p, (dy, dx) in enumerate(offsets):
            for i, (y, x) in enumerate(source):
                if not in_map(size, y + dy, x + dx):
                    continue
                first, second = int(mask[b, y, x]), int(mask[b, y + dy, x + dx])
                if first in ignored or second in ignored:
                    continue
                group = 2 if first != second else int(first > 0)
                labels[group, b, p, i] = True
    return labels


def gathered_feature_affinity(features: Tensor, radius: int, distance: str = "mean") -> Tensor:
    """(B, C, H, W) -> (B, P, n) in the released crop, with the gathered (B, C, P, n) tensor of the released code."""
    height, width = features.shape[2:]
    margin = radius - 1
    source = features[:, :, : height - margin, margin : width - margin].flatten(2)
    destination = torch.stack(
        [
            features[:, :, dy : dy + height - margin, margin + dx : margin + dx + width - 2 * margin].flatten(2)
            for dy, dx in disc(radius)
        ],
        dim=2,
    )  # (B, C, P, n)
    difference = (destination - source[:, :, None]).abs()
    return torch.exp(-(difference.mean(1) if distance == "mean" else difference.sum(1)))


def gathered_edge_to_affinity(edge: Tensor, radius: int) -> Tensor:
    """(B, 1, H, W) -> (B, P, n) in the released crop: a gather of all path pixels, then a maximum per path."""
    height, width = edge.shape[2:]
    margin = radius - 1
    index = torch.arange(height * width).view(height, width)
    source = index[: height - margin, margin : width - margin].flatten()
    flat = edge.flatten(1)
    rows = []
    for dy, dx in path_order(radius):
        points = torch.tensor([y * width + x for y, x in line(dy, dx)])
        rows.append(1 - flat[:, source + points[:, None]].amax(1))
    return torch.stack(rows, 1)


def gathered_irn_loss(logits: Tensor, displacement: Tensor, mask: Tensor, radius: int, eps: float = 1e-5) -> Tensor:
    """The released form: every (B, P, n) tensor is built, then the four balanced sums."""
    height, width = mask.shape[1:]
    margin = radius - 1
    offsets = path_order(radius)

    def moved(x: Tensor, dy: int, dx: int) -> Tensor:
        return x[..., dy : dy + height - margin, margin + dx : margin + dx + width - 2 * margin].flatten(-2)

    first = moved(mask, 0, 0)[:, None]
    second = torch.stack([moved(mask, dy, dx) for dy, dx in offsets], 1)
    valid = (first != 255) & (second != 255)
    bg, fg = ((valid & (first == second) & test).to(logits.dtype) for test in (first == 0, first > 0))
    neg = (valid & (first != second)).to(logits.dtype)
    a = gathered_edge_to_affinity(torch.sigmoid(logits), radius)
    partner = torch.stack([moved(displacement, dy, dx) for dy, dx in offsets], 2)
    delta = moved(displacement, 0, 0)[:, :, None] - partner  # (B, 2, P, n)
    target = torch.tensor(offsets, dtype=delta.dtype).T[None, :, :, None]

    def share(label: Tensor, value: Tensor) -> Tensor:
        return (label * value).sum() / (label.sum() + eps)

    positive = (share(bg, -torch.log(a + eps)) + share(fg, -torch.log(a + eps))) / 2
    negative = share(neg, -torch.log(1 + eps - a))
    d_fg = (fg[:, None] * (delta - target).abs()).sum() / (2 * fg.sum() + eps)
    d_bg = (bg[:, None] * delta.abs()).sum() / (2 * bg.sum() + eps)
    return (positive + negative) / 2 + (d_fg + d_bg) / 2
