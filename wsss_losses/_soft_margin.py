"""The multi-label loss of image tags, shared by the objectives that contain it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_modules._checks import check_floating
from wsss_modules._precision import at_least_float32


def soft_margin_costs(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the classes of the logistic loss, (B,), of ``logits`` (B, K) called ``name``, in at least float32."""
    check_floating(name, logits)
    with torch.autocast(logits.device.type, enabled=False):
        values = at_least_float32(logits)
        return F.binary_cross_entropy_with_logits(values, labels.to(values.dtype), reduction="none").mean(1)
