"""One iteration of pixel-adaptive refinement: every pixel of every map averages its neighbours.

    y[b, c, p] = sum_k w[b, k, p] x[b, c, clamp(p + o_k)]

Axes: B images, C maps, H W pixels, N = H W, P neighbours. Beyond the border the outermost pixels are repeated. The
weights of a pixel are read once for a block of maps; neighbours are read where they lie, nothing is unfolded or padded.

The gradient of the maps gathers too: on a domain larger by the reach of the offsets, where each place has one source,
which is then folded back on the border. So sums have a fixed order, and two runs agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsss_modules.kernels.launch import accumulator, offset_table

# the fastest of those tried on an H100, BLOCK_C being the most maps of a program
AVERAGE = {"BLOCK_C": 2, "BLOCK_N": 256}
MAPS_GRADIENT = {"BLOCK_C": 4, "BLOCK_N": 256}
WEIGHTS_GRADIENT = {"BLOCK_C": 2, "BLOCK_N": 1024}


@triton.jit
def average_kernel(
    x_ptr,  # (B, C, H, W)
    w_ptr,  # (B, P, H, W)
    offsets_ptr,  # (P, 2) int32, dy and dx
    y_ptr,  # (B, C, H, W)
    n_maps,
    n_offsets,
    height,
    width,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """Averages of a block of maps at a block of pixels."""
    pixel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = tl.program_id(2).to(tl.int64)
    n_pixels = height * width
    in_pixels, in_maps = pixel < n_pixels, channel < n_maps
    row, column = pixel // width, pixel % width
    maps = (image * n_maps + channel)[:, None] * n_pixels  # (BLOCK_C, 1) int64
    x, w = x_ptr + maps, w_ptr + image * n_offsets * n_pixels + pixel
    both = in_maps[:, None] & in_pixels[None, :]
    total = tl.zeros((BLOCK_C, BLOCK_N), dtype=ACC)
    for k in range(n_offsets):
        dy, dx = tl.load(offsets_ptr + 2 * k), tl.load(offsets_ptr + 2 * k + 1)
        there_row = tl.minimum(tl.maximum(row + dy, 0), height - 1)
        there_column = tl.minimum(tl.maximum(column + dx, 0), width - 1)
        weight = tl.load(w, mask=in_pixels, other=0).to(ACC)
        value = tl.load(x + (there_row * width + there_column)[None, :], mask=both, other=0).to(ACC)
        total += weight[None, :] * value
        w += n_pixels
    tl.store(y_ptr + maps + pixel[None, :], total.to(y_ptr.dtype.element_ty), mask=both)


@triton.jit
def maps_gradient_kernel(
    grad_ptr,  # (B, C, H, W), of the result
    w_ptr,  # (B, P, H, W)
    offsets_ptr,  # (P, 2) int32
    out_ptr,  # (B, C, H + 2 R, W + 2 R), of the maps continued beyond the border
    n_maps,
    n_offsets,
    height,
    width,
    reach,  # R
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradient of the maps continued beyond the border, at a block of places."""
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = tl.program_id(2).to(tl.int64)
    n_pixels, wide = height * width, width + 2 * reach
    n_places = wide * (height + 2 * reach)
    in_places, in_maps = place < n_places, channel < n_maps
    row, column = place // wide - reach, place % wide - reach
    maps = (image * n_maps + channel)[:, None]  # (BLOCK_C, 1) int64
    grad, w = grad_ptr + maps * n_pixels, w_ptr + image * n_offsets * n_pixels
    both = in_maps[:, None] & in_places[None, :]
    total = tl.zeros((BLOCK_C, BLOCK_N), dtype=ACC)
    for k in range(n_offsets):
        dy, dx = tl.load(offsets_ptr + 2 * k), tl.load(offsets_ptr + 2 * k + 1)
        from_row, from_column = row - dy, column - dx
        inside = (from_row >= 0) & (from_row < height) & (from_column >= 0) & (from_column < width) & in_places
        source = from_row * width + from_column
        weight = tl.load(w + source, mask=inside, other=0).to(ACC)
        known = in_maps[:, None] & inside[None, :]
        value = tl.load(grad + source[None, :], mask=known, other=0).to(ACC)
        total += weight[None, :] * value
        w += n_pixels
    tl.store(out_ptr + maps * n_places + place[None, :], total.to(out_ptr.dtype.element_ty), mask=both)


