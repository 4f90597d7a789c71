"""Costs of pixels against prototypes, with the gradient: similarities are made once and not stored.

    z_c = f . q_c / temperature,   cost = log(sum over the denominator of exp z_c) - z_y

The denominator holds all known prototypes, or the pixel's own and those of the ranks ``first..last - 1``, most similar
first and unknown ones left out (PPC's semi-hard ones; the own prototype counts twice where it is one of them). Of n
known ones, the last stands in where n is not above ``first``.

Axes: P pixels, C prototypes, D channels. The gradient with respect to the pixels, (softmax - one-hot) q / temperature,
is made in the same pass, so that backward is a product with what comes from above. Prototypes are constants.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsss_modules.kernels.launch import block, precision, refuse_float64

BLOCK_P, BLOCK_D = 32, 16
MAX_PROTOTYPES = 128
UNKNOWN: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min / 4)  # a logit without weight


@triton.jit
def contrast_kernel(
    pixels_ptr,  # (P, D)
    prototypes_ptr,  # (C, D)
    target_ptr,  # (P,) int64, y
    known_ptr,  # (C,) int8, 1 for prototypes that count
    cost_ptr,  # (P,) float32
    own_ptr,  # (P,) float32, z_y
    grad_ptr,  # (P, D), of the cost
    n_pixels,
    n_prototypes,
    n_channels,
    scale,  # 1 / temperature
    first,  # rank
    last,  # rank
    RANKED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Costs, similarities with the own prototype and gradients of a block of pixels."""
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    in_p, in_c = p < n_pixels, c < n_prototypes
    target = tl.load(target_ptr + p, mask=in_p, other=0).to(tl.int32)
    known = tl.load(known_ptr + c, mask=in_c, other=0) != 0
    z = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for start in range(0, n_channels, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < n_channels
        f = tl.load(pixels_ptr + p[:, None] * n_channels + d[None, :], mask=in_p[:, None] & in_d[None, :], other=0)
        q = tl.load(prototypes_ptr + c[None, :] * n_channels + d[:, None], mask=in_d[:, None] & in_c[None, :], other=0)
        z = tl.dot(f, q, z, input_precision=PRECISION)
    z = tl.where(known[None, :], z * scale, UNKNOWN)
    z = tl.where(in_c[None, :], z, float("-inf"))
    is_own = c[None, :] == target[:, None]
    own = tl.sum(tl.where(is_own, z, 0.0), 1)
    if RANKED:
        rank = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.int32)
        for other in range(0, n_prototypes):
            rival = tl.max(tl.where(c[None, :] == other, z, float("-inf")), 1)[:, None]
            before = (rival > z) | ((rival == z) & (other < c)[None, :])
            rank += before.to(tl.int32)
        n_known = tl.sum(known.to(tl.int32), 0)
        chosen = (rank >= tl.minimum(first, n_known - 1)) & (rank < tl.minimum(last, n_known)) & in_c[None, :]
    else:
        chosen = in_c[None, :] & (p[:, None] >= 0)
    largest = tl.max(tl.where(chosen, z, float("-inf")), 1)
    if RANKED:
        largest = tl.maximum(largest, own)
    share = tl.where(chosen, tl.exp(z - largest[:, None]), 0.0)
    if RANKED:
        share += tl.where(is_own, tl.exp(own - largest)[:, None], 0.0)
    total = tl.sum(share, 1)
    tl.store(cost_ptr + p, largest + tl.log(total) - own, mask=in_p)
    tl.store(own_ptr + p, own, mask=in_p)
    slope = (share / total[:, None] - is_own.to(tl.float32)) * scale  # of the cost, by f . q_c
    slope = tl.where(known[None, :], slope, 0.0)
    for start in range(0, n_channels, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < n_channels
        q = tl.load(prototypes_ptr + c[:, None] * n_channels + d[None, :], mask=in_c[:, None] & in_d[None, :], other=0)
        grad = tl.dot(slope, q.to(tl.float32), input_precision=PRECISION)
        at = grad_ptr + p[:, None] * n_channels + d[None, :]
        tl.store(at, grad.to(grad_ptr.dtype.element_ty), mask=in_p[:, None] & in_d[None, :])


@torch.library.custom_op(
    "wsss::prototype_contrast",
    mutates_args=(),
    schema="(Tensor pixels, Tensor prototypes, Tensor target, Tensor known, float temperature, int first, int last) "
    "-> (Tensor, Tensor, Tensor)",
)
def prototype_contrast(
    pixels: Tensor, prototypes: Tensor, target: Tensor, known: Tensor, temperature: float, first: int, last: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Costs (P,) of ``pixels`` (P, D) against ``prototypes`` (C, D), their own similarities (P,), and gradients (P, D).

    ``target`` (P,) int64 names the own prototype, ``known`` (C,) bool those that count. With ``last`` 0 the denominator
    holds all, else the own one and the ranks ``first..last - 1``. Only the costs are differentiable.
    """
    refuse_float64("pixels", pixels, prototypes)
    if len(prototypes) > MAX_PROTOTYPES:
        raise ValueError(f"prototypes: expected at most {MAX_PROTOTYPES} for the Triton kernel, got {len(prototypes)}")
    f, q = pixels.contiguous(), prototypes.contiguous()
    costs, own = (torch.empty(len(f), dtype=torch.float32, device=f.device) for _ in range(2))
    grads = torch.empty_like(f)
    if len(f):
        tensors = (f, q, target.contiguous(), known.to(torch.int8), costs, own, grads)
        sizes = (len(f), *q.shape, 1 / temperature, first, last)
        options = {"BLOCK_C": block(len(q), MAX_PROTOTYPES, 16), "BLOCK_P": BLOCK_P, "BLOCK_D": BLOCK_D}
        grid = (triton.cdiv(len(f), BLOCK_P),)
        contrast_kernel[grid](*tensors, *sizes, RANKED=last > 0, PRECISION=precision(), **options)
    return costs, own, grads


@prototype_contrast.register_fake
def _(
    pixels: Tensor, prototypes: Tensor, target: Tensor, known: Tensor, temperature: float, first: int, last: int
) -> tuple[Tensor, Tensor, Tensor]:
    costs, own = (pixels.new_empty(len(pixels), dtype=torch.float32) for _ in range(2))
    return costs, own, torch.empty_like(pixels, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor | None, *_):
    (grads,) = ctx.saved_tensors
    return None if grad is None else (grad[:, None] * grads).to(grads.dtype), *([None] * 6)


prototype_contrast.register_autograd(_backward, setup_context=_setup)
