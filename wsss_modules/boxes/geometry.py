"""Boxes as masks, as coordinates of a map, as crops, and how much two of them overlap.

Axes: B images, n m boxes, H W pixels. A box is x1, y1, x2, y2 in pixels, half-open: x1 <= x < x2.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from wsss_modules._checks import check_floating, check_ndim, check_shape

__all__ = ["background_mask_from_boxes", "box_iou", "boxes_to_masks", "crop_boxes", "normalize_boxes"]


def boxes_to_masks(
    boxes: Tensor, size: tuple[int, int], *, rounding: Literal["outwards", "truncate"] = "outwards"
) -> Tensor:
    """The pixels of each box.

    Args:
        boxes: (n, 4) x1, y1, x2, y2 in pixels, half-open; parts outside the image are left out.
        size: (H, W) of the image in pixels.
        rounding: "outwards": every pixel that the box touches; "truncate": corners are cut to integers first, as the
            released codes of the field do.

    Returns:
        (n, H, W) bool. A box without area has no pixel.

    Raises:
        ValueError: a wrong shape, or an unknown ``rounding``.

    Example:
        >>> boxes_to_masks(torch.tensor([[1, 0, 3, 1], [0, 1, 9, 2]]), (2, 4)).int()
        tensor([[[0, 1, 1, 0],
                 [0, 0, 0, 0]],
        <BLANKLINE>
                [[0, 0, 0, 0],
                 [1, 1, 1, 1]]], dtype=torch.int32)
    """
    check_shape("boxes", boxes, (None, 4), "of x1, y1, x2, y2")
    if rounding not in ("outwards", "truncate"):
        raise ValueError(f'rounding: expected "outwards" or "truncate", got {rounding!r}')
    if boxes.is_floating_point():
        boxes = torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], 1) if rounding == "outwards" else boxes.trunc()
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)  # (n, 1) each
    row, column = (torch.arange(side, device=boxes.device) for side in size)
    return ((row >= y1) & (row < y2))[:, :, None] & ((column >= x1) & (column < x2))[:, None, :]


def background_mask_from_boxes(boxes: Tensor, batch: int, size: tuple[int, int]) -> Tensor:
    """Pixels outside all boxes of their image, which are certain background.

    Args:
        boxes: (n, 5) image index, x1, y1, x2, y2 in pixels, half-open, in any order.
        batch: B, the number of images.
        size: (H, W) of the images in pixels.

    Returns:
        (B, 1, H, W) float32: 1 outside all boxes, 0 on every pixel that a box touches.

    Raises:
        ValueError: a wrong shape, or an image index outside 0..B-1.

    Notes:
        The released BANA downloads these masks as files; from boxes they cost one comparison a pixel and box.

    Example:
        >>> background_mask_from_boxes(torch.tensor([[0, 1, 0, 3, 1]]), 2, (1, 4)).flatten(1)
        tensor([[1., 0., 0., 1.],
                [1., 1., 1., 1.]])
    """
    check_boxes(boxes, batch)
    covered = torch.zeros(batch, *size, dtype=torch.int32, device=boxes.device)
    covered.index_add_(0, boxes[:, 0].long(), boxes_to_masks(boxes[:, 1:], size).int())
    return (covered == 0)[:, None].float()


def normalize_boxes(boxes: Tensor, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    r"""Pixels to coordinates in which -1 and 1 are the centres of the first and the last pixel.

    .. math:: x' = x / ((W - 1) / 2) - 1

    which is ``align_corners=True`` of ``torch.nn.functional.grid_sample``. An image of one pixel a side has 0 there.

    Args:
        boxes: (..., 4) x1, y1, x2, y2 in pixels.
        size: (H, W) of the image in pixels.
        dtype: of the result; computed in float64.

    Returns:
        (..., 4) x1, y1, x2, y2.

    Raises:
        ValueError: the last axis is not of 4.

    Example:
        >>> normalize_boxes(torch.tensor([[0, 2, 4, 8]]), (9, 5))
        tensor([[-1.0000, -0.5000,  1.0000,  1.0000]])
    """
    if boxes.shape[-1:] != (4,):
        raise ValueError(f"boxes: expected shape (..., 4), got {tuple(boxes.shape)}")
    height, width = size
    half = torch.tensor([width - 1, height - 1] * 2, dtype=torch.float64, device=boxes.device) / 2
    return torch.where(half > 0, boxes.double() / half.clamp(min=0.5) - 1, 0.0).to(dtype)


def crop_boxes(boxes: Tensor, crop: Tensor, *, legacy_far_edge: bool = False) -> Tensor:
    """Boxes as they lie in a part of the image.

    Args:
        boxes: (n, 4) x1, y1, x2, y2 in pixels of the image, half-open.
        crop: (4,) x1, y1, x2, y2 of the part, in pixels of the image, half-open.
        legacy_far_edge: cut far edges one pixel outside the crop, as BANA's released transform does.

    Returns:
        (n, 4) in pixels of the crop, cut at its edges. A box that lies outside has no area.

    Raises:
        ValueError: a wrong shape.

    Differences:
        The released transform, whose corners are inclusive elsewhere, lets far edges reach the size of the crop plus 1,
        so that coordinates leave the map and zeros are pooled; ``legacy_far_edge`` gives that.

    Example:
        >>> crop_boxes(torch.tensor([[5, 0, 30, 8]]), torch.tensor([10, 2, 20, 12]))
        tensor([[ 0,  0, 10,  6]])
    """
    check_shape("boxes", boxes, (None, 4), "of x1, y1, x2, y2")
    check_shape("crop", crop, (4,), "of x1, y1, x2, y2")
    crop = crop.to(boxes)
    start, extent = crop[:2].repeat(2), (crop[2:] - crop[:2]).repeat(2)
    if legacy_far_edge:
        extent = extent + extent.new_tensor([0, 0, 1, 1])
    return torch.minimum((boxes - start).clamp(min=0), extent)


def box_iou(a: Tensor, b: Tensor, *, truncate: bool = False) -> Tensor:
    """Intersection over union of every pair of boxes.

    Args:
        a: (n, 4) x1, y1, x2, y2, half-open.
        b: (m, 4).
        truncate: cut the corners to integers first, as the released BBAM does.

    Returns:
        (n, m) in [0, 1]: float64 with ``truncate``, else in the dtype of ``a`` (float32 for integers). 0 where both
        boxes lack an area.

    Raises:
        ValueError: a wrong shape.

    Example:
        >>> box_iou(torch.tensor([[0, 0, 2, 2]]), torch.tensor([[1, 0, 3, 2], [0, 0, 2, 2]]))
        tensor([[0.3333, 1.0000]])
    """
    check_shape("a", a, (None, 4), "of x1, y1, x2, y2")
    check_shape("b", b, (None, 4), "of x1, y1, x2, y2")
    dtype = torch.float64 if truncate else torch.promote_types(a.dtype, torch.float32)
    a, b = (x.trunc() if truncate and x.is_floating_point() else x for x in (a, b))
    a, b = a.to(dtype), b.to(dtype)
    near, far = torch.maximum(a[:, None, :2], b[:, :2]), torch.minimum(a[:, None, 2:], b[:, 2:])
    shared = (far - near).clamp(min=0).prod(2)
    areas = [(x[:, 2:] - x[:, :2]).clamp(min=0).prod(1) for x in (a, b)]
    union = areas[0][:, None] + areas[1] - shared
    return torch.where(union > 0, shared / union.clamp(min=torch.finfo(dtype).tiny), 0.0)


def check_boxes(boxes: Tensor, batch: int) -> None:
    """Raise unless ``boxes`` is (n, 5) with image indices below ``batch``; waits for the device."""
    check_shape("boxes", boxes, (None, 5), "of image index, x1, y1, x2, y2")
    index = boxes[:, 0]
    if len(boxes) and not (index.min() >= 0 and index.max() < batch):
        raise ValueError(f"boxes: expected image indices in 0..{batch - 1}, got {index.min():g}..{index.max():g}")


def check_image_boxes(boxes: Tensor, classes: Tensor | None = None) -> None:
    """Raise unless ``boxes`` is (n, 4) and ``classes``, if given, (n,) to match."""
    check_shape("boxes", boxes, (None, 4), "of x1, y1, x2, y2")
    if classes is not None:
        check_shape("classes", classes, (len(boxes),), "to match boxes")


def check_map(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is (B, D, H, W) floating point with at least one pixel."""
    check_ndim(name, x, 4, "(B, D, H, W)")
    check_floating(name, x)
    if 0 in x.shape[2:]:
        raise ValueError(f"{name}: expected at least one pixel, got {tuple(x.shape)}")
