"""Sums over all pixel pairs of IRN's losses, straight from maps: one offset at a time, nothing of size (B, P, n) kept.

Axis letters: B batch, H W map size, P offsets, h w sources of a pair offset.

A loss is a quotient of sums over the batch, so that these operations return sums and counts. Backward computes the
pairs again. Each is one opaque operation for ``torch.compile``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wsss_modules.affinity.offsets import Offset, affinity_offsets, path_offsets
from wsss_modules.affinity.path_maxima import chunk_size, corner_box, path_maxima_grad, path_maxima_maps


class _Groups(NamedTuple):
    """Exclusive groups of the pairs at one offset, each (B, h, w), 1 for members; see ``affinity_labels``."""

    bg_pos: Tensor
    fg_pos: Tensor
    neg: Tensor


class _Boxes(NamedTuple):
    """The sources at one offset and their partners, as (rows, columns) of a (B, ..., H, W) map."""

    source: tuple[slice, slice]
    destination: tuple[slice, slice]


class _Mask:
    """A mask with -1 for unknown, as float maps: on a CPU, products of zeros and ones cost a tenth of ``where``."""

    def __init__(self, mask: Tensor, dtype: torch.dtype) -> None:
        self.label = mask.to(dtype)
        self.background, self.foreground, self.known = ((test).to(dtype) for test in (mask == 0, mask > 0, mask >= 0))

    def positives(self, boxes: _Boxes) -> tuple[Tensor, Tensor]:
        """``bg_pos`` and ``fg_pos`` of :meth:`groups`."""
        label = _at(self.label, boxes.source)
        same = torch.eq(label, _at(self.label, boxes.destination), out=torch.empty_like(label))
        bg_pos = _at(self.background, boxes.source) * _at(self.background, boxes.destination)
        return bg_pos, same.mul_(_at(self.foreground, boxes.source))

    def pairs(self, boxes: _Boxes) -> Tensor:
        """The pairs that are in any group."""
        return _at(self.known, boxes.source) * _at(self.known, boxes.destination)

    def groups(self, boxes: _Boxes) -> _Groups:
        bg_pos, fg_pos = self.positives(boxes)
        return _Groups(bg_pos, fg_pos, self.pairs(boxes).sub_(bg_pos).sub_(fg_pos))


def hide_ignored(mask: Tensor, ignore_index: int, num_classes: int | None) -> Tensor:
    """The mask as int32 with -1 where it says nothing."""
    ignored = mask == ignore_index
    if num_classes is not None:
        ignored = ignored | (mask >= num_classes)
    return torch.where(ignored, -1, mask.to(torch.int32))


def _boxes(offset: Offset, size: tuple[int, int], radius: int, full: bool) -> _Boxes:
    source, _ = corner_box(offset, size, radius, full)
    dy, dx = offset
    rows = slice(source[0].start + dy, source[0].stop + dy)
    return _Boxes(source, (rows, slice(source[1].start + dx, source[1].stop + dx)))


def _at(x: Tensor, box: tuple[slice, slice]) -> Tensor:
    return x[..., box[0], box[1]]


def _chunks(x: Tensor, n_maps: int = 8) -> list[slice]:
    """Groups of images of ``x`` (B, ..., H, W) to take together, with about ``n_maps`` copies in memory."""
    step = chunk_size(n_maps, x)
    return [slice(start, start + step) for start in range(0, len(x), step)]


@torch.library.custom_op(
    "wsss::irn_pair_counts",
    mutates_args=(),
    schema="(Tensor mask, int radius, bool full) -> Tensor",
)
def pair_counts(mask: Tensor, radius: int, full: bool) -> Tensor:
    """Number of pairs in the groups bg_pos, fg_pos, neg: (3,) int64, from :func:`hide_ignored`'s mask (B, H, W)."""
    counts = torch.zeros(3, dtype=torch.int64, device=mask.device)
    for chunk in _chunks(mask):
        maps = _Mask(mask[chunk], torch.float32)
        for offset in affinity_offsets(radius):
            boxes = _boxes(offset, (mask.shape[1], mask.shape[2]), radius, full)
            # the sum of one image: float32 counts exactly up to 2**24
            members = (*maps.positives(boxes), maps.pairs(boxes))
            counts += torch.stack([group.sum((1, 2)).to(torch.int64).sum() for group in members])
    counts[2] -= counts[0] + counts[1]
    return counts


