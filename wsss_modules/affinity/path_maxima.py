"""Maximum of a map along the path of every pair, by reusing the maxima of shorter paths.

Axis letters: B batch, P offsets in path order, H W map size, n sources.

The path of an offset is covered by a few shifted shorter paths (found greedily once per radius), so that its maximum is
the maximum of a few maps that are known already: 173 elementwise maxima instead of 1,982 for radius 10, with the same
bits as a result. Maxima are kept per offset as maps of all positions of the bounding box of the path, indexed by its
upper left corner: (B, H - dy, W - |dx|).
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from wsss_modules.affinity.offsets import Offset, path_offsets, source_box

Box = tuple[slice, slice]


class Piece(NamedTuple):
    """Part of a path: the path of offset number ``path`` (-1: a single pixel) moved by ``(down, right)``."""

    path: int
    down: int
    right: int


CHUNK_BYTES = 128 * 2**20  # for the path maxima of images taken together; one image of 128 x 128 has 10 MB at radius 10
SERIAL = 32767  # numbers up to which torch runs an operation on one thread of a CPU


def chunk_size(n_maps: int, x: Tensor) -> int:
    """Number of images of ``x`` (B, ..., H, W) to take together, at least one, with ``n_maps`` copies in memory.

    On a CPU, so few that each of the thousands of small operations stays on one thread, which is no slower and, on a
    busy machine, doesn't wait for the other threads.
    """
    numbers = max(1, math.prod(x.shape[1:]))
    images = CHUNK_BYTES // (n_maps * numbers * x.element_size())
    return max(1, min(images, SERIAL // numbers) if x.device.type == "cpu" else images)


def corner_box(offset: Offset, size: tuple[int, int], radius: int, full: bool) -> tuple[Box, Box]:
    """Where sources lie in a (H, W) map, and in the map of upper left corners of ``offset``."""
    dy, dx = offset
    rows, columns = source_box(size, radius, "full" if full else "released")
    top, bottom = rows.start, min(rows.stop, size[0] - dy)
    left, right = max(columns.start, -dx), min(columns.stop, size[1] - max(dx, 0))
    bottom, right = max(bottom, top), max(right, left)
    shift = min(dx, 0)  # the corner lies left of the source when the path runs to the left
    return (slice(top, bottom), slice(left, right)), (slice(top, bottom), slice(left + shift, right + shift))


def path_maxima_maps(edge: Tensor, radius: int) -> list[Tensor]:
    """Maxima of ``edge`` (B, H, W) for each offset in path order, by upper left corner of the path."""
    maxima: list[Tensor] = []
    for offset, pieces in zip(path_offsets(radius).offsets, path_cover(radius), strict=True):
        parts = [_part(edge, maxima, piece, offset) for piece in pieces]
        largest = parts[0]
        for part in parts[1:]:
            largest = torch.maximum(largest, part)
        maxima.append(largest)
    return maxima


def path_maxima_grad(edge: Tensor, maxima: list[Tensor], grads: list[Tensor], radius: int) -> Tensor:
    """Gradient with respect to ``edge``; each path hands its gradient to one pixel that attains the maximum.

    ``grads`` is overwritten.
    """
    grad_edge = torch.zeros_like(edge)
    offsets, covers = path_offsets(radius).offsets, path_cover(radius)
    for p in range(len(offsets) - 1, -1, -1):
        rest = grads[p]
        for piece in covers[p][:-1]:
            part = _part(edge, maxima, piece, offsets[p])
            share = torch.eq(part, maxima[p], out=torch.empty_like(rest)).mul_(rest)  # all or nothing
            _part(grad_edge, grads, piece, offsets[p]).add_(share)
            rest = rest - share
        _part(grad_edge, grads, covers[p][-1], offsets[p]).add_(rest)
    return grad_edge


def _part(edge: Tensor, maps: list[Tensor], piece: Piece, offset: Offset) -> Tensor:
    height, width = max(edge.shape[1] - offset[0], 0), max(edge.shape[2] - abs(offset[1]), 0)
    source = edge if piece.path < 0 else maps[piece.path]
    return source[:, piece.down : piece.down + height, piece.right : piece.right + width]


@cache
def path_cover(radius: int) -> tuple[tuple[Piece, ...], ...]:
    """For each offset in path order, the pieces whose union is its path: other paths, moved, and single pixels."""
    offsets, paths = path_offsets(radius)
    row = 2 * radius  # sets of points as bits of an integer, `row` bits per image row
    bits = [sum(1 << (y * row + x - min(0, dx)) for y, x in path) for (_, dx), path in zip(offsets, paths, strict=True)]
    covers = []
    for p, (dy, dx) in enumerate(offsets):
        candidates = [(Piece(-1, y, x - min(0, dx)), 1 << (y * row + x - min(0, dx))) for y, x in paths[p]]
        for q in range(p):
            spare_rows, spare_columns = dy - offsets[q][0], abs(dx) - abs(offsets[q][1])
            places = [(a, b) for a in range(spare_rows + 1) for b in range(spare_columns + 1)]
            moved = [(Piece(q, a, b), bits[q] << (a * row + b)) for a, b in places]
            candidates += [(piece, points) for piece, points in moved if points | bits[p] == bits[p]]
        left, pieces = bits[p], []
        while left:
            piece, points = max(candidates, key=lambda candidate: (candidate[1] & left).bit_count())
            pieces.append(piece)
            left &= ~points
        covers.append(tuple(pieces))
    return tuple(covers)


@torch.library.custom_op(
    "wsss::path_maxima",
    mutates_args=(),
    schema="(Tensor edge, int radius, bool full) -> Tensor",
)
def path_maxima(edge: Tensor, radius: int, full: bool) -> Tensor:
    """Maximum of ``edge`` (B, H, W) along each path: (B, P, h, w) over the sources; 1 where the partner is outside."""
    batch, height, width = edge.shape
    offsets = path_offsets(radius).offsets
    rows, columns = source_box((height, width), radius, "full" if full else "released")
    result = edge.new_ones((batch, len(offsets), rows.stop - rows.start, columns.stop - columns.start))
    step = chunk_size(len(offsets), edge)
    for start in range(0, batch, step):
        for p, largest in enumerate(path_maxima_maps(edge[start : start + step], radius)):
            source, corner = corner_box(offsets[p], (height, width), radius, full)
            _view(result[start : start + step, p], source, rows, columns).copy_(largest[:, corner[0], corner[1]])
    return result


@path_maxima.register_fake
def _(edge: Tensor, radius: int, full: bool) -> Tensor:
    rows, columns = source_box((edge.shape[1], edge.shape[2]), radius, "full" if full else "released")
    n_offsets = len(path_offsets(radius).offsets)
    return edge.new_empty((edge.shape[0], n_offsets, rows.stop - rows.start, columns.stop - columns.start))


@torch.library.custom_op(
    "wsss::path_maxima_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor edge, int radius, bool full) -> Tensor",
)
def path_maxima_backward(grad: Tensor, edge: Tensor, radius: int, full: bool) -> Tensor:
    """Gradient of :func:`path_maxima` with respect to ``edge``; the maxima are computed again."""
    batch, height, width = edge.shape
    offsets = path_offsets(radius).offsets
    rows, columns = source_box((height, width), radius, "full" if full else "released")
    result = torch.empty_like(edge)
    step = chunk_size(2 * len(offsets), edge)
    for start in range(0, batch, step):
        part = slice(start, start + step)
        maxima = path_maxima_maps(edge[part], radius)
        grads = [torch.zeros_like(largest) for largest in maxima]
        for p, into in enumerate(grads):
            source, corner = corner_box(offsets[p], (height, width), radius, full)
            into[:, corner[0], corner[1]] = _view(grad[part, p], source, rows, columns)
        result[part] = path_maxima_grad(edge[part], maxima, grads, radius)
    return result


@path_maxima_backward.register_fake
def _(grad: Tensor, edge: Tensor, radius: int, full: bool) -> Tensor:
    return torch.empty_like(edge)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    edge, ctx.radius, ctx.full = inputs
    ctx.save_for_backward(edge)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    (edge,) = ctx.saved_tensors
    return path_maxima_backward(grad, edge, ctx.radius, ctx.full), None, None


path_maxima.register_autograd(_backward, setup_context=_setup)


def _view(x: Tensor, source: Box, rows: slice, columns: slice) -> Tensor:
    """The box ``source`` of map coordinates in ``x`` (B, h, w), whose first source is (rows.start, columns.start)."""
    return x[
        :,
        source[0].start - rows.start : source[0].stop - rows.start,
        source[1].start - columns.start : source[1].stop - columns.start,
    ]
