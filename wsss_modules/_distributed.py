"""What all processes of a distributed run hold together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def max_over_processes(x: Tensor, sync: bool) -> Tensor:
    """Largest ``x`` of all processes if ``sync`` is set and a process group of more than one is running, else ``x``.

    Every process gets the same values. In backward the gradients of all processes are added up and go to the process
    that holds the maximum (in equal parts if several do), so that, after the averaging of ``DistributedDataParallel``,
    parameters have the gradient of one process with the whole batch.
    """
    if not sync or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _AllReduceMax.apply(x)


def gather_batch(x: Tensor, sync: bool) -> Tensor:
    """``x`` (B, ...) of all processes one after the other, without gradient, under the condition of the function above.

    All processes must bring the same shape.
    """
    if not sync or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    mine = x.detach().contiguous()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return torch.cat(parts)


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