@pair_counts.register_fake
def _(mask: Tensor, radius: int, full: bool) -> Tensor:
    return mask.new_empty(3, dtype=torch.int64)


@torch.library.custom_op(
    "wsss::irn_boundary_costs",
    mutates_args=(),
    schema="(Tensor logits, Tensor mask, int radius, bool full, float eps) -> Tensor",
)
def boundary_costs(logits: Tensor, mask: Tensor, radius: int, full: bool, eps: float) -> Tensor:
    """Sums of -log(a + eps) over bg_pos and fg_pos and of -log(1 + eps - a) over neg: (3,).

    ``logits`` (B, H, W) are those of the boundary; ``a = 1 - sigmoid(max over the path)``. In backward ``a`` and
    ``1 - a`` are each a sigmoid of its own, so that a saturated logit keeps its gradient.
    """
    costs = logits.new_zeros(3)
    size = (logits.shape[1], logits.shape[2])
    offsets = path_offsets(radius).offsets
    for chunk in _chunks(logits, len(offsets)):
        maps = _Mask(mask[chunk], logits.dtype)
        for offset, maxima in zip(offsets, path_maxima_maps(logits[chunk], radius), strict=True):
            groups = maps.groups(_boxes(offset, size, radius, full))
            a = 1 - torch.sigmoid(_at(maxima, corner_box(offset, size, radius, full)[1]))
            # a + eps, or (1 + eps) - a in neg: rounded as in affinity_loss
            gain = (1 - 2 * groups.neg).mul_(a).add_(groups.neg + eps).log_()
            costs -= torch.stack([(gain * group).sum() for group in groups])
    return costs


@boundary_costs.register_fake
def _(logits: Tensor, mask: Tensor, radius: int, full: bool, eps: float) -> Tensor:
    return logits.new_empty(3)


@torch.library.custom_op(
    "wsss::irn_boundary_costs_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor logits, Tensor mask, int radius, bool full, float eps) -> Tensor",
)
def boundary_costs_backward(grad: Tensor, logits: Tensor, mask: Tensor, radius: int, full: bool, eps: float) -> Tensor:
    """Gradient of :func:`boundary_costs` with respect to ``logits``, from ``grad`` (3,)."""
    result = torch.empty_like(logits)
    size = (logits.shape[1], logits.shape[2])
    offsets = path_offsets(radius).offsets
    slopes = grad * grad.new_tensor([1, 1, -1])  # a larger logit costs more in bg_pos and fg_pos, less in neg
    for chunk in _chunks(logits, 2 * len(offsets)):
        maps, known = path_maxima_maps(logits[chunk], radius), _Mask(mask[chunk], logits.dtype)
        grads = [torch.zeros_like(maxima) for maxima in maps]
        for offset, maxima, into in zip(offsets, maps, grads, strict=True):
            groups = known.groups(_boxes(offset, size, radius, full))
            corner = corner_box(offset, size, radius, full)[1]
            wanted = (2 * groups.neg).sub_(1).mul_(_at(maxima, corner))  # logit of a boundary in neg, of none elsewhere
            share = torch.sigmoid(wanted)
            slope = wanted.neg_().sigmoid_().mul_(share).div_(share.add_(eps))  # of -log(share + eps), by -wanted
            torch.mul(slope, _weigh(groups, slopes), out=_at(into, corner))
        result[chunk] = path_maxima_grad(logits[chunk], maps, grads, radius)
    return result


