"""The terms of BBAM's objective, shared by the loss and by the driver that descends it."""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_modules._precision import at_least_float32


def total_variation(mask: Tensor, beta: float, diagonal: bool, reduction: str) -> Tensor:
    """|difference|^beta of neighbours of maps (..., h, w): summed, or averaged in each direction and then summed."""
    x = at_least_float32(mask)
    pairs = [(x[..., 1:, :], x[..., :-1, :], 1), (x[..., 1:], x[..., :-1], 1)]
    if diagonal:  # each pair is counted twice, as released
        pairs += [(x[..., 1:, 1:], x[..., :-1, :-1], 2), (x[..., 1:, :-1], x[..., :-1, 1:], 2)]
    terms = []
    for a, b, times in pairs:
        change = (a - b).abs()
        # where nothing changes the slope of a power below 1 is infinite
        power = torch.where(change > 0, torch.where(change > 0, change, 1.0) ** beta, 0.0).sum()
        terms.append(times * power / (max(1, a.numel()) if reduction == "mean" else 1))
    return torch.stack(terms).sum()


def detection_change(
    logits: Tensor,
    deltas: Tensor,
    clean_logits: Tensor,
    clean_deltas: Tensor,
    classes: Tensor,
    owner: Tensor,
    count: int,
    classification_weight: float,
    box_weight: float,
) -> Tensor:
    """(n,) mean change of the detections of each of n objects: of the probability and of the deltas of its class.

    Logits (P, C), deltas (P, 4 C), classes and owner (P,).
    """
    logits, deltas = at_least_float32(logits), at_least_float32(deltas)
    column = classes[:, None]
    hidden, seen = (x.softmax(1).gather(1, column)[:, 0] for x in (logits, clean_logits.detach().to(logits.dtype)))
    index = column[:, :, None].expand(-1, -1, 4)
    moved, still = (
        x.unflatten(1, (-1, 4)).gather(1, index)[:, 0] for x in (deltas, clean_deltas.detach().to(deltas.dtype))
    )
    change = classification_weight * (seen - hidden).abs() + box_weight * (still - moved).abs().mean(1)
    total = change.new_zeros(count).index_add(0, owner, change)
    return total / torch.zeros_like(total).index_add(0, owner, torch.ones_like(change)).clamp(min=1)
