"""A symmetric affinity between near pixels, stored as half a stencil.

Axis letters: B batch, C channels, P offsets of the half plane, H W map size, N = H*W, n pairs per offset.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules.affinity.offsets import Border, Offset, Order, check_crop, inside, ordered_offsets, source_box
from wsss_modules.kernels.backend import Backend, runs_triton


@dataclass(eq=False)
class LocalAffinity:
    """Symmetric affinity matrix between pixels within a radius, with unit diagonal, never stored as N x N.

    ``values[b, p, y, x]`` is the affinity between pixel ``(y, x)`` and its partner ``(y, x) + offsets[p]``. Each
    unordered pair is stored once; entries whose partner lies outside the map are 0. All other entries of the matrix
    are 0, those of the diagonal 1.

    Args:
        offsets: P pairs ``(dy, dx)`` of Python integers, one of ``(dy, dx)`` and ``(-dy, -dx)``, never ``(0, 0)``.
        values: (B, P, H, W) float in [0, 1].

    Raises:
        ValueError: if ``values`` does not have four axes, or not one map for each offset.
        TypeError: if ``values`` is not floating point.

    Notes:
        Memory is ``P·N`` numbers per image: 2.2 MB for radius 5 on 128 x 128, where the matrix takes 1.07 GB.
        All methods are differentiable and work inside ``torch.compile``.

    Example:
        >>> import torch
        >>> from wsss_modules import LocalAffinity
        >>> right = torch.tensor([[0.5, 0.0], [0.0, 0.0]])
        >>> below = torch.tensor([[0.25, 0.0], [0.0, 0.0]])
        >>> affinity = LocalAffinity(((0, 1), (1, 0)), torch.stack([right, below])[None])
        >>> affinity.dense()[0]
        tensor([[1.0000, 0.5000, 0.2500, 0.0000],
                [0.5000, 1.0000, 0.0000, 0.0000],
                [0.2500, 0.0000, 1.0000, 0.0000],
                [0.0000, 0.0000, 0.0000, 1.0000]])
    """

    offsets: tuple[Offset, ...]
    values: Tensor

    def __post_init__(self) -> None:
        check_ndim("values", self.values, 4, "(B, P, H, W)")
        check_floating("values", self.values)
        if self.values.shape[1] != len(self.offsets):
            raise ValueError(
                f"values: expected {len(self.offsets)} maps, one for each offset, got {self.values.shape[1]}"
            )

    @classmethod
    def from_pairs(
        cls,
        pairs: Tensor,
        radius: int,
        size: tuple[int, int],
        *,
        order: Order = "raster",
        border: Border = "released",
    ) -> LocalAffinity:
        """Build from affinities in pair form.

        Args:
            pairs: (B, P, n) float in [0, 1]; row p belongs to offset p, column i to source i.
            radius: radius in pixels that the pairs were made with.
            size: height and width of the map in pixels.
            order: order of the offsets, ``"raster"`` (PSA) or ``"path"`` (IRN).
            border: ``"released"``: the sources are the crop of :func:`pair_index`; pairs that the crop leaves out get
                affinity 0, as in the released PSA code. ``"full"``: every pixel is a source, ``n = H·W``; entries whose
                partner lies outside the map are ignored.

        Raises:
            ValueError: if the shape of ``pairs`` does not fit, or the map is too small for the released crop.
        """
        check_crop(size, radius, border)
        offsets = ordered_offsets(radius, order)
        rows, columns = source_box(size, radius, border)
        box = (rows.stop - rows.start, columns.stop - columns.start)
        check_shape("pairs", pairs, (None, len(offsets), box[0] * box[1]), f"(B, P, n) of a {size[0]} x {size[1]} map")
        values = pairs.unflatten(2, box)  # (B, P, h, w)
        if border == "full":
            values = torch.where(inside(offsets, size, pairs.device), values, 0)
        else:
            values = F.pad(values, (columns.start, size[1] - columns.stop, rows.start, size[0] - rows.stop))
        return cls(offsets, values)

    @classmethod
    def from_dense(
        cls,
        matrix: Tensor,
        size: tuple[int, int],
        *,
        radius: int | None = None,
        offsets: tuple[Offset, ...] | None = None,
    ) -> LocalAffinity:
        """Read a symmetric matrix with unit diagonal, for comparison with code that stores N x N.

        Args:
            matrix: (B, N, N) float, symmetric, with unit diagonal; the upper triangle is read.
            size: height and width of the map in pixels, ``N = H·W``.
            radius: keep the pairs closer than this; ``None`` keeps all, which makes P about ``2N``.
            offsets: keep the pairs at these offsets of the upper half plane instead, e.g. of :func:`window_offsets`.

        Raises:
            ValueError: if ``matrix`` does not have ``H·W`` rows and columns.
        """
        height, width = size
        n_pixels = height * width
        check_shape("matrix", matrix, (None, n_pixels, n_pixels), f"for a {height} x {width} map")
        if offsets is None and radius is None:
            plane = [(dy, dx) for dy in range(height) for dx in range(1 - width, width) if dy > 0 or dx > 0]
            offsets = tuple(plane)
        elif offsets is None:
            assert radius is not None  # for mypy
            offsets = ordered_offsets(radius, "raster")
        valid = inside(offsets, size, matrix.device)  # (P, H, W)
        source = torch.arange(n_pixels, device=matrix.device).view(size)
        step = _flat_steps(offsets, width, matrix.device)
        partner = torch.where(valid, source + step, source)
        return cls(offsets, torch.where(valid, matrix[:, source, partner], 0))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the map in pixels."""
        return self.values.shape[2], self.values.shape[3]

    def to(self, *args: torch.device | torch.dtype | str) -> LocalAffinity:
        """Move or convert the values, with the arguments of ``torch.Tensor.to``."""
        return LocalAffinity(self.offsets, self.values.to(*args))  # type: ignore[call-overload]

    def pairs(self, radius: int, *, border: Border = "released") -> Tensor:
        """Affinities in pair form (B, P, n): the inverse of :meth:`from_pairs`, in the order of ``offsets``."""
        check_crop(self.size, radius, border)
        rows, columns = source_box(self.size, radius, border)
        return self.values[:, :, rows, columns].flatten(2)

    def power(self, beta: float) -> LocalAffinity:
        """Raise every entry of the matrix to the power ``beta`` >= 0.

        With ``beta = 0`` each pair inside the map gets affinity 1. Zeros have gradient 0 for every ``beta`` but 1.

        Raises:
            ValueError: if ``beta`` is negative.
        """
        if beta < 0:
            raise ValueError(f"beta: expected a number >= 0, got {beta}")
        if beta == 1:
            return self
        valid = inside(self.offsets, self.size, self.values.device)
        if beta == 0:
            return LocalAffinity(self.offsets, torch.where(valid, self.values.pow(0), 0))
        positive = self.values > 0  # selected first: the slope of v**beta at 0 is infinite for beta < 1
        powered = torch.where(positive, self.values, 1).pow(beta)
        return LocalAffinity(self.offsets, torch.where(positive, powered, 0))

    def matvec(self, x: Tensor, *, backend: Backend = "auto") -> Tensor:
        """Product with maps ``x`` (B, C, H, W): each pixel gets the weighted sum of its neighbours and itself.

        ``backend`` is ``"torch"``, ``"triton"``, or ``"auto"``: Triton on a GPU.
        """
        check_shape("x", x, (None, None, *self.size), "(B, C, H, W), the map of the affinity")
        if runs_triton(backend, x, self.values):
            from wsss_modules.kernels.stencil_walk import stencil_product

            dtype, batch = torch.promote_types(x.dtype, self.values.dtype), max(len(x), len(self.values))
            maps, values = (part.to(dtype).expand(batch, -1, -1, -1) for part in (x, self.values))
            return stencil_product(maps, values, [step for offset in self.offsets for step in offset])
        total = x
        for p, offset in enumerate(self.offsets):
            weight = self.values[:, p : p + 1]
            if abs(offset[0]) < self.size[0] and abs(offset[1]) < self.size[1]:
                total = total + weight * _shift(x, offset) + _shift(weight * x, (-offset[0], -offset[1]))
        return total

    def degree(self) -> Tensor:
        """Row sums of the matrix, diagonal included: (B, H, W), at least 1."""
        return self.matvec(torch.ones_like(self.values[:, :1]))[:, 0]

    def transition(self, beta: float = 1.0) -> Transition:
        """The random walk over the ``beta``-th power of the affinities; see :class:`Transition`."""
        sharp = self.power(beta)
        return Transition(sharp, sharp.degree())

    def dense(self) -> Tensor:
        """The matrix itself, (B, N, N). For tests and tiny maps only: memory grows with the square of the pixels."""
        batch, _, height, width = self.values.shape
        n_pixels = height * width
        valid = inside(self.offsets, self.size, self.values.device)  # (P, H, W)
        source = torch.arange(n_pixels, device=self.values.device).view(height, width).expand_as(valid)[valid]
        step = _flat_steps(self.offsets, width, self.values.device)
        partner = source + step.expand_as(valid)[valid]
        matrix = torch.eye(n_pixels, device=self.values.device, dtype=self.values.dtype).repeat(batch, 1, 1)
        matrix[:, source, partner] = self.values[:, valid]
        matrix[:, partner, source] = self.values[:, valid]
        return matrix


