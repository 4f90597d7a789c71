"""Sums over all processes of a distributed run, with gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_processes(x: Tensor, sync: bool) -> Tensor:
    """Sum of ``x`` over the processes if ``sync`` is set and a process group of more than one is running, else ``x``.

    Every process gets the same sum. In backward each process receives the sum of the gradients of all processes, so
    that, after the averaging of ``DistributedDataParallel``, parameters have the gradient of one process with the whole
    batch.
    """
    if not sync or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _AllReduceSum.apply(x)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
