"""A walk over half a stencil: the product with the affinities, a whole step of the walk, and the affinities' gradient.

Axes: B images, C maps, P offsets of the half plane, H W pixels, N = H W. Entry (p, i) of the affinities is shared by
pixel i and its partner i + o_p, so a pixel gathers over both ends, from ``values`` at itself and at i - o_p.

A step of the recurrence of :mod:`wsss_modules._stencil_walk` is one launch in place of some hundred: neighbours are
gathered from the state, and increment, the lost digits of Kahan's sum and the weighted total move on in the registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsss_modules.kernels.launch import accumulator, block, offset_table

if TYPE_CHECKING:
    from wsss_modules._stencil_walk import Recurrence

BLOCK_N = 128
MAX_BLOCK_C = 8

# what a launch computes
PRODUCT = 0  # A x
CHANGE = 1  # (T - I) x
STEP = 2  # a step of the walk


@triton.jit
def walk_kernel(
    x_ptr,  # (B, C, H, W), maps; the state of a walk
    values_ptr,  # (B, P, H, W)
    inverse_degree_ptr,  # (B, H, W), not read for PRODUCT
    offsets_ptr,  # (P, 2) int32
    y_ptr,  # (B, C, H, W), the result; the next state
    increment_ptr,  # (B, C, H, W), read and written for STEP only, as the following
    lost_ptr,  # (B, C, H, W)
    total_ptr,  # (B, C, H, W)
    n_maps,
    n_offsets,
    height,
    width,
    scale,  # a of the recurrence
    momentum,  # b
    weight,  # c of the next state in the total
    WHAT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """A product, a change or a step, for a block of maps and pixels."""
    pixel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = tl.program_id(2).to(tl.int64)
    n_pixels = height * width
    in_pixels, in_maps = pixel < n_pixels, channel < n_maps
    row, column = pixel // width, pixel % width
    both = in_maps[:, None] & in_pixels[None, :]
    maps = (image * n_maps + channel)[:, None] * n_pixels  # (BLOCK_C, 1) int64
    at = maps + pixel[None, :]
    x, values = x_ptr + at, values_ptr + image * n_offsets * n_pixels + pixel
    here = tl.load(x, mask=both, other=0).to(ACC)
    sums = tl.zeros((BLOCK_C, BLOCK_N), dtype=ACC)
    for p in range(n_offsets):
        dy, dx = tl.load(offsets_ptr + 2 * p), tl.load(offsets_ptr + 2 * p + 1)
        step = dy * width + dx
        ahead = (row + dy >= 0) & (row + dy < height) & (column + dx >= 0) & (column + dx < width) & in_pixels
        behind = (row - dy >= 0) & (row - dy < height) & (column - dx >= 0) & (column - dx < width) & in_pixels
        to_ahead = tl.load(values, mask=ahead, other=0).to(ACC)
        to_behind = tl.load(values - step, mask=behind, other=0).to(ACC)
        at_ahead = tl.load(x + step, mask=in_maps[:, None] & ahead[None, :], other=0).to(ACC)
        at_behind = tl.load(x - step, mask=in_maps[:, None] & behind[None, :], other=0).to(ACC)
        values += n_pixels
        if WHAT == 0:
            sums += to_ahead[None, :] * at_ahead + to_behind[None, :] * at_behind
        else:  # differences first: they are small where the map has become smooth
            sums += to_ahead[None, :] * (at_ahead - here) + to_behind[None, :] * (at_behind - here)
    if WHAT == 0:
        result = here + sums
    else:
        inverse_degree = tl.load(inverse_degree_ptr + image * n_pixels + pixel, mask=in_pixels, other=0).to(ACC)
        result = sums * inverse_degree[None, :]
    if WHAT == 2:
        increment = scale * result + momentum * tl.load(increment_ptr + at, mask=both, other=0).to(ACC)
        wanted = tl.load(lost_ptr + at, mask=both, other=0).to(ACC) + increment
        result = here + wanted
        total = tl.load(total_ptr + at, mask=both, other=0).to(ACC) + weight * result
        tl.store(increment_ptr + at, increment, mask=both)
        tl.store(lost_ptr + at, wanted - (result - here), mask=both)
        tl.store(total_ptr + at, total, mask=both)
    tl.store(y_ptr + at, result.to(y_ptr.dtype.element_ty), mask=both)


@triton.jit
def values_gradient_kernel(
    x_ptr,  # (B, C, H, W), t
    average_ptr,  # (B, C, H, W), T t; zeros for the gradient of a product
    adjoint_ptr,  # (B, C, H, W), w
    offsets_ptr,  # (P, 2) int32
    out_ptr,  # (B, P, H, W), added to
    n_maps,
    n_offsets,
    height,
    width,
    scale,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add ``scale sum_c w_i (t_j - (T t)_i) + w_j (t_i - (T t)_j)`` for the pairs at one offset."""
    pixel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    n_pixels = height * width
    dy, dx = tl.load(offsets_ptr + 2 * p), tl.load(offsets_ptr + 2 * p + 1)
    row, column = pixel // width + dy, pixel % width + dx
    paired = (pixel < n_pixels) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    step = dy * width + dx
    sums = tl.zeros((BLOCK_N,), dtype=ACC)
    for channel in range(n_maps):
        at = (image * n_maps + channel) * n_pixels + pixel
        x_i = tl.load(x_ptr + at, mask=paired, other=0).to(ACC)
        x_j = tl.load(x_ptr + at + step, mask=paired, other=0).to(ACC)
        average_i = tl.load(average_ptr + at, mask=paired, other=0).to(ACC)
        average_j = tl.load(average_ptr + at + step, mask=paired, other=0).to(ACC)
        adjoint_i = tl.load(adjoint_ptr + at, mask=paired, other=0).to(ACC)
        adjoint_j = tl.load(adjoint_ptr + at + step, mask=paired, other=0).to(ACC)
        sums += adjoint_i * (x_j - average_i) + adjoint_j * (x_i - average_j)
    out = out_ptr + (image * n_offsets + p) * n_pixels + pixel
    tl.store(out, tl.load(out, mask=paired, other=0) + scale * sums, mask=paired)


