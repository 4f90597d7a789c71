"""Vectors of length 1."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """``x`` with vectors of length 1 along ``dim``; one of zeros stays, with a finite slope."""
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / torch.where(length > 0, length, 1.0)
