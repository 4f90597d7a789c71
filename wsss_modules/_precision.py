"""Half precision in, float32 inside."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if that is what it is."""
    return x if x.dtype == torch.float64 else x.float()