def launch_walk(
    what: int,
    x: Tensor,
    values: Tensor,
    inverse_degree: Tensor,
    offsets: list[int],
    y: Tensor,
    increment: Tensor | None = None,
    lost: Tensor | None = None,
    total: Tensor | None = None,
    *,
    scale: float = 1.0,
    momentum: float = 0.0,
    weight: float = 0.0,
) -> None:
    """Write A x, (T - I) x or the next state of a walk to ``y``; all maps (B, C, H, W) and contiguous."""
    batch, n_maps, height, width = x.shape
    if x.numel() == 0:
        return
    block_c = block(n_maps, MAX_BLOCK_C)
    grid = (triton.cdiv(height * width, BLOCK_N), triton.cdiv(n_maps, block_c), batch)
    walking = (y if part is None else part for part in (increment, lost, total))
    walk_kernel[grid](
        x,
        values,
        inverse_degree,
        offset_table(tuple(offsets), x.device),
        y,
        *walking,
        n_maps,
        values.shape[1],
        height,
        width,
        scale,
        momentum,
        weight,
        WHAT=what,
        BLOCK_C=block_c,
        BLOCK_N=BLOCK_N,
        ACC=accumulator(x),
    )


def add_values_gradient(
    out: Tensor, x: Tensor, average: Tensor, adjoint: Tensor, offsets: list[int], scale: float = 1.0
) -> None:
    """Add a step to the gradient ``out`` (B, P, H, W) of the affinities, from contiguous maps (B, C, H, W)."""
    batch, n_maps, height, width = x.shape
    if out.numel() and n_maps:
        grid = (triton.cdiv(height * width, BLOCK_N), out.shape[1], batch)
        table, sizes = offset_table(tuple(offsets), x.device), (n_maps, out.shape[1], height, width)
        options = {"BLOCK_N": BLOCK_N, "ACC": accumulator(x)}
        values_gradient_kernel[grid](x, average, adjoint, table, out, *sizes, scale, **options)