@dataclass(eq=False)
class Transition:
    r"""One step of a random walk: every pixel becomes the weighted average of its neighbours and itself.

    .. math:: (T x)_j = \sum_i A_{ij} x_i / D_j, \qquad D_j = \sum_i A_{ij}

    Constants are preserved and results stay within the range of ``x``.

    Args:
        affinity: the symmetric matrix A.
        degree: (B, H, W), its row sums D.

    Example:
        >>> import torch
        >>> from wsss_modules import LocalAffinity
        >>> affinity = LocalAffinity(((0, 1),), torch.tensor([[[[1.0, 0.0]]]]))
        >>> affinity.transition(beta=8).matvec(torch.tensor([[[[0.0, 1.0]]]]))
        tensor([[[[0.5000, 0.5000]]]])
    """

    affinity: LocalAffinity
    degree: Tensor

    def matvec(self, x: Tensor) -> Tensor:
        """``T x`` for maps ``x`` (B, C, H, W), in increment form: ``x + (A x - D x) / D``."""
        degree = self.degree[:, None]  # (B, 1, H, W)
        return x + (self.affinity.matvec(x) - degree * x) / degree

    def dense(self) -> Tensor:
        """The row-stochastic matrix T, (B, N, N). For tests and tiny maps only."""
        return self.affinity.dense() / self.degree.flatten(1)[:, :, None]


def _shift(x: Tensor, offset: Offset) -> Tensor:
    """Value at ``position + offset``, 0 where that lies outside."""
    dy, dx = offset
    return F.pad(x, (-dx, dx, -dy, dy))


def _flat_steps(offsets: tuple[Offset, ...], width: int, device: torch.device) -> Tensor:
    """Distance in memory from a pixel to each partner: (P, 1, 1)."""
    steps = [dy * width + dx for dy, dx in offsets]
    return torch.tensor(steps, dtype=torch.int64, device=device).view(-1, 1, 1)
