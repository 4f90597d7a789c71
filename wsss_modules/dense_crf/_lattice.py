"""Permutohedral lattice: Gaussian filtering of scattered points in linear time.

B images, N points per image, d feature dimensions, C channels of values, L = B*N points of the whole batch,
M lattice vertices in use (of all images together).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from wsss_modules._checks import check_floating, check_ndim


class PermutohedralLattice:
    r"""Gaussian filter over N points with d features each, in O(N d^2) time instead of O(N^2).

    Approximates, up to a constant factor,

    .. math:: \mathrm{out}_i = \sum_j \exp(-\tfrac12 \lVert f_i - f_j \rVert^2)\, v_j \quad\text{(self term included)}

    Every point is splat with barycentric weights onto the d+1 vertices of the lattice simplex that encloses it, the
    vertices are blurred with the taps (1/2, 1, 1/2) along the d+1 lattice axes, and the points read the result back
    with the same weights.

    With ``normalize`` (the CRF's choice) the kernel K becomes N^-1/2 K N^-1/2, N = diag(K 1) + 1e-20; the constant
    factor cancels.

    Args:
        features: (B, N, d) float32 or float64, finite, in units of standard deviations. Treated as constant.
        normalize: apply the symmetric normalisation.

    Raises:
        TypeError: ``features`` is neither float32 nor float64.
        ValueError: ``features`` is not (B, N, d), is empty, is not finite, or spans more cells than int64 can number.

    Paper:
        A. Adams, J. Baek, M. A. Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice",
        Eurographics 2010; used for CRFs by P. Kraehenbuehl, V. Koltun, "Efficient Inference in Fully Connected CRFs
        with Gaussian Edge Potentials", NeurIPS 2011 (arXiv:1210.5644).

    Notes:
        The images of a batch share one vertex table (the image index is a digit of the key), so a batch is one sort and
        each filtering a fixed number of calls. The size of the table depends on the data: building synchronises with
        the device and cannot be captured by ``torch.compile``; filtering with a finished lattice can.
        A filtering costs (d+1)(2N + 2M) reads of C numbers. Blurs along different axes do not commute where a
        neighbour is missing, so the filter is not exactly symmetric: its backward runs the axes in reverse, which is
        the exact transpose.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> lattice = PermutohedralLattice(torch.randn(2, 50, 3))
        >>> lattice.filter(torch.rand(2, 50, 4)).shape
        torch.Size([2, 50, 4])
    """

    batch: int
    points: int
    dimensions: int
    _splat_offset: Tensor  # (M + 2,) bags of the splat, one per vertex; the last is empty
    _splat_point: Tensor  # (L (d+1),) rows of the values in the bags
    _splat_weight: Tensor  # (L (d+1),)
    _neighbours: Tensor  # (d + 1, 2, M + 1) vertices one step forth and back along each axis; M = none
    _slice_vertex: Tensor  # (L, d + 1)
    _slice_weight: Tensor  # (L, d + 1)

    def __init__(self, features: Tensor, *, normalize: bool = True) -> None:
        check_ndim("features", features, 3, "(B, N, d)")
        check_floating("features", features)
        if features.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"features: expected float32 or float64, got {features.dtype}")
        if features.numel() == 0:
            raise ValueError(f"features: expected at least one point and one feature, got {tuple(features.shape)}")
        self.batch, self.points, self.dimensions = features.shape
        with torch.no_grad():
            _build_eagerly(self, features)
            if normalize:
                ones = features.new_ones(self.batch * self.points, 1)
                scale = (self._apply(ones, reverse=False) + 1e-20).rsqrt()  # (L, 1)
                self._slice_weight = self._slice_weight * scale
                self._splat_weight = self._splat_weight * scale.squeeze(1)[self._splat_point]

    @property
    def vertices(self) -> int:
        """Number M of lattice vertices in use, over the whole batch."""
        return self._neighbours.shape[-1] - 1

    def filter(self, values: Tensor) -> Tensor:
        """Filter (B, N, C) ``values``; a lattice of one image (B = 1) filters any batch of values.

        Args:
            values: (B, N, C) floating point. Differentiable, any number of times.

        Returns:
            (B, N, C) in the dtype of ``values``, computed in the dtype of the features or of ``values``, the wider.

        Raises:
            ValueError: the shape does not fit the features.
        """
        check_ndim("values", values, 3, "(B, N, C)")
        check_floating("values", values)
        batch, points, _ = values.shape
        if points != self.points or self.batch not in (1, batch):
            expected = f"({self.batch}, {self.points}, C)"
            raise ValueError(f"values: expected shape {expected} to match the features, got {tuple(values.shape)}")
        shared = self.batch == 1
        rows = rearrange(values, "b n c -> n (b c)" if shared else "b n c -> (b n) c")
        out = self.filter_rows(rows.to(torch.promote_types(values.dtype, self._slice_weight.dtype))).to(values.dtype)
        return rearrange(out, "n (b c) -> b n c" if shared else "(b n) c -> b n c", b=batch)

    def filter_rows(self, rows: Tensor) -> Tensor:
        """Filter (L, C) ``rows``, the points of all images one after the other: :meth:`filter` without the layout."""
        return _LatticeFilter.apply(rows, self, False)

    def _apply(self, rows: Tensor, reverse: bool) -> Tensor:
        """Splat, blur and slice (L, C) rows; ``reverse`` gives the transpose."""
        weight = self._splat_weight.to(rows.dtype)
        table = F.embedding_bag(
            self._splat_point,
            rows.contiguous(),
            self._splat_offset,
            mode="sum",
            per_sample_weights=weight,
            include_last_offset=True,
        )  # (M + 1, C), the last row is the empty vertex that stands for missing neighbours
        axes = range(self.dimensions, -1, -1) if reverse else range(self.dimensions + 1)
        for axis in axes:
            forth, back = self._neighbours[axis].unbind(0)
            table = torch.add(table, table.index_select(0, forth).add_(table.index_select(0, back)), alpha=0.5)
        return F.embedding_bag(
            self._slice_vertex, table, mode="sum", per_sample_weights=self._slice_weight.to(rows.dtype)
        )

    def _build(self, features: Tensor) -> None:
        """Number the vertices in the order of their keys; set the tables of splat, blur and slice."""
        key, weight, stride, block = _simplices(features)
        d = self.dimensions
        size, device = key.numel(), key.device
        index = torch.int32 if size < torch.iinfo(torch.int32).max else torch.int64
        ordered, order = key.flatten().sort(stable=True)
        del key
        vertex, number, count = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
        number = number.to(index)
        del ordered
        total = vertex.numel()  # M
        self._slice_vertex = torch.empty(size, dtype=index, device=device).scatter_(0, order, number).view(-1, d + 1)
        self._slice_weight = weight
        self._splat_point = torch.div(order.to(index), d + 1, rounding_mode="floor")
        self._splat_weight = weight.flatten().index_select(0, order)
        offset = torch.zeros(total + 2, dtype=torch.int64, device=device)
        torch.cumsum(count, 0, out=offset[1:-1])
        offset[-1] = size
        self._splat_offset = offset.to(index)

        # A step along axis a adds 1 to every coordinate and takes d + 1 from coordinate a: it leads to the next
        # remainder class, or from the last class to class 0 one cell up.
        last = torch.div(vertex, block, rounding_mode="floor") % (d + 1) == d
        rise = torch.where(last, sum(stride) - d * block, block).to(vertex.dtype)
        self._neighbours = torch.full((d + 1, 2, total + 1), total, dtype=index, device=device)
        own = torch.arange(total, dtype=index, device=device)
        for axis, step in enumerate(stride):
            wanted = vertex + (rise - step)
            found = torch.searchsorted(vertex, wanted).clamp_(max=total - 1)
            hit = vertex.index_select(0, found) == wanted
            self._neighbours[axis, 0, :total] = torch.where(hit, found.to(index), total)
            self._neighbours[axis, 1].scatter_(0, torch.where(hit, found, total), own)
            self._neighbours[axis, 1, total] = total


# A compiled caller gets one clean graph break here, and no graph per image size.
_build_eagerly: Callable[[PermutohedralLattice, Tensor], None] = torch.compiler.disable(PermutohedralLattice._build)


class _LatticeFilter(torch.autograd.Function):
    """The filter as a linear map; its backward is the transposed filter, hence differentiable again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, lattice: PermutohedralLattice, reverse: bool) -> Tensor:
        ctx.lattice, ctx.reverse = lattice, reverse
        return lattice._apply(rows, reverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _LatticeFilter.apply(grads[0], ctx.lattice, not ctx.reverse), None, None


def _simplices(features: Tensor) -> tuple[Tensor, Tensor, list[int], int]:
    """The simplex around each of the (B, N, d) points.

    Returns:
        (L, d + 1) keys of its vertices and their barycentric weights; the strides of the coordinates in a key, and the
        number of keys of a remainder class. From the most significant: image, remainder class, cell.
    """
    batch, points, d = features.shape
    columns = _elevate(features.reshape(batch * points, d))  # d + 1 columns (L,), in units of d + 1; they sum to 0
    cells = [column.floor() for column in columns]
    bounds = torch.stack([torch.stack(torch.aminmax(cell)) for cell in cells]).tolist()
    if not all(math.isfinite(bound) for pair in bounds for bound in pair):
        raise ValueError("features: expected finite values, got NaN or infinity")
    stride, block = _strides(bounds)
    if batch * (d + 1) * block > torch.iinfo(torch.int64).max:
        raise ValueError(
            f"features: expected a span that int64 can number, got {block:.1e} cells; divide by larger deviations"
        )
    # Fewer and shorter digits to sort: int32 wherever it can hold the keys.
    key_dtype = torch.int32 if batch * (d + 1) * block <= torch.iinfo(torch.int32).max else torch.int64

    # The enclosing simplex. With x = cell + fraction, its vertices are cell + 1 on the j coordinates of largest
    # fraction, j = 0..d, each moved along (1, .., 1) to the plane sum = 0 (Freudenthal's triangulation).
    # Ties go to the lower coordinate: vertices of weight 0 count, since they carry the blur.
    fraction = torch.stack([x - cell for x, cell in zip(columns, cells, strict=True)], 1)
    fraction, coordinate = fraction.sort(descending=True, stable=True)
    weight = torch.empty_like(fraction)  # (L, d + 1) barycentric
    weight[:, 0] = 1 - fraction[:, 0] + fraction[:, d]
    weight[:, 1:] = fraction[:, :-1] - fraction[:, 1:]
    deficit = -torch.stack(cells).sum(0).to(key_dtype)  # (L,) number of coordinates to raise, 0..d+1
    running = torch.zeros_like(deficit)
    for cell, (least, _), step in zip(cells, bounds, stride, strict=True):
        running += (cell - (least - 2)).to(key_dtype) * step
    if batch > 1:
        image = torch.arange(batch, device=features.device, dtype=key_dtype)
        running += (image * ((d + 1) * block)).repeat_interleave(points)
    step_of = torch.tensor(stride, device=features.device, dtype=key_dtype)
    steps = step_of.index_select(0, coordinate.flatten()).view_as(coordinate)
    key = torch.empty_like(steps)
    wrap = (d + 1) * block - sum(stride)
    for j in range(d + 1):
        remainder = deficit - j
        key[:, j] = running + remainder * block + ((remainder < 0).to(key_dtype) - (remainder > d).to(key_dtype)) * wrap
        running += steps[:, j]
    return key, weight, stride, block


def _elevate(points: Tensor) -> list[Tensor]:
    """The (L, d) points on the plane sum = 0 of d + 1 coordinates, one column each, in units of the cell width d + 1.

    The scale makes splat, blur and slice together a Gaussian of unit variance (Adams et al., section 3.1). Written as
    sums of columns: a matrix product would drop to TF32 or half precision under the caller's settings.
    """
    d = points.shape[1]
    scaled = [points[:, i] * math.sqrt(2 / 3 / ((i + 1) * (i + 2))) for i in range(d)]
    columns = []
    tail = torch.zeros_like(scaled[0])
    for i in range(d, 0, -1):
        columns.append(tail - i * scaled[i - 1])
        tail = tail + scaled[i - 1]
    return [tail, *reversed(columns)]


def _strides(bounds: list[list[float]]) -> tuple[list[int], int]:
    """Mixed-radix strides of the cell coordinates, and the number of cells in a remainder class.

    Two cells of margin on either side keep the key of a neighbour that does not exist from being that of another
    vertex. The coordinates sum to minus the remainder, so the widest is left out (stride 0).
    """
    spans = [int(high) - int(low) + 5 for low, high in bounds]
    widest = spans.index(max(spans))
    stride, block = [], 1
    for i, span in enumerate(spans):
        stride.append(0 if i == widest else block)
        block *= 1 if i == widest else span
    return stride, block