class KernelStencil:
    """T - I for affinities ``values`` (B, P, H, W): what the stencil of the plain form is, by kernels.

    Its buffers have no margin, since kernels know where the map ends.
    """

    def __init__(self, values: Tensor, offsets: list[int]) -> None:
        self.offsets, self.size, self.n_pixels, self.margin = offsets, values.shape[2:], values[0, 0].numel(), 0
        # products of affinities below eps² would be denormal numbers, which say nothing
        self.values = torch.where(values > torch.finfo(values.dtype).eps ** 2, values, 0).contiguous()
        degree = stencil_product(torch.ones_like(self.values[:, :1]), self.values, offsets).flatten(2)
        self.off_diagonal, self.inverse_degree = degree - 1, 1 / degree  # (B, 1, N)

    def buffer(self, x: Tensor) -> Tensor:
        """Copy of ``x`` (..., N)."""
        return x.clone(memory_format=torch.contiguous_format)

    def at(self, buffer: Tensor, step: int) -> Tensor:
        """The buffer itself: neighbours are found by the kernels."""
        return buffer

    def bind(self, buffer: Tensor) -> Callable[[], Tensor]:
        """T - I of the buffer's present content; the result is overwritten by the next call."""
        change = torch.empty_like(buffer)

        def apply() -> Tensor:
            launch_walk(CHANGE, self._maps(buffer), self.values, self.inverse_degree, self.offsets, self._maps(change))
            return change

        return apply

    def polynomial(self, x: Tensor, recurrence: Recurrence) -> Tensor:
        """p(T) x for flat ``x`` (B, C, N)."""
        state, increment, lost = self._maps(self.buffer(x)), *(torch.zeros_like(self._maps(x)) for _ in range(2))
        following, total = torch.empty_like(state), state * recurrence.weight(0)
        for k in range(recurrence.n_steps):
            launch_walk(
                STEP,
                state,
                self.values,
                self.inverse_degree,
                self.offsets,
                following,
                increment,
                lost,
                total,
                scale=recurrence.scale(k),
                momentum=recurrence.momentum(k),
                weight=recurrence.weight(k + 1),
            )
            state, following = following, state
        return total.flatten(2)

    def accumulate(self, result: Tensor, states: Tensor, averages: Tensor, adjoints: Tensor, scale: float) -> None:
        """Add one step to the gradient (B, P, N), from flat t_k, T t_k and w_{k+1}."""
        state, average, adjoint = (self._maps(x) for x in (states, averages, adjoints))
        add_values_gradient(self._maps(result), state, average, adjoint, self.offsets, scale)

    def _maps(self, x: Tensor) -> Tensor:
        return x.contiguous().unflatten(2, self.size)


@torch.library.custom_op(
    "wsss::stencil_product", mutates_args=(), schema="(Tensor x, Tensor values, int[] offsets) -> Tensor"
)
def stencil_product(x: Tensor, values: Tensor, offsets: list[int]) -> Tensor:
    """A x for maps (B, C, H, W), A with unit diagonal and ``values`` (B, P, H, W) at ``offsets``, dy and dx in turn."""
    x, values = x.contiguous(), values.contiguous()
    y = torch.empty_like(x)
    launch_walk(PRODUCT, x, values, values, offsets, y)
    return y


@stencil_product.register_fake
def _(x: Tensor, values: Tensor, offsets: list[int]) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "wsss::stencil_product_values_gradient",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor values, int[] offsets) -> Tensor",
)
def stencil_product_values_gradient(grad: Tensor, x: Tensor, values: Tensor, offsets: list[int]) -> Tensor:
    """Gradient of :func:`stencil_product` with respect to ``values``."""
    x, dtype = x.contiguous(), torch.promote_types(values.dtype, torch.float32)
    out = torch.zeros(values.shape, dtype=dtype, device=values.device)
    add_values_gradient(out, x, torch.zeros_like(x), grad.contiguous(), offsets)
    return out.to(values.dtype)


@stencil_product_values_gradient.register_fake
def _(grad: Tensor, x: Tensor, values: Tensor, offsets: list[int]) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:
    x, values, ctx.offsets = inputs
    ctx.save_for_backward(x, values)


def _backward(ctx, grad: Tensor):
    x, values = ctx.saved_tensors
    grad_x = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_x = stencil_product(grad, values, ctx.offsets)  # A is symmetric
    if ctx.needs_input_grad[1]:
        grad_values = stencil_product_values_gradient(grad, x, values, ctx.offsets)
    return grad_x, grad_values, None


stencil_product.register_autograd(_backward, setup_context=_setup)
