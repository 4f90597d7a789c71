"""The proposals that explain an object together (BBAM).

Axes: P proposals, C classes with the background first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wsss_modules._checks import check_ndim, check_shape
from wsss_modules.boxes.geometry import box_iou

__all__ = ["PositiveProposals", "jitter_boxes", "select_positive_proposals"]


def jitter_boxes(
    box: Tensor,
    size: tuple[int, int],
    *,
    count: int = 1000,
    amplitude: float = 0.3,
    uniform: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Proposals around a box: each side is moved by a random share of the width or height.

    Args:
        box: (4,) x1, y1, x2, y2 in pixels.
        size: (H, W) of the image in pixels, at whose edges proposals are cut.
        count: P, proposals of a box.
        amplitude: Largest share.
        uniform: (P, 4) shares in [-amplitude, amplitude] of x1, y1, x2, y2, drawn elsewhere.
        generator: Source of the shares otherwise.

    Returns:
        (P, 4) in the dtype of ``uniform``, else float32.

    Raises:
        ValueError: a wrong shape.

    Paper:
        In the released code of Lee, Yi, Shin and Yoon, BBAM, CVPR 2021, arXiv:2103.08907.

    Differences:
        There nothing seeds the draws.

    Example:
        >>> jitter_boxes(torch.tensor([10.0, 10, 30, 20]), (25, 40), uniform=torch.tensor([[-0.1, 0.0, 0.2, 1.0]]))
        tensor([[ 8., 10., 34., 25.]])
    """
    check_shape("box", box, (4,), "x1, y1, x2, y2")
    if uniform is None:
        uniform = amplitude * (2 * torch.rand(count, 4, generator=generator) - 1).to(box.device)
    check_shape("uniform", uniform, (None, 4), "of shares of x1, y1, x2, y2")
    box = box.to(uniform)
    moved = box + uniform * (box[2:] - box[:2]).repeat(2)
    limit = moved.new_tensor([size[1], size[0]])
    return torch.cat([moved[:, :2].clamp(min=0), torch.minimum(moved[:, 2:], limit)], 1)


class PositiveProposals(NamedTuple):
    """What `select_positive_proposals` returns.

    Attributes:
        chosen: (n,) int64 places of the chosen proposals, ascending; may be empty.
        threshold: The overlap that they exceed.
    """

    chosen: Tensor
    threshold: float


def select_positive_proposals(
    logits: Tensor,
    decoded_boxes: Tensor,
    target_box: Tensor,
    target_class: int | Tensor,
    *,
    thresholds: Sequence[float] = (0.9, 0.85, 0.8),
    enough: int = 100,
    cap: int = 100,
) -> PositiveProposals:
    """The proposals from which the detector finds the object: right class, and a box that overlaps it enough.

    The first threshold that more than ``enough`` proposals exceed is taken, else the last one.

    Args:
        logits: (P, C) class logits.
        decoded_boxes: (P, 4 C), or (P, C, 4), x1, y1, x2, y2 in pixels for each class.
        target_box: (4,) the box of the object.
        target_class: Its class, 1..C-1.
        thresholds: Overlaps to try, falling.
        enough: See above.
        cap: Keep the first so many.

    Returns:
        `PositiveProposals`.

    Raises:
        ValueError: shapes don't match, or no thresholds.

    Paper:
        In the released code of Lee, Yi, Shin and Yoon, BBAM, CVPR 2021, arXiv:2103.08907.

    Notes:
        One vectorised overlap (`box_iou` with integer corners, as released) where that code reads scalars off the
        device in a loop over 1000 proposals, up to three times.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0], [3.0, 1.0], [0.0, 1.0]])
        >>> boxes = torch.tensor([[[0, 0, 1, 1], [0, 0, 10, 10]]] * 2 + [[[0, 0, 1, 1], [5, 5, 10, 10]]])
        >>> select_positive_proposals(logits, boxes, torch.tensor([0, 0, 10, 10]), 1, enough=1)
        PositiveProposals(chosen=tensor([0]), threshold=0.8)
    """
    check_ndim("logits", logits, 2, "(P, C)")
    boxes = decoded_boxes.flatten(1)
    check_shape("decoded_boxes", boxes, (len(logits), 4 * logits.shape[1]), "to match logits")
    check_shape("target_box", target_box, (4,), "x1, y1, x2, y2")
    if len(thresholds) == 0:
        raise ValueError("thresholds: expected at least one, got none")
    found = logits.argmax(1)
    own = boxes.unflatten(1, (-1, 4))[torch.arange(len(logits), device=boxes.device), found]
    overlap = box_iou(own, target_box[None], truncate=True)[:, 0]
    right = found == target_class
    for threshold in thresholds:
        index = (right & (overlap > threshold)).nonzero()[:, 0]
        if len(index) > enough:
            break
    return PositiveProposals(index[:cap], threshold)
