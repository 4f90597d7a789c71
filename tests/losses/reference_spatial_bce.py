"""Spatial-BCE by sorts and loops over classes and pixels, as its description goes: what the fast forms must equal."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rank_threshold(prob: Tensor, foreground_ratio: Tensor) -> Tensor:
    """The released way: sort all maps, then pick one value a map in a loop."""
    batch, classes, height, width = prob.shape
    ordered = prob.reshape(batch * classes, height * width).sort(dim=1, descending=True).values
    rank = (foreground_ratio.reshape(-1) * (height * width)).int()
    return torch.stack([ordered[row, rank[row]] for row in range(batch * classes)]).view(batch, classes)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def distance(p: float, t: float) -> float:
    if p <= t:
        return 1 - ((t - p) / t) ** 2
    return 1 - ((p - t) / (1 - t)) ** 2


def pixels(logits: Tensor) -> list[list[list[float]]]:
    return [[[sigmoid(x) for x in cell.flatten().tolist()] for cell in image] for image in logits]


def spatial_bce_loss(logits: Tensor, labels: Tensor, threshold: Tensor) -> float:
    costs = []
    for maps, tags, levels in zip(pixels(logits), labels.tolist(), threshold.tolist(), strict=True):
        for values, tag, t in zip(maps, tags, levels, strict=True):
            costs += [distance(p, t) if tag else -math.log(1 - p) for p in values]
    return sum(costs) / len(costs)


def spatial_bce_threshold_loss(threshold_logits: Tensor, labels: Tensor, logits: Tensor) -> float:
    below, above = [], []
    for maps, tags, branch in zip(pixels(logits), labels.tolist(), threshold_logits, strict=True):
        for values, tag, cells in zip(maps, tags, branch, strict=True):
            t = sigmoid(cells.mean().item())
            if tag:
                below += [distance(p, t) for p in values if p <= t]
                above += [distance(p, t) for p in values if p > t]
    return sum(sum(side) / len(side) for side in (below, above) if side)


def foreground_ratio_kl_loss(logits: Tensor, labels: Tensor, foreground_ratio: Tensor) -> float:
    costs = []
    for maps, tags, priors in zip(pixels(logits), labels.tolist(), foreground_ratio.tolist(), strict=True):
        for values, tag, q in zip(maps, tags, priors, strict=True):
            m = sum(values) / len(values)
            if tag:
                costs.append(m * math.log(m / q) + (1 - m) * math.log((1 - m) / (1 - q)))
    return sum(costs) / len(costs) if costs else 0.0


def threshold_without_temperature(t: float, temperature: float) -> float:
    """The root a of sigmoid(exp(temperature) a) = t by bisection, then its own sigmoid: the released root search."""
    low, high = -1e3, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * math.exp(temperature) < math.log(t / (1 - t)) else (low, middle)
    return sigmoid(low)
