"""Steps of a random walk over half a stencil, without the N x N matrix: the arithmetic below `random_walk`.

Axis letters: B batch, C channels, P offsets, N = H*W pixels, M margin, S steps of a segment.

A walk, plain or accelerated, is a three-term recurrence in ``T = D⁻¹A``, in increments: with ``t_0 = x``, ``d_0 = 0``

    d_{k+1} = b_k d_k + a_k (T - I) t_k,      t_{k+1} = t_k + d_{k+1},      y = Σ_k c_k t_k

The plain walk has ``a = 1, b = 0``; Chebyshev polynomials have ``a_0 = 1, b_0 = 0`` and then ``a = 2, b = 1``.
Increments keep float32 errors below 1e-6, where ``y ← (A y) / D`` lets the rounding of the row sums compound to 2e-4.

Maps lie flat in memory, in buffers with a margin of zeros on both sides, so that the neighbours at one offset are one
contiguous slice. A slice runs over the ends of rows; those entries are harmless since their affinity is 0.

On a CPU, maps are walked in blocks small enough that torch runs each operation on one thread: a step is a hundred small
operations, which gain little from a second thread and, on a busy machine, lose milliseconds each by waiting for it.

The adjoint is a walk of the same kind, because A is symmetric: ``p(T)ᵀ g = D p(T) (g / D)``. The gradient of the
affinities needs the states of the forward walk; these are computed again, from about √n checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wsss_modules.affinity.offsets import Offset, inside

if TYPE_CHECKING:
    from wsss_modules.kernels.stencil_walk import KernelStencil

SERIAL = 32768  # numbers up to which torch runs an elementwise operation on one thread; a reduction needs one less


@dataclass
class Recurrence:
    """Coefficients of the three-term recurrence; ``weights`` (c_0 .. c_n) is empty for the plain walk."""

    n_steps: int
    weights: Sequence[float]

    def scale(self, k: int) -> float:
        return 2.0 if self.weights and k > 0 else 1.0

    def momentum(self, k: int) -> float:
        return 1.0 if self.weights and k > 0 else 0.0

    def weight(self, k: int) -> float:
        if self.weights:
            return self.weights[k]
        return 1.0 if k == self.n_steps else 0.0


class _Stencil:
    """The operator T - I for affinities ``values`` (B, P, H, W), on flat buffers."""

    def __init__(self, values: Tensor, offsets: list[Offset]) -> None:
        height, width = values.shape[2:]
        self.n_pixels = height * width
        self.steps = [dy * width + dx for dy, dx in offsets]
        self.margin = max((abs(step) for step in self.steps), default=0)
        # products of affinities below eps² would be denormal numbers, which are slow and say nothing
        keep = inside(tuple(offsets), (height, width), values.device) & (values > torch.finfo(values.dtype).eps ** 2)
        padded = self.buffer(torch.where(keep, values, 0).flatten(2))
        self.weights = [self.at(padded, 0)[:, p : p + 1] for p in range(len(offsets))]  # (B, 1, N) each
        self.off_diagonal = torch.zeros_like(values[:, :1]).flatten(2)  # (B, 1, N)
        for p, (weight, step) in enumerate(zip(self.weights, self.steps, strict=True)):
            self.off_diagonal.add_(weight).add_(self.at(padded, -step)[:, p : p + 1])
        self.inverse_degree = 1 / (1 + self.off_diagonal)

    def buffer(self, x: Tensor) -> Tensor:
        """Copy of ``x`` (..., N) with margins of zeros: (..., M + N + M)."""
        padded = x.new_zeros((*x.shape[:-1], self.n_pixels + 2 * self.margin))
        self.at(padded, 0).copy_(x)
        return padded

    def at(self, buffer: Tensor, step: int) -> Tensor:
        """View (..., N): the buffer's pixels, moved by ``step`` in memory."""
        return buffer.narrow(-1, self.margin + step, self.n_pixels)

    def bind(self, buffer: Tensor) -> _BoundStencil:
        return _BoundStencil(self, buffer)

    def polynomial(self, x: Tensor, recurrence: Recurrence) -> Tensor:
        """p(T) x for flat ``x`` (B, C, N)."""
        walk = _Walk(self, x, recurrence)
        if not recurrence.weights:
            for k in range(recurrence.n_steps):
                walk.advance(k, walk.apply())
            return walk.state.contiguous()
        total = x * recurrence.weight(0)
        for k in range(recurrence.n_steps):
            walk.advance(k, walk.apply())
            if recurrence.weight(k + 1):
                total.add_(walk.state, alpha=recurrence.weight(k + 1))
        return total

    def accumulate(self, result: Tensor, states: Tensor, averages: Tensor, adjoints: Tensor, scale: float) -> None:
        """Add one step to the gradient (B, P, N), from buffers (B, C, M + N + M) of t_k, T t_k and w_{k+1}."""
        state, average, adjoint = (self.at(x, 0) for x in (states, averages, adjoints))
        forth, back = torch.empty_like(average), torch.empty_like(average)
        for p, step in enumerate(self.steps):
            torch.sub(self.at(states, step), average, out=forth).mul_(adjoint)
            torch.sub(state, self.at(averages, step), out=back).mul_(self.at(adjoints, step))
            result[:, p].add_(forth.add_(back).sum(1), alpha=scale)


