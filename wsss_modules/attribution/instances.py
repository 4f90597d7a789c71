"""From attribution maps to masks of instances and to one label map (BBAM).

Axes: n instances, H W pixels, h w cells of a map, S superpixels, m segment proposals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules.boxes.geometry import boxes_to_masks
from wsss_modules.dense_crf import CRFParameters

__all__ = [
    "BBAM_CRF",
    "BoxMaskRefiner",
    "RefinedBoxMask",
    "SegmentOverlaps",
    "box_seed_probability",
    "instances_to_semantic",
    "match_segment_proposals",
    "refine_box_mask",
    "segment_overlaps",
]

#: The dense CRF over BBAM's instance seeds, after :func:`wsss_modules.unary_from_scores`.
BBAM_CRF = CRFParameters(gaussian_sxy=1.0, bilateral_srgb=3.0, bilateral_weight=4.0)


def box_seed_probability(
    mask: Tensor,
    box: Tensor,
    size: tuple[int, int],
    theta: float,
    *,
    blur: tuple[float, float] = (16.0, 48.0),
    stretch: bool = False,
) -> Tensor:
    """How likely each pixel of a box belongs to its object, from the attribution map.

    The map is brought to the size of the image and cut to the box; the strongest 1 - theta of the box's area become 1,
    the others their share of the weakest of these; a Gaussian blur follows, whose radius and deviation are
    ``blur[0] + blur[1] * sqrt(box area / image area)`` pixels.

    Args:
        mask: (h, w), or (1, h, w), attribution map in [0, 1], with something in it.
        box: (4,) x1, y1, x2, y2 in pixels; corners are cut to integers.
        size: (H, W) in pixels.
        theta: Share of the box that is not certain: .85 for strict seeds, .2 for loose ones.
        blur: Smallest radius, and how much larger it is for a box as large as the image.
        stretch: Bring the values to go from 0 to 1, where the released code subtracts the minimum and divides by the
            maximum: a box that covers the image leaves nothing near 1 there.

    Returns:
        (H, W) float64 in [0, 1], 0 outside the box.

    Raises:
        TypeError: ``mask`` is not floating point.
        ValueError: a wrong shape, ``theta`` outside [0, 1].

    Paper:
        In the released code of Lee, Yi, Shin and Yoon, BBAM, CVPR 2021, arXiv:2103.08907.

    Notes:
        The threshold is one selection of the k-th largest value inside the box, not a sort of all pixels. The blur is
        two products with band matrices over the rows and columns of the box, whose mirrored border holds for any
        radius.

    Example:
        >>> mask = torch.zeros(1, 4, 4)
        >>> mask[0, 1:3, 1:3] = 1
        >>> seed = box_seed_probability(mask, torch.tensor([1, 1, 7, 7]), (8, 8), 0.85, blur=(1, 0))
        >>> seed.shape, float(seed.max()), float(seed[0].max())
        (torch.Size([8, 8]), 1.0, 0.0)
    """
    mask = mask[0] if mask.ndim == 3 and len(mask) == 1 else mask
    check_ndim("mask", mask, 2, "(h, w) or (1, h, w)")
    check_floating("mask", mask)
    check_shape("box", box, (4,), "x1, y1, x2, y2")
    _check_theta(theta)
    inside = boxes_to_masks(box[None], size, rounding="truncate")[0].to(mask.device)
    x = _normalized(mask.double(), stretch)
    x = F.interpolate(x[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    x = torch.where(inside, x, 0.0)
    area, pixels = int(inside.sum()), inside.numel()
    if area == 0:
        return x
    rows, columns = inside.any(1), inside.any(0)
    top, left = int(rows.nonzero()[0, 0]), int(columns.nonzero()[0, 0])
    bottom, right = top + int(rows.sum()), left + int(columns.sum())
    rank = int(area * (1 - theta))  # among all pixels, of which those outside the box are 0 and come last
    value = _value_at_rank(x[top:bottom, left:right].flatten(), rank) if rank < area else x.new_zeros(())
    x = (x / (value + 1e-8)).clamp(0, 1)
    radius = int(blur[0] + blur[1] * math.sqrt(area / pixels))
    vertical, horizontal = (_gaussian_band(side, radius, keep) for side, keep in ((size[0], rows), (size[1], columns)))
    out = torch.zeros_like(x)
    out[top:bottom, left:right] = vertical @ x[top:bottom, left:right] @ horizontal.T
    return _normalized(out, stretch)


class RefinedBoxMask(NamedTuple):
    """What `refine_box_mask` returns.

    Attributes:
        mask: (H, W) bool, inside the box.
        probability: (H, W) float64, what the first CRF was given.
        crf_calls: How often the CRF was asked.
    """

    mask: Tensor
    probability: Tensor
    crf_calls: int


def refine_box_mask(
    mask: Tensor | None,
    box: Tensor,
    size: tuple[int, int],
    theta: float,
    *,
    crf: Callable[[Tensor], Tensor] | None = None,
    keep: float = 0.9,
    retries: Sequence[float] = (0.7, 0.8, 0.9, 0.95, 0.96),
    fallbacks: Sequence[float] = (0.7, 0.8, 0.9, 0.95),
    blur: tuple[float, float] = (16.0, 48.0),
    stretch: bool = False,
) -> RefinedBoxMask:
    """Mask of an instance from its attribution map, by a CRF.

    What the CRF gives more than ``keep`` stays. If that is a fifth of the box or less, though the box is at most a
    tenth of the image, the whole box is taken as likely to degree after degree of ``retries`` (and certain where kept),
    until the result is more than a third of it. Without a map, the degrees of ``fallbacks`` are tried until it is more
    than a fifth.

    Args:
        mask: (h, w) or (1, h, w) attribution map; None, or zeros only: there is none.
        box: (4,) x1, y1, x2, y2 in pixels; corners are cut to integers.
        size: (H, W) in pixels.
        theta: See `box_seed_probability`.
        crf: From scores (2, H, W), background first, to probabilities of that shape; None leaves them as they are.
            :func:`wsss_modules.dense_crf` with `BBAM_CRF` is the published one.
        keep: Probability above which a pixel belongs to the instance.
        retries: See above.
        fallbacks: See above.
        blur: See `box_seed_probability`.
        stretch: See `box_seed_probability`.

    Returns:
        `RefinedBoxMask`; where no degree was enough, the mask of the last.

    Raises:
        TypeError, ValueError: as `box_seed_probability`; ``retries`` or ``fallbacks`` without a degree.

    Paper:
        In the released code of Lee, Yi, Shin and Yoon, BBAM, CVPR 2021, arXiv:2103.08907.

    Differences:
        Without a map, the released code appends no mask at all where no degree is enough, and all later masks of the
        image get the class of another instance. Here each box has a mask. What its CRF lets grow out of the box stays
        there, and is cut off here.

    Example:
        >>> mask = torch.zeros(1, 4, 4)
        >>> mask[0, 1:3, 1:3] = 1
        >>> found = refine_box_mask(mask, torch.tensor([1, 1, 7, 7]), (8, 8), 0.2, blur=(1, 0))
        >>> int(found.mask.sum()), found.crf_calls
        (16, 1)
    """
    _check_theta(theta)
    _check_degrees(retries, fallbacks)
    inside = boxes_to_masks(box[None], size, rounding="truncate")[0]
    calls = 0

    def kept(probability: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        scores = torch.stack([1 - probability, probability])
        refined = scores if crf is None else crf(scores)
        check_shape("crf(scores)", refined, scores.shape, "as its scores")
        return (refined[1] > keep) & inside

    if mask is not None:
        inside = inside.to(mask.device)
    area, pixels = int(inside.sum()), inside.numel()
    if mask is None or not bool((mask > 0).any()):
        tries = [inside.double() * degree for degree in fallbacks]
        found, first = inside & False, tries[0]
        for probability in tries:
            found = kept(probability)
            if 5 * int(found.sum()) > area:
                break
        return RefinedBoxMask(found, first, calls)
    first = box_seed_probability(mask, box, size, theta, blur=blur, stretch=stretch)
    found = kept(first)
    if 5 * int(found.sum()) <= area and 10 * area <= pixels:
        certain = found
        for degree in retries:
            found = kept(torch.where(certain, 1.0, inside.double() * degree))
            if 3 * int(found.sum()) > area:
                break
    return RefinedBoxMask(found, first, calls)


class BoxMaskRefiner(nn.Module):
    """Mask of an instance from its attribution map; see :func:`refine_box_mask`.

    Args:
        theta: .85 for strict masks, .2 for loose ones: what lies between them is left open.
        crf: From scores (2, H, W) to probabilities, used where a call does not bring its own.
        keep: Probability above which a pixel belongs to the instance.
        retries: Degrees to try for a mask that came out too small.
        fallbacks: Degrees to try without a map.
        blur: Smallest radius of the blur, and how much larger it is for a box as large as the image.
        stretch: Bring the values to go from 0 to 1.

    Example:
        >>> refine = BoxMaskRefiner(0.85)
        >>> refine(None, torch.tensor([1, 1, 3, 3]), (4, 4)).mask.sum()
        tensor(4)
    """

    def __init__(
        self,
        theta: float,
        crf: Callable[[Tensor], Tensor] | None = None,
        *,
        keep: float = 0.9,
        retries: Sequence[float] = (0.7, 0.8, 0.9, 0.95, 0.96),
        fallbacks: Sequence[float] = (0.7, 0.8, 0.9, 0.95),
        blur: tuple[float, float] = (16.0, 48.0),
        stretch: bool = False,
    ) -> None:
        super().__init__()
        _check_theta(theta)
        _check_degrees(retries, fallbacks)
        self.theta, self.crf, self.keep = theta, crf, keep
        self.retries, self.fallbacks, self.blur, self.stretch = tuple(retries), tuple(fallbacks), blur, stretch

    def forward(
        self,
        mask: Tensor | None,
        box: Tensor,
        size: tuple[int, int],
        crf: Callable[[Tensor], Tensor] | None = None,
    ) -> RefinedBoxMask:
        """Attribution map and box -> mask at ``size``."""
        return refine_box_mask(
            mask,
            box,
            size,
            self.theta,
            crf=self.crf if crf is None else crf,
            keep=self.keep,
            retries=self.retries,
            fallbacks=self.fallbacks,
            blur=self.blur,
            stretch=self.stretch,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"theta={self.theta}, keep={self.keep}, blur={self.blur}, stretch={self.stretch}"


def instances_to_semantic(
    strict: Tensor, loose: Tensor, classes: Tensor, boxes: Tensor, *, ignore_index: int = 255
) -> Tensor:
    """One label map of the strict and loose masks of instances.

    Pixels of one class get it, those of several are left open. Then, from the largest box to the smallest, an instance
    whose box lies inside another one, not the same, overwrites what is there. At last, what is loose but not strict of
    any instance is left open, even inside the strict mask of another.

    Args:
        strict: (n, H, W) bool or numbers, above 0 inside.
        loose: (n, H, W) likewise.
        classes: (n,) integers, 1.. as in a mask.
        boxes: (n, 4) x1, y1, x2, y2 in pixels.
        ignore_index: The value of what is left open.

    Returns:
        (H, W) int64: 0 background, classes, or ``ignore_index``.

    Raises:
        TypeError: ``classes`` is not of integers.
        ValueError: shapes don't match.

    Paper:
        In the released code of Lee, Yi, Shin and Yoon, BBAM, CVPR 2021, arXiv:2103.08907.

    Example:
        >>> strict = torch.tensor([[[1, 1, 0, 0]], [[0, 1, 1, 0]]])
        >>> loose = torch.tensor([[[1, 1, 0, 0]], [[0, 1, 1, 1]]])
        >>> instances_to_semantic(strict, loose, torch.tensor([4, 2]), torch.tensor([[0, 0, 2, 1], [1, 0, 4, 1]]))
        tensor([[  4, 255,   2, 255]])
    """
    check_ndim("strict", strict, 3, "(n, H, W)")
    check_shape("loose", loose, strict.shape, "to match strict")
    check_shape("classes", classes, (len(strict),), "to match strict")
    check_integer("classes", classes)
    check_shape("boxes", boxes, (len(strict), 4), "to match strict")
    sure, maybe = strict > 0, loose > 0
    label = torch.zeros(strict.shape[1:], dtype=torch.int64, device=strict.device)
    if len(strict) == 0:
        return label
    by_class = [(key, sure[classes == key].any(0)) for key in classes.unique().tolist()]
    for key, area in by_class:
        label[area] = key
    label[torch.stack([area for _, area in by_class]).sum(0) > 1] = ignore_index
    near, far = boxes[:, None, :2] >= boxes[:, :2], boxes[:, None, 2:] <= boxes[:, 2:]
    same = (boxes[:, None] == boxes).all(2)
    contained = ((near & far).all(2) & ~same).any(1)
    size = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for index in size.argsort(descending=True, stable=True).tolist():
        if contained[index]:
            label[sure[index]] = int(classes[index])
    label[(maybe & ~sure).any(0)] = ignore_index
    return label


class SegmentOverlaps(NamedTuple):
    """What `segment_overlaps` returns, for m segment proposals.

    Attributes:
        iou: (m,) float64, overlap with the attribution mask.
        in_box: (m,) bool, more than the limit of its area lies in the box.
        in_mask: (m,) bool, more than the limit lies in the attribution mask.
    """

    iou: Tensor
    in_box: Tensor
    in_mask: Tensor


def segment_overlaps(
    mask: Tensor,
    box: Tensor,
    superpixels: Tensor,
    members: Tensor,
    *,
    limit: float = 0.95,
    legacy_index_sum: bool = False,
) -> SegmentOverlaps:
    """How segment proposals, unions of superpixels, lie to a mask and its box.

    Args:
        mask: (H, W) bool or numbers, above 0 inside.
        box: (4,) x1, y1, x2, y2 in pixels; corners are cut to integers.
        superpixels: (H, W) integers 0..S-1.
        members: (m, S) bool, which superpixels belong to each proposal.
        limit: Share of the area above which a proposal counts as inside.
        legacy_index_sum: Add up the row and column numbers of pixels, as the released code does, in place of counting
            them; the overlap then depends on where in the image all is.

    Returns:
        `SegmentOverlaps`.

    Raises:
        TypeError: ``superpixels`` is not of integers.
        ValueError: shapes don't match, or a superpixel that ``members`` does not have.

    Notes:
        Three histograms over the superpixels and one product with the 0/1 matrix of members: the proposals are never
        drawn.

    Example:
        >>> superpixels = torch.tensor([[0, 0, 1, 2]])
        >>> members = torch.tensor([[True, False, False], [True, True, False]])
        >>> segment_overlaps(torch.tensor([[1, 1, 1, 0]]), torch.tensor([0, 0, 3, 1]), superpixels, members).iou
        tensor([0.6667, 1.0000], dtype=torch.float64)
    """
    check_ndim("superpixels", superpixels, 2, "(H, W)")
    check_integer("superpixels", superpixels)
    check_shape("mask", mask, superpixels.shape, "to match superpixels")
    check_shape("box", box, (4,), "x1, y1, x2, y2")
    check_ndim("members", members, 2, "(m, S)")
    count = members.shape[1]
    if not (superpixels.min() >= 0 and superpixels.max() < count):
        raise ValueError(f"superpixels: expected 0..{count - 1} to match members, got up to {int(superpixels.max())}")
    height, width = superpixels.shape
    inside, in_box = mask > 0, boxes_to_masks(box[None], (height, width), rounding="truncate")[0].to(mask.device)
    weight = torch.ones(height, width, dtype=torch.float64, device=mask.device)
    if legacy_index_sum:
        row, column = (torch.arange(side, device=mask.device) for side in (height, width))
        weight = (row[:, None] + column).double()
    flat = superpixels.flatten().long()
    histograms = torch.stack(
        [
            torch.bincount(flat, (weight * region).flatten(), minlength=count)
            for region in (torch.ones_like(inside), in_box, inside)
        ]
    )
    area, boxed, shared = (members.double() @ histograms.T).unbind(1)
    union = area + (weight * inside).sum() - shared
    iou = torch.where(union > 0, shared / union.clamp(min=1e-300), 0.0)
    return SegmentOverlaps(iou, boxed > limit * area, shared > limit * area)


def match_segment_proposals(
    mask: Tensor,
    box: Tensor,
    superpixels: Tensor,
    members: Tensor,
    *,
    limit: float = 0.95,
    min_side: int = 32,
    legacy_index_sum: bool = False,
) -> Tensor:
    """Replace a mask by segment proposals of the image, such as MCG's.

    Of the proposals all of whose superpixels reach into the box, and with more than ``limit`` of their area in it, the
    one that overlaps the mask best is taken; those with more than ``limit`` of their area in the mask are added; what
    lies outside the box is cut off. Small boxes keep their mask, and so does one that no such proposal overlaps.

    Args:
        mask: (H, W) bool or numbers, above 0 inside.
        box: (4,) x1, y1, x2, y2 in pixels.
        superpixels: (H, W) integers 0..S-1.
        members: (m, S) bool, which superpixels belong to each proposal.
        limit: See above.
        min_side: Boxes of a smaller area than a square of this side are left alone.
        legacy_index_sum: See `segment_overlaps`.

    Returns:
        (H, W) bool.

    Raises:
        TypeError, ValueError: as `segment_overlaps`.

    Paper:
        In the released code of Lee, Yi, Shin and Yoon, BBAM, CVPR 2021, arXiv:2103.08907.

    Example:
        >>> superpixels = torch.arange(4).view(1, 4)
        >>> members = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]]).bool()
        >>> match_segment_proposals(
        ...     torch.tensor([[1, 0, 0, 0]]), torch.tensor([0, 0, 3, 1]), superpixels, members, min_side=0
        ... ).int()
        tensor([[1, 1, 0, 0]], dtype=torch.int32)
    """
    found = segment_overlaps(mask, box, superpixels, members, limit=limit, legacy_index_sum=legacy_index_sum)
    in_box = boxes_to_masks(box[None], (mask.shape[0], mask.shape[1]), rounding="truncate")[0].to(mask.device)
    reaches = torch.zeros(members.shape[1], dtype=torch.bool, device=mask.device)
    reaches[superpixels[in_box].long()] = True
    stays = ~(members & ~reaches).any(1)
    fits = stays & found.in_box & (found.iou > 0)
    if (box[2:] - box[:2]).prod() < min_side**2 or not bool(fits.any()):
        return mask > 0
    chosen = stays & found.in_mask
    chosen[torch.where(fits, found.iou, -1.0).argmax()] = True
    return members[chosen].any(0)[superpixels.long()] & in_box


def _check_theta(theta: float) -> None:
    if not 0 <= theta <= 1:
        raise ValueError(f"theta: expected a number in [0, 1], got {theta}")


def _check_degrees(retries: Sequence[float], fallbacks: Sequence[float]) -> None:
    for name, degrees in (("retries", retries), ("fallbacks", fallbacks)):
        if len(degrees) == 0:
            raise ValueError(f"{name}: expected at least one degree, got none")


def _normalized(x: Tensor, stretch: bool) -> Tensor:
    """Less the minimum, divided by the maximum (as released) or by what is then the maximum."""
    low, high = x.min(), x.max()
    span = high - low if stretch else high
    return torch.where(span > 0, (x - low) / torch.where(span > 0, span, 1.0), 0.0)


def _value_at_rank(values: Tensor, rank: int) -> Tensor:
    """The value (scalar) that ``rank`` of the values (n,) come before, from the largest on."""
    place = len(values) - 1 - rank
    if values.device.type != "cpu":
        return values.kthvalue(1 + place).values
    plain = values.detach()  # numpy's selection is faster, since it carries no indices along
    found = torch.from_numpy(np.partition(plain.numpy(), place))[place]
    same = (plain == found).nonzero()  # none if it is not a number
    return values[same[0, 0]] if len(same) else found


def _gaussian_band(side: int, radius: int, keep: Tensor) -> Tensor:
    """(k, k) part, of the rows that are kept, of a Gaussian blur along a side with a mirrored border (reflect-101)."""
    offset = torch.arange(-radius, radius + 1, device=keep.device)
    weight = torch.exp(-offset.double().square() / (2 * max(1, radius) ** 2))
    weight = weight / weight.sum()
    place = keep.nonzero()[:, 0]
    first = int(place[0])
    period = max(1, 2 * (side - 1))
    source = (place[:, None] + offset) % period
    source = torch.minimum(source, period - source) if side > 1 else source * 0
    local = source - first  # what lies outside the box is 0 and needs no weight
    known = (local >= 0) & (local < len(place))
    band = weight.new_zeros(len(place), len(place))
    return band.scatter_add_(1, torch.where(known, local, 0), torch.where(known, weight, 0.0))
