"""How a loss goes from the costs of its samples to what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

Reduction = Literal["mean", "sum", "none"]


def check_reduction(reduction: str, known: Sequence[str] = ("mean", "sum", "none")) -> None:
    """Raise ``ValueError`` unless ``reduction`` is one of the ``known`` ones."""
    if reduction not in known:
        *others, last = (f'"{name}"' for name in known)
        raise ValueError(f"reduction: expected {', '.join(others)} or {last}, got {reduction!r}")


def reduce(costs: Tensor, reduction: str, count: int | None = None) -> Tensor:
    """Reduce ``costs``; the mean divides by ``count``, by default their number, and is 0 for none at all."""
    if reduction == "none":
        return costs
    total = costs.sum()
    return total if reduction == "sum" else total / max(1, costs.numel() if count is None else count)
