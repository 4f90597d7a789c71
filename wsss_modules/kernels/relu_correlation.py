"""Sums of maps weighted by how alike pixels are, without the N x N matrix of weights.

    a_ij = max(k_i . k_j, 0),   s_j = sum_i a_ij x_i,   t_j = sum_i a_ij

Axes: B images, C maps, E channels of the keys, N pixels; i runs over those that are read, j over those that read.

A block of the matrix is made where it is used and forgotten, forward and backward, as in FlashAttention (without a
softmax there is nothing to rescale). The matrix is symmetric, so that the gradient of the maps is the forward pass of
the gradient. That of the keys is sum_i m_ij k_i, with m_ij the gradient of a_ij + a_ji where a_ij > 0: a product of
what is stored of pixels i and j, 2 C + 2 numbers each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsss_modules.kernels.launch import block, precision, refuse_float64

MAX_BLOCK_C = 32
# for exact products of float32 and for TF32, the fastest of those tried on an H100 that spill no register; BLOCK_OUT is
# the most that a program has
SUMS = {
    "ieee": {"BLOCK_E": 32, "BLOCK_I": 128, "BLOCK_J": 64, "num_warps": 8, "num_stages": 1},
    "tf32": {"BLOCK_E": 32, "BLOCK_I": 32, "BLOCK_J": 64, "num_warps": 4, "num_stages": 1},
}
KEYS_GRADIENT = {
    "ieee": {"BLOCK_OUT": 128, "BLOCK_E": 32, "BLOCK_I": 32, "BLOCK_J": 64, "num_warps": 8, "num_stages": 1},
    "tf32": {"BLOCK_OUT": 256, "BLOCK_E": 32, "BLOCK_I": 32, "BLOCK_J": 32, "num_warps": 8, "num_stages": 2},
}


@triton.jit
def products(
    left_ptr,  # (C, N)
    right_ptr,  # (C, N)
    i,  # (BLOCK_I,)
    j,  # (BLOCK_J,)
    n_channels,
    n_pixels,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products (BLOCK_I, BLOCK_J) of the vectors on the left at pixels i with those on the right at pixels j."""
    total = tl.zeros((BLOCK_I, BLOCK_J), dtype=tl.float32)
    in_i, in_j = i < n_pixels, j < n_pixels
    for first in range(0, n_channels, BLOCK_C):
        c = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
        in_c = c < n_channels
        left = tl.load(left_ptr + c[None, :] * n_pixels + i[:, None], mask=in_i[:, None] & in_c[None, :], other=0)
        right = tl.load(right_ptr + c[:, None] * n_pixels + j[None, :], mask=in_c[:, None] & in_j[None, :], other=0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def sums_kernel(
    x_ptr,  # (B, C, N)
    k_ptr,  # (B, E, N)
    sums_ptr,  # (B, C, N)
    totals_ptr,  # (B, N)
    n_maps,
    n_keys,
    n_pixels,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of a block of maps for a block of pixels j, and the totals of their weights."""
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = tl.program_id(2).to(tl.int64)
    in_j, in_c = j < n_pixels, c < n_maps
    keys, maps = k_ptr + image * n_keys * n_pixels, x_ptr + image * n_maps * n_pixels
    sums = tl.zeros((BLOCK_C, BLOCK_J), dtype=tl.float32)
    totals = tl.zeros((BLOCK_J,), dtype=tl.float32)
    for first in range(0, n_pixels, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        in_i = i < n_pixels
        a = products(keys, keys, i, j, n_keys, n_pixels, BLOCK_E, BLOCK_I, BLOCK_J, PRECISION)
        a = tl.maximum(a, 0)
        at = c.to(tl.int64)[:, None] * n_pixels + i[None, :]
        x_i = tl.load(maps + at, mask=in_c[:, None] & in_i[None, :], other=0).to(tl.float32)
        sums = tl.dot(x_i, a, sums, input_precision=PRECISION)
        totals += tl.sum(a, 0)
    at = (image * n_maps + c)[:, None] * n_pixels + j[None, :]
    tl.store(sums_ptr + at, sums, mask=in_c[:, None] & in_j[None, :])
    if tl.program_id(1) == 0:
        tl.store(totals_ptr + image * n_pixels + j, totals, mask=in_j)


@triton.jit
def keys_gradient_kernel(
    k_ptr,  # (B, E, N)
    u_ptr,  # (B, U, N), of pixels i: maps, 1, gradients of sums and of totals
    v_ptr,  # (B, U, N), of pixels j: gradients of sums and of totals, maps, 1
    out_ptr,  # (B, E, N)
    n_keys,
    n_sides,  # U
    n_pixels,
    BLOCK_OUT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a block of the keys' channels for a block of pixels j."""
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    o = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    image = tl.program_id(2).to(tl.int64)
    in_j, in_o = j < n_pixels, o < n_keys
    keys, sides = k_ptr + image * n_keys * n_pixels, image * n_sides * n_pixels
    grad = tl.zeros((BLOCK_OUT, BLOCK_J), dtype=tl.float32)
    for first in range(0, n_pixels, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        in_i = i < n_pixels
        a = products(keys, keys, i, j, n_keys, n_pixels, BLOCK_E, BLOCK_I, BLOCK_J, PRECISION)
        slope = products(u_ptr + sides, v_ptr + sides, i, j, n_sides, n_pixels, BLOCK_E, BLOCK_I, BLOCK_J, PRECISION)
        slope = tl.where(a > 0, slope, 0.0)
        at = o.to(tl.int64)[:, None] * n_pixels + i[None, :]
        k_o = tl.load(keys + at, mask=in_o[:, None] & in_i[None, :], other=0).to(tl.float32)
        grad = tl.dot(k_o, slope, grad, input_precision=PRECISION)
    at = (image * n_keys + o)[:, None] * n_pixels + j[None, :]
    tl.store(out_ptr + at, grad.to(out_ptr.dtype.element_ty), mask=in_o[:, None] & in_j[None, :])


@torch.library.custom_op(
    "wsss::relu_correlation", mutates_args=(), schema="(Tensor maps, Tensor keys) -> (Tensor, Tensor)"
)
def relu_correlation(maps: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (B, C, N) of ``maps`` (B, C, N), weighted by relu of products of ``keys`` (B, E, N), and totals (B, N).

    Both float32, from inputs of up to 32 bits.
    """
    refuse_float64("maps, keys", maps, keys)
    x, k = maps.contiguous(), keys.contiguous()
    batch, n_maps, n_pixels = x.shape
    sums = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    totals = torch.empty((batch, n_pixels), dtype=torch.float32, device=x.device)
    if totals.numel():
        blocks = {**SUMS[precision()], "BLOCK_C": block(n_maps, MAX_BLOCK_C, 16)}
        grid = (triton.cdiv(n_pixels, blocks["BLOCK_J"]), max(1, triton.cdiv(n_maps, blocks["BLOCK_C"])), batch)
        sums_kernel[grid](x, k, sums, totals, n_maps, k.shape[1], n_pixels, PRECISION=precision(), **blocks)
    return sums, totals


@relu_correlation.register_fake
def _(maps: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    totals = maps.new_empty((maps.shape[0], maps.shape[2]), dtype=torch.float32)
    return maps.new_empty(maps.shape, dtype=torch.float32), totals


@torch.library.custom_op(
    "wsss::relu_correlation_keys_gradient",
    mutates_args=(),
    schema="(Tensor grad_sums, Tensor grad_totals, Tensor maps, Tensor keys) -> Tensor",
)
def keys_gradient(grad_sums: Tensor, grad_totals: Tensor, maps: Tensor, keys: Tensor) -> Tensor:
    """Gradient of :func:`relu_correlation` with respect to the keys."""
    k, out = keys.contiguous(), torch.empty_like(keys, memory_format=torch.contiguous_format)
    if out.numel():
        batch, n_keys, n_pixels = k.shape
        x, ones = maps.float(), torch.ones_like(grad_totals)[:, None]
        u = torch.cat([x, ones, grad_sums, grad_totals[:, None]], 1)
        v = torch.cat([grad_sums, grad_totals[:, None], x, ones], 1)
        blocks = KEYS_GRADIENT[precision()]
        blocks = {**blocks, "BLOCK_OUT": block(n_keys, blocks["BLOCK_OUT"], 16)}
        grid = (triton.cdiv(n_pixels, blocks["BLOCK_J"]), triton.cdiv(n_keys, blocks["BLOCK_OUT"]), batch)
        keys_gradient_kernel[grid](k, u, v, out, n_keys, u.shape[1], n_pixels, PRECISION=precision(), **blocks)
    return out


@keys_gradient.register_fake
def _(grad_sums: Tensor, grad_totals: Tensor, maps: Tensor, keys: Tensor) -> Tensor:
    return torch.empty_like(keys, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_sums: Tensor, grad_totals: Tensor):
    maps, keys = ctx.saved_tensors
    grad_maps = grad_keys = None
    if ctx.needs_input_grad[0]:
        grad_maps = relu_correlation(grad_sums, keys)[0].to(maps.dtype)
    if ctx.needs_input_grad[1]:
        grad_keys = keys_gradient(grad_sums, grad_totals, maps, keys)
    return grad_maps, grad_keys


relu_correlation.register_autograd(_backward, setup_context=_setup)