@boundary_costs_backward.register_fake
def _(grad: Tensor, logits: Tensor, mask: Tensor, radius: int, full: bool, eps: float) -> Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op(
    "wsss::irn_displacement_costs",
    mutates_args=(),
    schema="(Tensor displacement, Tensor mask, int radius, bool full) -> Tensor",
)
def displacement_costs(displacement: Tensor, mask: Tensor, radius: int, full: bool) -> Tensor:
    """Sums of |delta| over bg_pos and of |delta - offset| over fg_pos, both components: (2,).

    ``delta`` is the difference of ``displacement`` (B, 2, H, W) between source and destination.
    """
    costs = displacement.new_zeros(2)
    for chunk in _chunks(displacement):
        field, maps = displacement[chunk], _Mask(mask[chunk], displacement.dtype)
        for offset in affinity_offsets(radius):
            boxes = _boxes(offset, (displacement.shape[2], displacement.shape[3]), radius, full)
            bg_pos, fg_pos = maps.positives(boxes)
            dy, dx = _displacement_error(field, offset, boxes, fg_pos).abs_().unbind(1)
            error = dy.add_(dx)
            costs += torch.stack([(error * group).sum() for group in (bg_pos, fg_pos)])
    return costs


@displacement_costs.register_fake
def _(displacement: Tensor, mask: Tensor, radius: int, full: bool) -> Tensor:
    return displacement.new_empty(2)


@torch.library.custom_op(
    "wsss::irn_displacement_costs_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor displacement, Tensor mask, int radius, bool full) -> Tensor",
)
def displacement_costs_backward(grad: Tensor, displacement: Tensor, mask: Tensor, radius: int, full: bool) -> Tensor:
    """Gradient of :func:`displacement_costs` with respect to ``displacement``, from ``grad`` (2,)."""
    result = torch.zeros_like(displacement)
    for chunk in _chunks(displacement):
        field, maps = displacement[chunk], _Mask(mask[chunk], displacement.dtype)
        for offset in affinity_offsets(radius):
            boxes = _boxes(offset, (displacement.shape[2], displacement.shape[3]), radius, full)
            bg_pos, fg_pos = maps.positives(boxes)
            push = _displacement_error(field, offset, boxes, fg_pos).sign_()
            push.mul_((bg_pos * grad[0]).addcmul_(fg_pos, grad[1])[:, None])
            _at(result[chunk], boxes.source).add_(push)
            _at(result[chunk], boxes.destination).sub_(push)
    return result


@displacement_costs_backward.register_fake
def _(grad: Tensor, displacement: Tensor, mask: Tensor, radius: int, full: bool) -> Tensor:
    return torch.empty_like(displacement)


def _displacement_error(displacement: Tensor, offset: Offset, boxes: _Boxes, fg_pos: Tensor) -> Tensor:
    """Delta minus its target, the offset in fg_pos and 0 elsewhere: (B, 2, h, w)."""
    error = _at(displacement, boxes.source) - _at(displacement, boxes.destination)
    for component, target in enumerate(offset):
        error[:, component].sub_(fg_pos, alpha=target)
    return error


def _weigh(groups: _Groups, values: Tensor) -> Tensor:
    """The value (of three) of each pair's group, 0 for pairs in none: (B, h, w)."""
    return (groups.bg_pos * values[0]).addcmul_(groups.fg_pos, values[1]).addcmul_(groups.neg, values[2])


def _setup_boundary(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, mask, *ctx.options = inputs
    ctx.save_for_backward(logits, mask)


def _backward_boundary(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return boundary_costs_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


boundary_costs.register_autograd(_backward_boundary, setup_context=_setup_boundary)


def _setup_displacement(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    displacement, mask, *ctx.options = inputs
    ctx.save_for_backward(displacement, mask)


def _backward_displacement(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return displacement_costs_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None


displacement_costs.register_autograd(_backward_displacement, setup_context=_setup_displacement)
