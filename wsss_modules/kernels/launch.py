"""What launchers of kernels have in common."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor


def accumulator(x: Tensor) -> tl.dtype:
    """Type of sums over ``x``: float32 at least."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def refuse_float64(names: str, *tensors: Tensor) -> None:
    """Raise ``TypeError`` for what a kernel of products would round: float64."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        raise TypeError(f"{names}: expected at most float32 for the Triton kernel, got float64; use the torch backend")


def precision() -> str:
    """How products of float32 are taken: exactly, or by TF32 where torch's own matrix products are allowed it."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def block(size: int, most: int, least: int = 1) -> int:
    """Power of two that holds ``size``, within ``least..most``."""
    return min(most, max(least, triton.next_power_of_2(max(1, size))))


@lru_cache(maxsize=64)
def offset_table(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    """Offsets, dy and dx in turn, as int32 on ``device``."""
    return torch.tensor(offsets, dtype=torch.int32, device=device)
