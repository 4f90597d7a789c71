"""Messages of a fully connected CRF, summed over all pairs of pixels: exact where the permutohedral lattice is not.

    y_i = sum_j exp(-|f_i - f_j|^2 / 2) v_j

Axes: B images, C labels, F features in units of their deviations, N pixels. The work of attention without a softmax:
a block of the N x N matrix is made where it is used. Distances are sums of squared differences, not differences of
squares, which would lose the digits that matter. The matrix is symmetric, so that backward is forward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsss_modules.kernels.launch import block, precision, refuse_float64

MAX_BLOCK_C = 32
# for exact products of float32 and for TF32, the fastest of those tried on an H100 that spill no register
OPTIONS = {
    "ieee": {"BLOCK_I": 128, "BLOCK_J": 32, "num_warps": 8, "num_stages": 1},
    "tf32": {"BLOCK_I": 128, "BLOCK_J": 64, "num_warps": 4, "num_stages": 3},
}


@triton.jit
def messages_kernel(
    v_ptr,  # (B, N, C)
    f_ptr,  # (B or 1, F, N)
    y_ptr,  # (B, N, C)
    n_labels,
    n_pixels,
    image_stride,  # F N, or 0 for features that all images share
    N_FEATURES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Messages of a block of labels to a block of pixels i."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = tl.program_id(2).to(tl.int64)
    in_i, in_c = i < n_pixels, c < n_labels
    features, values = f_ptr + image * image_stride, v_ptr + image * n_pixels * n_labels
    total = tl.zeros((BLOCK_I, BLOCK_C), dtype=tl.float32)
    for first in range(0, n_pixels, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        in_j = j < n_pixels
        distance = tl.zeros((BLOCK_I, BLOCK_J), dtype=tl.float32)
        for f in tl.static_range(N_FEATURES):
            f_i = tl.load(features + f * n_pixels + i, mask=in_i, other=0).to(tl.float32)
            f_j = tl.load(features + f * n_pixels + j, mask=in_j, other=0).to(tl.float32)
            step = f_i[:, None] - f_j[None, :]
            distance += step * step
        weight = tl.exp(-0.5 * distance)
        at = j.to(tl.int64)[:, None] * n_labels + c[None, :]
        v_j = tl.load(values + at, mask=in_j[:, None] & in_c[None, :], other=0).to(tl.float32)
        total = tl.dot(weight, v_j, total, input_precision=PRECISION)
    at = image * n_pixels * n_labels + i.to(tl.int64)[:, None] * n_labels + c[None, :]
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=in_i[:, None] & in_c[None, :])


@torch.library.custom_op(
    "wsss::gaussian_messages", mutates_args=(), schema="(Tensor values, Tensor features) -> Tensor"
)
def gaussian_messages(values: Tensor, features: Tensor) -> Tensor:
    """Messages (B, N, C) of ``values`` (B, N, C) between pixels with ``features`` (B or 1, F, N), constants."""
    refuse_float64("values", values, features)
    v, f, out = (
        values.contiguous(),
        features.contiguous(),
        torch.empty_like(values, memory_format=torch.contiguous_format),
    )
    if out.numel():
        batch, n_pixels, n_labels = v.shape
        blocks = {**OPTIONS[precision()], "BLOCK_C": block(n_labels, MAX_BLOCK_C, 16)}
        grid = (triton.cdiv(n_pixels, blocks["BLOCK_I"]), triton.cdiv(n_labels, blocks["BLOCK_C"]), batch)
        sizes = (n_labels, n_pixels, 0 if len(f) == 1 else f[0].numel())
        messages_kernel[grid](v, f, out, *sizes, N_FEATURES=f.shape[1], PRECISION=precision(), **blocks)
    return out


@gaussian_messages.register_fake
def _(values: Tensor, features: Tensor) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx, grad: Tensor):
    return gaussian_messages(grad, ctx.saved_tensors[0]), None


gaussian_messages.register_autograd(_backward, setup_context=_setup)
