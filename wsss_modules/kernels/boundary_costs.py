"""Costs of a boundary map over all pairs of near pixels, by the maximum along the path of each pair, in one pass.

    a_ij = sigmoid(-m_ij),   m_ij = max of the logits on the path from i to j

    bg_pos, fg_pos: sum of -log(a_ij + eps),   neg: sum of -log(1 - a_ij + eps)

Axes: B images, H W pixels, P offsets of the half plane. A pair belongs to bg_pos if both labels are 0, to fg_pos if
both are the same class, to neg if both are known and differ. Pairs live in registers only: labels, maxima and costs of
a block of pixels, offset after offset. Backward finds the maxima again; each pair hands its gradient to the first pixel
of its path that attains the maximum, by atomic additions, whose order is not fixed: two runs may differ by rounding.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from wsss_modules.affinity.offsets import path_offsets, source_box
from wsss_modules.kernels.launch import refuse_float64

BLOCK_N = 64
OPTIONS = {"BLOCK_N": BLOCK_N, "num_warps": 1}


@triton.jit
def _sigmoid(x):
    # by exp of a negative number in either case, so that neither end loses its digits
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1 / (1 + small), small / (1 + small))


@triton.jit
def costs_kernel(
    logits_ptr,  # (B, H, W)
    label_ptr,  # (B, H, W) integers, 0 background, 1.. classes, UNKNOWN
    offsets_ptr,  # (P, 2) int32
    starts_ptr,  # (P + 1,) int32, where the path of each offset starts in points
    points_ptr,  # (points, 2) int32, dy and dx from the source
    costs_ptr,  # (programs, 3) float32
    counts_ptr,  # (programs, 3) int32
    height,
    width,
    n_offsets,
    bottom,  # sources lie in rows 0 .. bottom - 1
    left,  # and columns left .. right - 1
    right,
    eps,
    UNKNOWN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Costs and numbers of the pairs that start in a block of pixels."""
    pixel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1).to(tl.int64) * height * width
    row, column = pixel // width, pixel % width
    source = (row < bottom) & (column >= left) & (column < right)
    label = tl.load(label_ptr + start + pixel, mask=source, other=UNKNOWN).to(tl.int32)
    source = source & (label != UNKNOWN)
    bg, fg, neg = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    n_bg, n_fg, n_neg = tl.zeros((BLOCK_N,), tl.int32), tl.zeros((BLOCK_N,), tl.int32), tl.zeros((BLOCK_N,), tl.int32)
    for p in range(n_offsets):
        dy, dx = tl.load(offsets_ptr + 2 * p), tl.load(offsets_ptr + 2 * p + 1)
        paired = source & (row + dy < height) & (column + dx >= 0) & (column + dx < width)
        partner = tl.load(label_ptr + start + pixel + dy * width + dx, mask=paired, other=UNKNOWN).to(tl.int32)
        paired = paired & (partner != UNKNOWN)
        largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        for k in range(tl.load(starts_ptr + p), tl.load(starts_ptr + p + 1)):
            step = tl.load(points_ptr + 2 * k) * width + tl.load(points_ptr + 2 * k + 1)
            value = tl.load(logits_ptr + start + pixel + step, mask=paired, other=0).to(tl.float32)
            largest = tl.maximum(largest, value)
        same, ground = label == partner, label == 0
        is_bg, is_fg, is_neg = paired & same & ground, paired & same & (label > 0), paired & (label != partner)
        wanted = tl.where(is_neg, largest, -largest)
        cost = -tl.log(_sigmoid(tl.where(paired, wanted, 0.0)) + eps)
        bg, fg, neg = (
            bg + tl.where(is_bg, cost, 0.0),
            fg + tl.where(is_fg, cost, 0.0),
            neg + tl.where(is_neg, cost, 0.0),
        )
        n_bg, n_fg, n_neg = n_bg + is_bg.to(tl.int32), n_fg + is_fg.to(tl.int32), n_neg + is_neg.to(tl.int32)
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(costs_ptr + 3 * program, tl.sum(bg, 0))
    tl.store(costs_ptr + 3 * program + 1, tl.sum(fg, 0))
    tl.store(costs_ptr + 3 * program + 2, tl.sum(neg, 0))
    tl.store(counts_ptr + 3 * program, tl.sum(n_bg, 0))
    tl.store(counts_ptr + 3 * program + 1, tl.sum(n_fg, 0))
    tl.store(counts_ptr + 3 * program + 2, tl.sum(n_neg, 0))


