"""What a training loss says about pairs: labels from a mask, displacement between the two pixels.

Axis letters: B batch, P offsets, n sources, H W map size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules.affinity.offsets import Border, Offset, Order, check_crop, inside, ordered_offsets, source_box


class AffinityLabels(NamedTuple):
    """Three exclusive groups of pairs, each (B, P, n) bool; see :func:`affinity_labels`.

    A pair with an ignored pixel, or with a partner outside the map, is in none.
    """

    bg_pos: Tensor
    fg_pos: Tensor
    neg: Tensor


def affinity_labels(
    mask: Tensor,
    radius: int,
    *,
    order: Order = "raster",
    border: Border = "released",
    ignore_index: int = 255,
    num_classes: int | None = None,
) -> AffinityLabels:
    """Sort the pairs of a label map into both-background, same-class and different-class.

    With ``a``, ``b`` the labels of source and destination and ``valid`` where neither is ignored:
    ``bg_pos = valid and a = b = 0``, ``fg_pos = valid and a = b ≠ 0``, ``neg = valid and a ≠ b``.
    Only equality counts, so compact indices over the classes of an image do as well.

    Args:
        mask: (B, H, W) integers: 0 background, 1..K classes, ``ignore_index`` unknown.
        radius: radius in pixels.
        order: order of the offsets, ``"raster"`` (PSA) or ``"path"`` (IRN).
        border: ``"released"``: sources of the crop of :func:`pair_index`. ``"full"``: all H·W pixels are sources; pairs
            with a partner outside are in no group.
        ignore_index: label of pixels that say nothing.
        num_classes: if given, labels >= ``num_classes`` are ignored too.

    Returns:
        Three bool tensors (B, P, n).

    Raises:
        TypeError: if ``mask`` is not an integer tensor.
        ValueError: if it does not have three axes, or is too small for the released crop.

    Paper:
        Ahn and Kwak, CVPR 2018, arXiv:1803.10464, section 3.2.2.

    Differences:
        The released IRN ignores every label >= 21 by a hard-coded number, which drops most of COCO; the released PSA
        only 255. ``num_classes=21`` gives IRN's rule, ``None`` (default) PSA's. Both store floats; these are bool.

    Example:
        >>> import torch
        >>> from wsss_modules import affinity_labels
        >>> labels = affinity_labels(torch.tensor([[[0, 0, 1, 1, 255]]]), radius=2, border="full")
        >>> labels.bg_pos[0, 0].int().tolist(), labels.fg_pos[0, 0].int().tolist(), labels.neg[0, 0].int().tolist()
        ([1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0])
    """
    check_ndim("mask", mask, 3, "(B, H, W)")
    check_integer("mask", mask, "did you pass scores?")
    height, width = mask.shape[1:]
    check_crop((height, width), radius, border)
    offsets = ordered_offsets(radius, order)
    valid = mask != ignore_index
    if num_classes is not None:
        valid = valid & (mask < num_classes)
    source, destination = _gather_pairs(mask[:, None], offsets, radius, border)
    source_valid, destination_valid = _gather_pairs(valid[:, None], offsets, radius, border)
    both = (source_valid & destination_valid)[:, 0]  # (B, P, n)
    source, destination = source[:, 0], destination[:, 0]
    same = both & (source == destination)
    return AffinityLabels(same & (source == 0), same & (source != 0), both & (source != destination))


def pair_displacement(
    displacement: Tensor, radius: int, *, order: Order = "path", border: Border = "released"
) -> tuple[Tensor, Tensor]:
    """Difference of the displacement vectors of the two pixels of each pair, and what it should be.

    ``delta[b, :, p, i] = D(source) - D(destination)``. If both pixels point to the same centroid,
    ``source + D(source) = destination + D(destination)``, hence the target ``t_p = offset p = (dy, dx)``.

    Args:
        displacement: (B, 2, H, W) float, the vector (dy, dx) of each pixel, in pixels of this map.
        radius: radius in pixels.
        order: order of the offsets, ``"path"`` (IRN) or ``"raster"``.
        border: as in :func:`affinity_labels`; with ``"full"``, pairs with a partner outside have delta 0.

    Returns:
        ``delta`` (B, 2, P, n) and ``target`` (1, 2, P, 1), both in the dtype of ``displacement``.

    Raises:
        TypeError: if ``displacement`` is not floating point.
        ValueError: if its shape is not (B, 2, H, W), or is too small for the released crop.

    Paper:
        Ahn, Cho and Kwak, CVPR 2019, arXiv:1904.05044, section 4.1.

    Example:
        >>> import torch
        >>> from wsss_modules import pair_displacement
        >>> row = torch.arange(3.0).view(1, 1, 3, 1).expand(1, 1, 3, 3)
        >>> to_centre = torch.cat([1 - row, 1 - row.mT], dim=1)  # every pixel points to (1, 1)
        >>> delta, target = pair_displacement(to_centre, radius=2)
        >>> bool((delta == target).all())
        True
    """
    check_shape("displacement", displacement, (None, 2, None, None), "(B, 2, H, W)")
    check_floating("displacement", displacement)
    size = (displacement.shape[2], displacement.shape[3])
    check_crop(size, radius, border)
    offsets = ordered_offsets(radius, order)
    source, destination = _gather_pairs(displacement, offsets, radius, border)
    delta = source - destination
    if border == "full":
        delta = torch.where(inside(offsets, size, delta.device).flatten(1), delta, 0)
    target = torch.tensor(offsets, dtype=delta.dtype, device=delta.device).view(1, -1, 2, 1)
    return delta, target.transpose(1, 2)


def _gather_pairs(x: Tensor, offsets: tuple[Offset, ...], radius: int, border: Border) -> tuple[Tensor, Tensor]:
    """Values of ``x`` (B, C, H, W) at the sources (B, C, 1, n) and destinations (B, C, P, n); 0 outside."""
    height, width = x.shape[2:]
    rows, columns = source_box((height, width), radius, border)
    margin = radius - 1
    padded = x.new_zeros((*x.shape[:2], height + margin, width + 2 * margin))
    padded[:, :, :height, margin : margin + width] = x
    n_rows, n_columns = rows.stop - rows.start, columns.stop - columns.start

    def moved(dy: int, dx: int) -> Tensor:
        box = padded.narrow(2, rows.start + dy, n_rows).narrow(3, columns.start + margin + dx, n_columns)
        return box.flatten(2)

    return moved(0, 0)[:, :, None], torch.stack([moved(dy, dx) for dy, dx in offsets], dim=2)