@triton.jit
def weights_gradient_kernel(
    grad_ptr,  # (B, C, H, W), of the result
    x_ptr,  # (B, C, H, W)
    offsets_ptr,  # (P, 2) int32
    out_ptr,  # (B, P, H, W)
    n_maps,
    n_offsets,
    height,
    width,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradient of the weights of one neighbour at a block of pixels."""
    pixel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    n_pixels = height * width
    in_pixels = pixel < n_pixels
    dy, dx = tl.load(offsets_ptr + 2 * k), tl.load(offsets_ptr + 2 * k + 1)
    there_row = tl.minimum(tl.maximum(pixel // width + dy, 0), height - 1)
    there_column = tl.minimum(tl.maximum(pixel % width + dx, 0), width - 1)
    there = there_row * width + there_column
    total = tl.zeros((BLOCK_N,), dtype=ACC)
    for first in range(0, n_maps, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        maps = (image * n_maps + channel)[:, None] * n_pixels
        both = (channel < n_maps)[:, None] & in_pixels[None, :]
        grad = tl.load(grad_ptr + maps + pixel[None, :], mask=both, other=0).to(ACC)
        value = tl.load(x_ptr + maps + there[None, :], mask=both, other=0).to(ACC)
        total += tl.sum(grad * value, 0)
    out = out_ptr + (image * n_offsets + k) * n_pixels + pixel
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=in_pixels)


def average_neighbours(maps: Tensor, weights: Tensor, offsets: Sequence[tuple[int, int]]) -> Tensor:
    """Average maps (B, C, H, W) with ``weights`` (B, P, H, W) over the neighbours at ``offsets``, as one kernel."""
    return pixel_adaptive_average(maps, weights, [step for offset in offsets for step in offset])


# schemas are written out: whether they can be read from string annotations depends on the version of torch
@torch.library.custom_op(
    "wsss::pixel_adaptive_average", mutates_args=(), schema="(Tensor maps, Tensor weights, int[] offsets) -> Tensor"
)
def pixel_adaptive_average(maps: Tensor, weights: Tensor, offsets: list[int]) -> Tensor:
    """Average maps (B, C, H, W) with ``weights`` (B, P, H, W) over ``offsets``, dy and dx of each in turn."""
    x, w = maps.contiguous(), weights.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        batch, n_maps, height, width = x.shape
        grid = (triton.cdiv(height * width, AVERAGE["BLOCK_N"]), triton.cdiv(n_maps, AVERAGE["BLOCK_C"]), batch)
        sizes = (n_maps, w.shape[1], height, width)
        table = offset_table(tuple(offsets), x.device)
        average_kernel[grid](x, w, table, out, *sizes, ACC=accumulator(x), **AVERAGE)
    return out


@pixel_adaptive_average.register_fake
def _(maps: Tensor, weights: Tensor, offsets: list[int]) -> Tensor:
    return maps.new_empty(maps.shape)


@torch.library.custom_op(
    "wsss::pixel_adaptive_average_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor maps, Tensor weights, int[] offsets, bool for_maps, bool for_weights) "
    "-> (Tensor, Tensor)",
)
def pixel_adaptive_average_backward(
    grad: Tensor, maps: Tensor, weights: Tensor, offsets: list[int], for_maps: bool, for_weights: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`pixel_adaptive_average`; an empty tensor for what is not asked for."""
    g, x, w = grad.contiguous(), maps.contiguous(), weights.contiguous()
    batch, n_maps, height, width = x.shape
    n_offsets, table = w.shape[1], offset_table(tuple(offsets), x.device)
    of_maps, of_weights = x.new_empty(x.shape if for_maps else (0,)), w.new_empty(w.shape if for_weights else (0,))
    sizes = (n_maps, n_offsets, height, width)
    if of_maps.numel():
        reach = max(map(abs, offsets))
        wide = g.new_empty(batch, n_maps, height + 2 * reach, width + 2 * reach)
        options = {**MAPS_GRADIENT, "ACC": accumulator(x)}
        grid = (triton.cdiv(wide[0, 0].numel(), options["BLOCK_N"]), triton.cdiv(n_maps, options["BLOCK_C"]), batch)
        maps_gradient_kernel[grid](g, w, table, wide, *sizes, reach, **options)
        of_maps = _fold(_fold(wide, 2, reach), 3, reach).to(x.dtype)
    if of_weights.numel():
        options = {**WEIGHTS_GRADIENT, "ACC": accumulator(x)}
        grid = (triton.cdiv(height * width, options["BLOCK_N"]), n_offsets, batch)
        weights_gradient_kernel[grid](g, x, table, of_weights, *sizes, **options)
    return of_maps, of_weights


@pixel_adaptive_average_backward.register_fake
def _(
    grad: Tensor, maps: Tensor, weights: Tensor, offsets: list[int], for_maps: bool, for_weights: bool
) -> tuple[Tensor, Tensor]:
    return (
        maps.new_empty(maps.shape if for_maps else (0,)),
        weights.new_empty(weights.shape if for_weights else (0,)),
    )


def _setup(ctx, inputs, output) -> None:
    maps, weights, ctx.offsets = inputs
    ctx.save_for_backward(maps, weights)


def _backward(ctx, grad: Tensor):
    asked = ctx.needs_input_grad[:2]
    found = pixel_adaptive_average_backward(grad, *ctx.saved_tensors, ctx.offsets, *asked)
    return *(gradient if wanted else None for gradient, wanted in zip(found, asked, strict=True)), None


pixel_adaptive_average.register_autograd(_backward, setup_context=_setup)


def _fold(x: Tensor, axis: int, reach: int) -> Tensor:
    """Add what lies ``reach`` places beyond each end of ``axis`` to the place at that end."""
    length = x.shape[axis] - 2 * reach
    inner = x.narrow(axis, reach, length).clone()
    inner.narrow(axis, 0, 1).add_(x.narrow(axis, 0, reach).sum(axis, keepdim=True))
    inner.narrow(axis, length - 1, 1).add_(x.narrow(axis, reach + length, reach).sum(axis, keepdim=True))
    return inner