@triton.jit
def logits_gradient_kernel(
    logits_ptr,  # (B, H, W)
    label_ptr,  # (B, H, W) integers
    offsets_ptr,  # (P, 2) int32
    starts_ptr,  # (P + 1,) int32
    points_ptr,  # (points, 2) int32
    grad_ptr,  # (3,) float32, of the costs
    out_ptr,  # (B, H, W) float32, added to
    height,
    width,
    n_offsets,
    bottom,
    left,
    right,
    eps,
    UNKNOWN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the gradients of the pairs that start in a block of pixels."""
    pixel = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1).to(tl.int64) * height * width
    row, column = pixel // width, pixel % width
    source = (row < bottom) & (column >= left) & (column < right)
    label = tl.load(label_ptr + start + pixel, mask=source, other=UNKNOWN).to(tl.int32)
    source = source & (label != UNKNOWN)
    of_bg, of_fg, of_neg = tl.load(grad_ptr), tl.load(grad_ptr + 1), tl.load(grad_ptr + 2)
    for p in range(n_offsets):
        dy, dx = tl.load(offsets_ptr + 2 * p), tl.load(offsets_ptr + 2 * p + 1)
        paired = source & (row + dy < height) & (column + dx >= 0) & (column + dx < width)
        partner = tl.load(label_ptr + start + pixel + dy * width + dx, mask=paired, other=UNKNOWN).to(tl.int32)
        paired = paired & (partner != UNKNOWN)
        largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        place = pixel
        for k in range(tl.load(starts_ptr + p), tl.load(starts_ptr + p + 1)):
            step = tl.load(points_ptr + 2 * k) * width + tl.load(points_ptr + 2 * k + 1)
            value = tl.load(logits_ptr + start + pixel + step, mask=paired, other=0).to(tl.float32)
            place = tl.where(value > largest, pixel + step, place)
            largest = tl.maximum(largest, value)
        is_neg = paired & (label != partner)
        wanted = tl.where(paired, tl.where(is_neg, largest, -largest), 0.0)
        share = _sigmoid(wanted)
        slope = share * _sigmoid(-wanted) / (share + eps)  # of -log(share + eps), by -wanted
        weight = tl.where(is_neg, -of_neg, tl.where(label == 0, of_bg, of_fg))
        tl.atomic_add(out_ptr + start + place, weight * slope, mask=paired)


@torch.library.custom_op(
    "wsss::boundary_pair_costs",
    mutates_args=(),
    schema="(Tensor logits, Tensor labels, int radius, bool full, float eps) -> (Tensor, Tensor)",
)
def boundary_pair_costs(logits: Tensor, labels: Tensor, radius: int, full: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Sums of the costs of bg_pos, fg_pos and neg, (3,) float32, and the numbers of pairs, (3,) int64.

    ``logits`` (B, H, W) of the boundary, ``labels`` (B, H, W) uint8 with 255 for unknown, or int32 with -1.
    """
    refuse_float64("logits", logits)
    x, label = logits.contiguous(), labels.contiguous()
    programs = triton.cdiv(x[0].numel(), BLOCK_N) if x.numel() else 0
    costs = torch.empty((len(x), programs, 3), dtype=torch.float32, device=x.device)
    counts = torch.empty((len(x), programs, 3), dtype=torch.int32, device=x.device)
    if x.numel():
        tables, sizes = _paths(radius, x.device), _sizes(x, radius, full)
        options = {"UNKNOWN": 255 if label.dtype == torch.uint8 else -1, **OPTIONS}
        costs_kernel[(programs, len(x))](x, label, *tables, costs, counts, *sizes, eps, **options)
    return costs.sum((0, 1)), counts.sum((0, 1))


@boundary_pair_costs.register_fake
def _(logits: Tensor, labels: Tensor, radius: int, full: bool, eps: float) -> tuple[Tensor, Tensor]:
    return logits.new_empty(3, dtype=torch.float32), logits.new_empty(3, dtype=torch.int64)


@torch.library.custom_op(
    "wsss::boundary_pair_costs_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor logits, Tensor labels, int radius, bool full, float eps) -> Tensor",
)
def boundary_pair_costs_backward(
    grad: Tensor, logits: Tensor, labels: Tensor, radius: int, full: bool, eps: float
) -> Tensor:
    """Gradient of :func:`boundary_pair_costs` with respect to the logits, from ``grad`` (3,)."""
    x, label = logits.contiguous(), labels.contiguous()
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    if x.numel():
        grid = (triton.cdiv(x[0].numel(), BLOCK_N), len(x))
        tables, sizes = _paths(radius, x.device), _sizes(x, radius, full)
        options = {"UNKNOWN": 255 if label.dtype == torch.uint8 else -1, **OPTIONS}
        logits_gradient_kernel[grid](x, label, *tables, grad.float().contiguous(), out, *sizes, eps, **options)
    return out.to(logits.dtype)


@boundary_pair_costs_backward.register_fake
def _(grad: Tensor, logits: Tensor, labels: Tensor, radius: int, full: bool, eps: float) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:
    logits, labels, *ctx.options = inputs
    ctx.save_for_backward(logits, labels)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _):
    return boundary_pair_costs_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


boundary_pair_costs.register_autograd(_backward, setup_context=_setup)


def _sizes(x: Tensor, radius: int, full: bool) -> tuple[int, ...]:
    rows, columns = source_box((x.shape[1], x.shape[2]), radius, "full" if full else "released")
    return x.shape[1], x.shape[2], len(path_offsets(radius).offsets), rows.stop, columns.start, columns.stop


@lru_cache(maxsize=16)
def _paths(radius: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets (P, 2), starts (P + 1,) and points of all paths, int32."""
    offsets, paths = path_offsets(radius)
    starts = [0]
    for path in paths:
        starts.append(starts[-1] + len(path))
    points = [point for path in paths for point in path]
    offsets_, starts_, points_ = (
        torch.tensor(table, dtype=torch.int32, device=device) for table in (offsets, starts, points)
    )
    return offsets_, starts_, points_
