"""Gaussian filtering by the sum over all pairs of points: what the permutohedral lattice approximates.

B batch, C labels, F features, L points in a chunk, N points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wsss_modules._checks import check_floating, check_ndim
from wsss_modules.kernels.backend import Backend, runs_triton

CHUNK_BYTES = 64 * 2**20  # of the (L, N) weights that are held at once


class ExactGaussian:
    """Sums over points weighted by ``exp(-|f_i - f_j|^2 / 2)``, the self term included, symmetrically normalised.

    Args:
        features: (B, N, F) float32 or float64, in units of their deviations. Treated as constant.
        normalize: divide by the square roots of the row sums of both points.
        backend: ``"torch"``, ``"triton"`` (float32), or ``"auto"``: Triton on a GPU.

    Raises:
        TypeError: features of another type.
        ValueError: features of another shape, or none.

    Notes:
        Time grows with N^2, memory with N: for small images, and for GPUs.

    Example:
        >>> import torch
        >>> from wsss_modules import ExactGaussian
        >>> kernel = ExactGaussian(torch.tensor([[[0.0], [0.0], [9.0]]]))
        >>> kernel.filter(torch.tensor([[[1.0], [3.0], [5.0]]])).flatten().round(decimals=3)
        tensor([2., 2., 5.])
    """

    def __init__(self, features: Tensor, *, normalize: bool = True, backend: Backend = "auto") -> None:
        check_ndim("features", features, 3, "(B, N, F)")
        check_floating("features", features)
        if features.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"features: expected float32 or float64, got {features.dtype}")
        if features.numel() == 0:
            raise ValueError(f"features: expected at least one point and one feature, got {tuple(features.shape)}")
        self.batch, self.points, self.dimensions = features.shape
        self.triton = runs_triton(backend, features, float64=False)
        self.features = features.detach().mT.contiguous()  # (B, F, N)
        self.scale: Tensor | None = None
        if normalize:
            self.scale = (self._sums(torch.ones_like(features[:, :, :1])) + 1e-20).rsqrt()  # (B, N, 1)

    def filter(self, values: Tensor) -> Tensor:
        """Filter (B, N, C) ``values``; features of one image (B = 1) serve any batch of values.

        Args:
            values: (B, N, C) floating point. Differentiable.

        Returns:
            (B, N, C) in the dtype of ``values``, computed in that of the features.

        Raises:
            ValueError: the shape does not fit the features.
        """
        check_ndim("values", values, 3, "(B, N, C)")
        check_floating("values", values)
        batch, points, _ = values.shape
        if points != self.points or self.batch not in (1, batch):
            expected = f"({self.batch}, {self.points}, C)"
            raise ValueError(f"values: expected shape {expected} to match the features, got {tuple(values.shape)}")
        rows = values.to(self.features.dtype)
        filtered = self._sums(rows) if self.scale is None else self._sums(rows * self.scale) * self.scale
        return filtered.to(values.dtype)

    def _sums(self, values: Tensor) -> Tensor:
        if self.triton:
            from wsss_modules.kernels.gaussian_messages import gaussian_messages

            return gaussian_messages(values, self.features)
        return _AllPairs.apply(values, self.features)


class _AllPairs(torch.autograd.Function):
    """The sums by blocks of rows of the matrix, which is symmetric: backward is forward."""

    @staticmethod
    def forward(ctx, values: Tensor, features: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.features = features
        points = values.shape[1]
        rows = max(1, CHUNK_BYTES // (points * features.element_size() * len(features)))
        return torch.cat([_weights(features, start, start + rows) @ values for start in range(0, points, rows)], 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return _AllPairs.apply(grad, ctx.features), None


def _weights(features: Tensor, start: int, stop: int) -> Tensor:
    """Rows ``start..stop`` of the matrix, (B, L, N), from squared differences: squares apart would lose digits."""
    distance = torch.zeros((), dtype=features.dtype, device=features.device)
    for feature in features.unbind(1):
        distance = distance + (feature[:, start:stop, None] - feature[:, None]).square_()
    return distance.mul_(-0.5).exp_()
