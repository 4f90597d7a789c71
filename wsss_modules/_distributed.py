"""Sums, maxima and collections over all processes of a distributed run, with gradients."""

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
    if _is_alone(sync):
        return x
    return _AllReduceSum.apply(x)


def max_over_processes(x: Tensor, sync: bool) -> Tensor:
    """Largest ``x`` of all processes if ``sync`` is set and a process group of more than one is running, else ``x``.

    Every process gets the same values. In backward the gradients of all processes are added up and go to the process
    that holds the maximum (in equal parts if several do), so that, after the averaging of ``DistributedDataParallel``,
    parameters have the gradient of one process with the whole batch.
    """
    if _is_alone(sync):
        return x
    return _AllReduceMax.apply(x)


def gather_over_processes(x: Tensor, sync: bool) -> Tensor:
    """``x`` (B, ...) of all processes, joined in the order of their ranks, if ``sync`` is set and there are several.

    Every process must bring the same shape, and gets the same (N, ...). In backward each receives the sum of what all
    processes' losses ask of its own part; see :func:`sum_over_processes`.
    """
    if _is_alone(sync):
        return x
    return _AllGather.apply(x)


def _is_alone(sync: bool) -> bool:
    return not sync or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1


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


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.detach().contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


class _AllReduceMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        largest = x.detach().clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        ctx.save_for_backward(x == largest)
        return largest

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (mine,) = ctx.saved_tensors
        both = torch.stack([grad, mine.to(grad.dtype)])  # one exchange for the gradients and the number of holders
        dist.all_reduce(both)
        total, holders = both.unbind()
        return torch.where(mine, total / holders, 0.0)
