"""Which pixels form a pair: offsets within a radius, their order, and the pixels on the way.

Axis letters: P offsets of the half plane, n sources of the released crop, H W map size.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Offset = tuple[int, int]
Order = Literal["raster", "path"]
Border = Literal["released", "full"]


class PathOffsets(NamedTuple):
    """Offsets sorted by the length of their path, and the paths themselves; see :func:`path_offsets`."""

    offsets: tuple[Offset, ...]
    paths: tuple[tuple[Offset, ...], ...]


class PairIndex(NamedTuple):
    """Flat pixel indices of all pairs: ``source`` (n,) and ``destination`` (P, n), int64; see :func:`pair_index`."""

    source: Tensor
    destination: Tensor


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def affinity_offsets(radius: int) -> tuple[Offset, ...]:
    """Offsets ``(dy, dx)`` of the upper half of an open disc, so that each unordered pair of pixels appears once.

    The half plane is ``dy > 0``, or ``dy = 0`` and ``dx > 0``; the disc is ``dy² + dx² < radius²``. The order is the
    raster order of the released PSA code: the row ``dy = 0`` first, then each row from left to right.

    Args:
        radius: radius of the disc in pixels, at least 2. Radius 5 gives 34 offsets, radius 10 gives 152.

    Returns:
        P pairs of Python integers. They are constants for the shapes of a compiled graph;
        ``torch.tensor(offsets)`` is the (P, 2) form.

    Raises:
        ValueError: if ``radius`` is smaller than 2, which leaves no pair.

    Paper:
        Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly Supervised
        Semantic Segmentation", CVPR 2018, arXiv:1803.10464, section 3.2.

    Example:
        >>> from wsss_modules import affinity_offsets
        >>> affinity_offsets(2)
        ((0, 1), (1, -1), (1, 0), (1, 1))
        >>> len(affinity_offsets(5))
        34
    """
    return _raster_offsets(radius)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def path_offsets(radius: int) -> PathOffsets:
    """The offsets of :func:`affinity_offsets` in IRN's order, with the pixels between the two ends of each pair.

    The path of ``(dy, dx)`` holds the integer points ``(y, x)`` of the bounding box of ``(0, 0)`` and ``(dy, dx)`` that
    are closer than one pixel to the line through both: ``(dy·x - dx·y)² < dy² + dx²``. Both ends belong to it.

    Args:
        radius: radius in pixels, at least 2.

    Returns:
        ``offsets``: the P offsets, stably sorted by the number of points of their path. ``paths``: for each offset
        its points ``(y, x)``, relative to the source, from the destination (largest ``|y| + |x|``) to the source.

    Raises:
        ValueError: if ``radius`` is smaller than 2, which leaves no pair.

    Paper:
        Ahn, Cho and Kwak, "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations", CVPR 2019,
        arXiv:1904.05044, section 4.2.

    Differences:
        This is *not* the order of :func:`affinity_offsets`. Labels and affinities of one loss must share their order:
        pass ``order="path"`` to :func:`pair_index` and :func:`affinity_labels`.

    Example:
        >>> from wsss_modules import path_offsets
        >>> offsets, paths = path_offsets(3)
        >>> offsets[-1], paths[-1]
        ((2, 2), ((2, 2), (1, 2), (2, 1), (1, 1), (0, 1), (1, 0), (0, 0)))
    """
    return _path_offsets(radius)


def pair_index(radius: int, size: tuple[int, int], *, order: Order = "raster") -> PairIndex:
    """Flat indices of the two pixels of every pair in the released crop.

    With ``m = radius - 1`` the sources are rows ``0 .. H-m-1`` and columns ``m .. W-m-1`` in raster order, so that
    every destination ``source + offset`` lies inside the map.

    Args:
        radius: radius in pixels, at least 2.
        size: height and width of the map in pixels.
        order: ``"raster"`` (PSA, :func:`affinity_offsets`) or ``"path"`` (IRN, :func:`path_offsets`).

    Returns:
        ``source`` (n,) and ``destination`` (P, n), int64 on the CPU, with ``n = (H - m)(W - 2m)``.

    Raises:
        ValueError: if the map is too small to hold a source.

    Differences:
        The crop leaves out every pair whose upper pixel lies in the last ``m`` rows or the first or last ``m`` columns.
        Functions with a ``border`` option cover those pairs with ``border="full"``.

    Example:
        >>> from wsss_modules import pair_index
        >>> source, destination = pair_index(2, (3, 4))
        >>> source.tolist()
        [1, 2, 5, 6]
        >>> destination[0].tolist()  # offset (0, 1)
        [2, 3, 6, 7]
    """
    check_crop(size, radius)
    rows, columns = source_box(size, radius, "released")
    index = torch.arange(size[0] * size[1]).view(size)
    source = index[rows, columns].flatten()  # (n,)
    offsets = torch.tensor(ordered_offsets(radius, order))  # (P, 2)
    return PairIndex(source, source + (offsets[:, :1] * size[1] + offsets[:, 1:]))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def ordered_offsets(radius: int, order: Order) -> tuple[Offset, ...]:
    """Offsets within ``radius`` in the order named ``order``."""
    if order not in ("raster", "path"):
        raise ValueError(f"order: expected 'raster' or 'path', got {order!r}")
    return _raster_offsets(radius) if order == "raster" else _path_offsets(radius).offsets


def source_box(size: tuple[int, int], radius: int, border: Border) -> tuple[slice, slice]:
    """Rows and columns of the sources of pairs; empty slices where the map is too small for the released crop."""
    height, width = size
    if is_full(border):
        return slice(0, height), slice(0, width)
    margin = radius - 1
    return slice(0, max(height - margin, 0)), slice(margin, max(width - margin, margin))


def is_full(border: Border) -> bool:
    """Whether all pixels are sources; raise ``ValueError`` for an unknown word."""
    if border not in ("released", "full"):
        raise ValueError(f"border: expected 'released' or 'full', got {border!r}")
    return border == "full"


def check_crop(size: tuple[int, int], radius: int, border: Border = "released") -> None:
    """Raise ``ValueError`` unless a map of ``size`` holds at least one source."""
    if is_full(border):
        return
    if size[0] < radius or size[1] < 2 * radius - 1:
        least = f"{radius} x {2 * radius - 1} pixels for radius {radius}"
        raise ValueError(f"size: expected at least {least}, got {size[0]} x {size[1]}; border='full' has no such limit")


def inside(offsets: tuple[Offset, ...], size: tuple[int, int], device: torch.device) -> Tensor:
    """Where the partner of a pixel lies inside the map: bool (P, H, W)."""
    height, width = size
    offset = torch.tensor(offsets, dtype=torch.int64, device=device).view(-1, 2)  # (P, 2)
    row = torch.arange(height, device=device) + offset[:, :1]  # (P, H)
    column = torch.arange(width, device=device) + offset[:, 1:]  # (P, W)
    return (row < height)[:, :, None] & ((column >= 0) & (column < width))[:, None, :]


@cache
def _raster_offsets(radius: int) -> tuple[Offset, ...]:
    if radius < 2:
        raise ValueError(f"radius: expected an integer of at least 2, got {radius}; radius 1 holds no pair")
    rows = [[(0, dx) for dx in range(1, radius)]]
    rows += [[(dy, dx) for dx in range(1 - radius, radius)] for dy in range(1, radius)]
    return tuple((dy, dx) for row in rows for dy, dx in row if dy * dy + dx * dx < radius * radius)


@cache
def _path_offsets(radius: int) -> PathOffsets:
    pairs = sorted(((offset, _path(offset)) for offset in _raster_offsets(radius)), key=lambda pair: len(pair[1]))
    return PathOffsets(tuple(offset for offset, _ in pairs), tuple(path for _, path in pairs))


def _path(offset: Offset) -> tuple[Offset, ...]:
    dy, dx = offset
    box = [(y, x) for y in range(dy + 1) for x in range(min(0, dx), max(0, dx) + 1)]
    points = [(y, x) for y, x in box if (dy * x - dx * y) ** 2 < dy * dy + dx * dx]
    return tuple(sorted(points, key=lambda point: -abs(point[0]) - abs(point[1])))