class _BoundStencil:
    """T - I applied to one buffer again and again; the views of the neighbours are made once."""

    def __init__(self, stencil: _Stencil, buffer: Tensor) -> None:
        self.state = stencil.at(buffer, 0)
        self.inverse_degree = stencil.inverse_degree
        self.flow = torch.empty_like(self.state, memory_format=torch.contiguous_format)
        self.total = torch.zeros_like(buffer)
        self.change = stencil.at(self.total, 0)
        self.edges = [
            (weight, stencil.at(buffer, step), stencil.at(self.total, step))
            for weight, step in zip(stencil.weights, stencil.steps, strict=True)
        ]

    def __call__(self) -> Tensor:
        """(T - I) of the buffer's present content; the result is overwritten by the next call.

        What one pixel of a pair gains the other loses. Differences are taken before they are weighted, since they are
        small where the map has become smooth: that keeps rounding from building up over hundreds of steps.
        """
        self.change.zero_()  # the margins stay 0, since weights into them are 0
        for weight, neighbour, neighbour_change in self.edges:
            torch.sub(neighbour, self.state, out=self.flow)
            self.flow.mul_(weight)
            self.change.add_(self.flow)
            neighbour_change.sub_(self.flow)
        return self.change.mul_(self.inverse_degree)


class _Walk:
    """State t and increment d of the recurrence, advanced in place, over a stencil of either kind.

    What rounding takes from an increment is added to the next one (Kahan's sum): increments of weak affinities can be
    smaller than half a unit in the last place of the state for hundreds of steps.
    """

    def __init__(self, stencil: _Stencil | KernelStencil, x: Tensor, recurrence: Recurrence) -> None:
        self.buffer = stencil.buffer(x)
        self.state = stencil.at(self.buffer, 0)  # t, (B, C, N)
        self.increment, self.lost, self.before = (torch.zeros_like(x) for _ in range(3))  # d; (B, C, N) each
        self.apply = stencil.bind(self.buffer)
        self.recurrence = recurrence

    def restore(self, state: Tensor, increment: Tensor) -> None:
        self.state.copy_(state)
        self.increment.copy_(increment)
        self.lost.zero_()

    def advance(self, k: int, change: Tensor) -> None:
        """From t_k to t_{k+1}, where ``change`` is (T - I) t_k."""
        if self.recurrence.momentum(k):
            self.increment.add_(change, alpha=self.recurrence.scale(k))
        else:
            self.increment.copy_(change)
        self.before.copy_(self.state)
        self.lost.add_(self.increment)  # what should be added now
        self.state.add_(self.lost)
        self.lost.sub_(self.before.sub_(self.state).neg_())  # less what was


def _stencil_of(values: Tensor, offsets: list[int], triton: bool) -> _Stencil | KernelStencil:
    if triton:
        from wsss_modules.kernels.stencil_walk import KernelStencil

        return KernelStencil(values, offsets)
    return _Stencil(values, _pairs(offsets))


# schemas are written out: whether they can be read from string annotations depends on the version of torch
@torch.library.custom_op(
    "wsss::stencil_walk",
    mutates_args=(),
    schema="(Tensor x, Tensor values, int[] offsets, int n_steps, float[] weights, bool triton=False) -> Tensor",
)
def stencil_walk(
    x: Tensor, values: Tensor, offsets: list[int], n_steps: int, weights: list[float], triton: bool = False
) -> Tensor:
    """Walk maps ``x`` (B, C, H, W) over affinities ``values`` (B, P, H, W).

    ``offsets`` holds dy and dx of each offset in turn. ``weights`` c_0 .. c_n makes the result the sum of Chebyshev
    polynomials; empty, it is ``T`` to the power ``n_steps``. Each map stays within its own range, exactly. ``triton``
    takes a step in one launch.
    """
    recurrence = Recurrence(n_steps, weights)
    result = x.new_empty(x.shape)
    for images, channels in _blocks(x, SERIAL):
        stencil = _stencil_of(values[images], offsets, triton)
        part = x[images, channels]
        walked = stencil.polynomial(part.flatten(2), recurrence).view(part.shape)
        low, high = part.amin((2, 3), keepdim=True), part.amax((2, 3), keepdim=True)
        torch.clamp(walked, low, high, out=result[images, channels])
    return result


