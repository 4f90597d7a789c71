"""Which of the two forms of an operation runs: plain torch, or a Triton kernel."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]
_BACKENDS = get_args(Backend)  # not where it is asked for: torch.compile of torch 2.6 can't follow it

INSTALLED = importlib.util.find_spec("triton") is not None


def runs_triton(backend: Backend, *tensors: Tensor, float64: bool = True) -> bool:
    """Whether an operation on ``tensors`` runs as a Triton kernel.

    Args:
        backend: ``"torch"`` never; ``"triton"`` always; ``"auto"`` where all tensors are on a CUDA device and triton is
            installed.
        tensors: what the operation reads.
        float64: whether its kernel takes float64; ``"auto"`` leaves such tensors to torch otherwise.

    Raises:
        ValueError: another word, or ``"triton"`` for tensors off CUDA without Triton's interpreter.
        ImportError: ``"triton"`` where it is not installed.

    Notes:
        With ``TRITON_INTERPRET=1`` in the environment before triton is imported, kernels run on CPU tensors, slowly:
        that is for tests.
    """
    if backend not in _BACKENDS:
        raise ValueError(f'backend: expected "auto", "torch" or "triton", got {backend!r}')
    if backend == "torch":
        return False
    on_cuda = all(tensor.is_cuda for tensor in tensors)
    if backend == "auto":
        return on_cuda and INSTALLED and (float64 or all(tensor.dtype != torch.float64 for tensor in tensors))
    if not INSTALLED:
        raise ImportError('backend: "triton" needs the package triton, which is not installed; use "auto" or "torch"')
    if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        kinds = sorted({tensor.device.type for tensor in tensors})
        raise ValueError(f'backend: "triton" expected CUDA tensors, got {", ".join(kinds)}; use "auto" or "torch"')
    return True
