"""Each pixel reads the maps of the pixels that look like it (SEAM), without the N x N matrix.

Axes: B images, C channels of the maps, E channels of the keys, H W cells, N = H W, n the cells of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules.kernels.backend import Backend, runs_triton
from wsss_modules.refinement._sides import resized


def pixel_correlation(
    maps: Tensor, keys: Tensor, *, eps: float = 1e-5, chunk: int = 256, backend: Backend = "auto"
) -> Tensor:
    r"""Average the maps over all pixels of the image, weighted by how alike two pixels are.

    .. math::
        y_j = \frac{\sum_i a_{ij} x_i}{\sum_i a_{ij} + \epsilon}, \qquad
        a_{ij} = r\Big( \frac{k_i}{\|k_i\| + \epsilon} \cdot \frac{k_j}{\|k_j\| + \epsilon} \Big)

    with r = ReLU, x the ``maps`` and k the ``keys``.

    Args:
        maps: (B, C, H, W) floating point, any channels: class maps (SEAM, PPC), features or scores (L2G).
        keys: (B, E, H, W) floating point, on the same grid.
        eps: Added to the lengths of the keys and to the sums of the weights.
        chunk: Pixels whose weights are held at once. It changes time and memory, and the result by rounding only.
        backend: ``"torch"``, ``"triton"`` (up to 32 bits), or ``"auto"``: Triton on a GPU.

    Returns:
        (B, C, H, W) in the dtype of ``maps``, between the extremes of ``maps`` and 0; zeros where a key is zero.

    Raises:
        TypeError: ``maps`` or ``keys`` is not floating point.
        ValueError: a wrong shape, or a ``chunk`` below 1.

    Paper:
        Wang, Zhang, Kan, Shan and Chen, Self-supervised Equivariant Attention Mechanism for Weakly Supervised Semantic
        Segmentation, CVPR 2020, arXiv:2004.04581, section 3.4.

    Notes:
        Gradients reach both inputs. Numerators and sums of weights come from one product, over blocks of the symmetric
        matrix of weights, of which one half is computed; backward computes them again. Memory O(B N chunk) in place of
        several N x N matrices an image, and half of the products. The Triton kernels keep nothing of the matrix
        (:mod:`wsss_modules.kernels.relu_correlation`). Computed in float32 for half precision, also under autocast. No
        second derivative. Compiles with ``fullgraph=True``; the loop over chunks is unrolled.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> keys = torch.tensor([[[[1.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]]])  # two alike, and another
        >>> pixel_correlation(torch.tensor([[[[0.0, 1.0, 1.0]]]]), keys)
        tensor([[[[0.5000, 0.5000, 1.0000]]]])
    """
    check_ndim("maps", maps, 4, "(B, C, H, W)")
    check_floating("maps", maps)
    check_floating("keys", keys)
    check_shape("keys", keys, (maps.shape[0], None, *maps.shape[2:]), "to match maps")
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    dtype = torch.promote_types(maps.dtype, torch.float32)
    with torch.autocast(maps.device.type, enabled=False):
        k = rearrange(keys.to(dtype), "b e h w -> b e (h w)")
        k = k / (_length(k) + eps)
        x = rearrange(maps.to(dtype), "b c h w -> b c (h w)")
        if runs_triton(backend, x, k, float64=False):
            from wsss_modules.kernels.relu_correlation import relu_correlation

            sums, totals = relu_correlation(x, k)
            y = sums / (totals[:, None] + eps)  # (B, C, N)
        else:
            y = _RelatedMean.apply(x, k, eps, chunk)
    return y.unflatten(2, maps.shape[2:]).to(maps.dtype)


class PixelCorrelationModule(nn.Module):
    """Pixel correlation of maps with keys made by a 1 x 1 convolution; see :func:`pixel_correlation`.

    Args:
        in_channels: D, channels of the features that the keys are made of.
        embed: E, channels of the keys.
        eps: see :func:`pixel_correlation`.
        chunk: see :func:`pixel_correlation`.
        backend: see :func:`pixel_correlation`.

    Shapes:
        cam (B, C, h, w), features (B, D, H, W) -> (B, C, H, W). A cam of another size is resized first, bilinearly with
        aligned corners.

    Raises:
        ValueError: features without D channels.

    Paper:
        Wang et al., CVPR 2020, arXiv:2004.04581.

    Notes:
        Weights start Xavier uniform with a gain of 4, as released.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> refine = PixelCorrelationModule(16, embed=8)
        >>> refine(torch.rand(2, 3, 5, 6), torch.randn(2, 16, 5, 6)).shape
        torch.Size([2, 3, 5, 6])
    """

    def __init__(
        self,
        in_channels: int,
        embed: int = 192,
        *,
        eps: float = 1e-5,
        chunk: int = 256,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.eps, self.chunk = eps, chunk
        self.backend: Backend = backend
        self.embed = nn.Conv2d(in_channels, embed, 1, bias=False)
        nn.init.xavier_uniform_(self.embed.weight, gain=4)

    def forward(self, cam: Tensor, features: Tensor) -> Tensor:
        """Refine the maps, see the class."""
        check_shape("features", features, (None, self.embed.in_channels, None, None), "for this module")
        check_ndim("cam", cam, 4, "(B, C, H, W)")
        cam = resized(cam, features.shape[2:])
        return pixel_correlation(cam, self.embed(features), eps=self.eps, chunk=self.chunk, backend=self.backend)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"eps={self.eps}, chunk={self.chunk}"


def _length(x: Tensor) -> Tensor:
    """Length of the vectors in axis 1; the slope at 0 is 0."""
    square = x.square().sum(1, keepdim=True)
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)


class _RelatedMean(torch.autograd.Function):
    """(B, C, N) maps and (B, E, N) keys -> maps averaged with weights relu(k_i . k_j)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: Tensor, eps: float, chunk: int) -> Tensor:
        stacked = torch.cat([x, torch.ones_like(x[:, :1])], 1)  # the last row gives the sums of the weights
        sums = torch.zeros_like(stacked)
        rows = k.mT.contiguous()
        for start in range(0, k.shape[2], chunk):
            stop = min(start + chunk, k.shape[2])
            weight = (rows[:, start:stop] @ k[:, :, start:]).relu_()  # (B, n, N - start): those before are known
            sums[:, :, start:stop] += stacked[:, :, start:] @ weight.mT
            sums[:, :, stop:] += stacked[:, :, start:stop] @ weight[:, :, stop - start :]
        total = sums[:, -1:] + eps
        y = sums[:, :-1] / total
        ctx.save_for_backward(x, k, y, total)
        ctx.chunk = chunk
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, k, y, total = ctx.saved_tensors
        to_maps, to_keys = ctx.needs_input_grad[:2]
        of_sums = grad / total  # of the numerators, (B, C, N)
        of_totals = -(of_sums * y).sum(1, keepdim=True)
        grad_x = torch.zeros_like(x) if to_maps else None
        grad_k = torch.zeros_like(k) if to_keys else None
        ones = torch.ones_like(of_totals)
        # the gradient of a_ij + a_ji is u_i . v_j, for one product in place of two
        u = torch.cat([x, ones, of_sums, of_totals], 1).mT.contiguous()
        v = torch.cat([of_sums, of_totals, x, ones], 1)
        rows = k.mT.contiguous()
        for start in range(0, k.shape[2], ctx.chunk):
            stop = min(start + ctx.chunk, k.shape[2])
            weight = (rows[:, start:stop] @ k[:, :, start:]).relu_()  # (B, n, N - start)
            if grad_x is not None:
                grad_x[:, :, start:stop] += of_sums[:, :, start:] @ weight.mT
                grad_x[:, :, stop:] += of_sums[:, :, start:stop] @ weight[:, :, stop - start :]
            if grad_k is not None:
                slope = (u[:, start:stop] @ v[:, :, start:]).masked_fill_(weight <= 0, 0)
                grad_k[:, :, start:stop] += k[:, :, start:] @ slope.mT
                grad_k[:, :, stop:] += k[:, :, start:stop] @ slope[:, :, stop - start :]
        return grad_x, grad_k, None, None