@stencil_walk.register_fake
def _(
    x: Tensor, values: Tensor, offsets: list[int], n_steps: int, weights: list[float], triton: bool = False
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "wsss::stencil_walk_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor values, int[] offsets, int n_steps, float[] weights, bool for_values, "
    "bool triton) -> (Tensor, Tensor)",
)
def stencil_walk_backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    offsets: list[int],
    n_steps: int,
    weights: list[float],
    for_values: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`stencil_walk` with respect to ``x`` and, if asked for, ``values`` (else an empty tensor)."""
    recurrence = Recurrence(n_steps, weights)
    grad_x = x.new_empty(x.shape)
    grad_values = values.new_zeros(values.shape if for_values else (0,))
    for images, channels in _blocks(x, SERIAL - 1 if for_values else SERIAL):
        stencil = _stencil_of(values[images], offsets, triton)
        part = x[images, channels].flatten(2)
        adjoint = grad[images, channels].flatten(2) * stencil.inverse_degree  # u = g / D, (B, C, N)
        if for_values and n_steps > 0:
            adjoint = _affinity_gradient(stencil, part, adjoint, recurrence, grad_values[images].flatten(2))
        else:
            adjoint = stencil.polynomial(adjoint, recurrence)
        grad_x[images, channels] = (adjoint * (1 + stencil.off_diagonal)).unflatten(2, x.shape[2:])
    if for_values:
        grad_values *= inside(tuple(_pairs(offsets)), (x.shape[2], x.shape[3]), x.device)
    return grad_x, grad_values


@stencil_walk_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    offsets: list[int],
    n_steps: int,
    weights: list[float],
    for_values: bool,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), values.new_empty(values.shape if for_values else (0,))


def _pairs(offsets: list[int]) -> list[Offset]:
    return list(zip(offsets[::2], offsets[1::2], strict=True))


def _blocks(x: Tensor, limit: int) -> list[tuple[slice, slice]]:
    """Images and channels of ``x`` (B, C, H, W) to walk together: on a CPU, up to ``limit`` numbers; else all."""
    batch, n_channels, height, width = x.shape
    if x.device.type != "cpu" or x.numel() == 0:
        return [(slice(0, batch), slice(0, n_channels))]
    channels = min(n_channels, max(1, limit // (height * width)))
    images = max(1, limit // (n_channels * height * width))
    return [
        (slice(b, b + images), slice(c, c + channels))
        for b in range(0, batch, images)
        for c in range(0, n_channels, channels)
    ]


def _affinity_gradient(
    stencil: _Stencil | KernelStencil, x: Tensor, adjoint: Tensor, recurrence: Recurrence, result: Tensor
) -> Tensor:
    """Add the gradient of the half stencil to ``result`` (B, P, N), and return p(T) u.

    With w_k the adjoint of t_k divided by D, ``w_k = c_k u + a_k T w_{k+1} - b_{k+1} w_{k+2}``, and step k adds
    ``a_k w_{k+1,i} (t_{k,j} - (T t_k)_i)`` to the gradient of A_ij, likewise with i and j exchanged.
    """
    n_steps = recurrence.n_steps
    segment = math.isqrt(n_steps - 1) + 1
    walk = _Walk(stencil, x, recurrence)
    checkpoints = []
    for k in range(n_steps):
        if k % segment == 0:
            checkpoints.append((walk.state.clone(), walk.increment.clone()))
        walk.advance(k, walk.apply())

    back = _Walk(stencil, torch.zeros_like(x), recurrence)  # its state is w_{k+1}, its increment w_{k+1} - w_{k+2}
    start = adjoint * recurrence.weight(n_steps)
    back.restore(start, start)
    shape = (segment, *x.shape[:2], stencil.n_pixels + 2 * stencil.margin)
    states, averages = x.new_zeros(shape), x.new_zeros(shape)  # t_k and T t_k of one segment
    for number in range(len(checkpoints) - 1, -1, -1):
        first, last = number * segment, min((number + 1) * segment, n_steps)
        walk.restore(*checkpoints[number])
        for k in range(first, last):
            stencil.at(states[k - first], 0).copy_(walk.state)
            change = walk.apply()
            torch.add(walk.state, change, out=stencil.at(averages[k - first], 0))
            walk.advance(k, change)
        for k in range(last - 1, first - 1, -1):
            stencil.accumulate(result, states[k - first], averages[k - first], back.buffer, recurrence.scale(k))
            _step_back(back, adjoint, recurrence, k)
    return back.state


def _step_back(back: _Walk, adjoint: Tensor, recurrence: Recurrence, k: int) -> None:
    """From w_{k+1} to w_k."""
    change = back.apply()
    if not recurrence.weights:
        back.advance(k, change)
    elif k > 0:  # w_k - w_{k+1} = (w_{k+1} - w_{k+2}) + c_k u + 2 (T - I) w_{k+1}
        back.increment.add_(change, alpha=2).add_(adjoint, alpha=recurrence.weight(k))
        back.state.add_(back.increment)
    else:  # w_0 = c_0 u + T w_1 - w_2
        back.state.copy_(change.add_(back.increment).add_(adjoint, alpha=recurrence.weight(0)))


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, values, ctx.offsets, ctx.n_steps, ctx.weights, ctx.triton = inputs
    ctx.save_for_backward(x, values)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    x, values = ctx.saved_tensors
    arguments = (ctx.offsets, ctx.n_steps, ctx.weights, ctx.needs_input_grad[1], ctx.triton)
    grad_x, grad_values = stencil_walk_backward(grad, x, values, *arguments)
    return grad_x, grad_values if ctx.needs_input_grad[1] else None, None, None, None, None


stencil_walk.register_autograd(_backward, setup_context=_setup)
