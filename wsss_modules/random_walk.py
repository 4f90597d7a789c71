"""Random walks of class maps over a local affinity: the refinement step of PSA and IRN.

Axis letters: B batch, C channels, K foreground classes, H W map size, h w size of the map that is walked.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._stencil_walk import stencil_walk
from wsss_modules.affinity import EdgeToAffinity, LocalAffinity
from wsss_modules.cam import background_score
from wsss_modules.kernels.backend import Backend, runs_triton

Method = Literal["power", "chebyshev"]


def random_walk(
    x: Tensor,
    affinity: LocalAffinity,
    *,
    beta: float = 8.0,
    n_steps: int = 256,
    method: Method = "power",
    tolerance: float = 1e-7,
    backend: Backend = "auto",
) -> Tensor:
    r"""Walk maps over sharpened affinities: each step replaces a pixel by the weighted average of its neighbourhood.

    .. math:: y = T^{n\_steps} x, \qquad (T x)_j = \sum_i A_{ij}^\beta x_i / D_j, \qquad D_j = \sum_i A_{ij}^\beta

    Constants are preserved, each map stays within its own range, isolated pixels keep their value, and the result is
    linear in ``x``.

    Args:
        x: (B, C, H, W) float, any range; walked channel by channel.
        affinity: affinity of the same maps, values in [0, 1]; a batch of one serves all images.
        beta: exponent of the affinities, >= 0; 8 in PSA, 10 in IRN.
        n_steps: number of steps, any integer >= 0.
        method: ``"power"`` takes all steps. ``"chebyshev"`` takes a third of them for 256: it sums the first Chebyshev
            polynomials of ``T``, whose number grows with the square root of ``n_steps``.
        tolerance: for ``"chebyshev"``, weight of the polynomials that may be left out. The error is at most twice that
            times the range of ``x`` in the degree-weighted norm, and in practice of that order in each pixel.
            1e-7 keeps 84 of 256; 0 keeps all, which is exact.
        backend: ``"torch"``, ``"triton"``, or ``"auto"``: Triton on a GPU, one launch a step.

    Returns:
        (B, C, H, W) in the dtype of ``x``.

    Raises:
        TypeError: if ``x`` is not floating point.
        ValueError: if the shapes of ``x`` and ``affinity`` differ, or an option is out of range.

    Paper:
        Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly Supervised
        Semantic Segmentation", CVPR 2018, arXiv:1803.10464, section 3.4.

    Differences:
        The released code squares the dense N x N matrix ``log2(n_steps)`` times; in float32 its error is 1e-5 to 3e-5.
        This is the same product without the matrix; its float32 error is below 1e-6.

    Notes:
        Time and memory are O(P·C·N) a step and O((P + C)·N); half precision is computed in float32, float64 in float64.
        Differentiable in ``x`` (backward is one more walk) and in the affinities (backward takes the time of about
        seven, and memory for 4·√n_steps states).
        One opaque operation for ``torch.compile(fullgraph=True)``; no second derivatives.

    Example:
        >>> import torch
        >>> from wsss_modules import LocalAffinity
        >>> from wsss_modules.random_walk import random_walk
        >>> affinity = LocalAffinity(((0, 1),), torch.tensor([[[[1.0, 0.0, 0.0]]]]))  # only pixels 0 and 1 are alike
        >>> random_walk(torch.tensor([[[[1.0, 0.0, 0.5]]]]), affinity)
        tensor([[[[0.5000, 0.5000, 0.5000]]]])
    """
    check_ndim("x", x, 4, "(B, C, H, W)")
    check_floating("x", x)
    _check_options(n_steps, method, tolerance)
    if affinity.size != x.shape[2:] or affinity.values.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"affinity: expected values (B, P, H, W) to match x {tuple(x.shape)}, got {tuple(affinity.values.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(x.dtype, affinity.values.dtype), torch.float32)
    values = affinity.to(dtype).power(beta).values.expand(x.shape[0], -1, -1, -1)
    weights = _chebyshev_weights(n_steps, tolerance) if method == "chebyshev" else []
    n_steps = len(weights) - 1 if weights else n_steps
    flat_offsets = [component for offset in affinity.offsets for component in offset]
    triton = runs_triton(backend, x, values)
    return stencil_walk(x.to(dtype), values, flat_offsets, n_steps, weights, triton).to(x.dtype)


class RandomWalk(nn.Module):
    """Random walk with fixed options; see :func:`random_walk`.

    Args:
        beta: exponent of the affinities.
        n_steps: number of steps.
        method: ``"power"`` or ``"chebyshev"``.
        tolerance: weight of the polynomials that ``"chebyshev"`` may leave out.
        backend: see :func:`random_walk`.

    Example:
        >>> import torch
        >>> from wsss_modules import EdgeToAffinity, RandomWalk
        >>> edge = torch.tensor([0.0, 0.0, 1.0, 0.0]).view(1, 1, 1, 4)
        >>> walk = RandomWalk(beta=10, n_steps=64)
        >>> walk(torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4), EdgeToAffinity(radius=3)(edge))
        tensor([[[[0.5000, 0.5000, 0.0000, 0.0000]]]])
    """

    def __init__(
        self,
        beta: float = 8.0,
        n_steps: int = 256,
        method: Method = "power",
        tolerance: float = 1e-7,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _check_options(n_steps, method, tolerance)
        self.backend: Backend = backend
        self.beta, self.n_steps, self.method, self.tolerance = beta, n_steps, method, tolerance

    def forward(self, x: Tensor, affinity: LocalAffinity) -> Tensor:
        """(B, C, H, W) maps and their affinity -> (B, C, H, W)."""
        options = {"beta": self.beta, "n_steps": self.n_steps, "tolerance": self.tolerance}
        return random_walk(x, affinity, method=self.method, backend=self.backend, **options)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Show the options."""
        return f"beta={self.beta}, n_steps={self.n_steps}, method={self.method!r}, tolerance={self.tolerance}"


def propagate_to_edge(
    x: Tensor,
    edge: Tensor,
    *,
    radius: int = 5,
    beta: float = 10.0,
    n_steps: int = 256,
    method: Method = "power",
    tolerance: float = 1e-7,
) -> Tensor:
    """IRN's walk: spread maps until a class boundary stops them.

    ``x·(1 - edge)`` walks over the affinities ``(1 - max edge on the path)^beta`` of all pairs closer than ``radius``.
    A pixel with edge 1 is isolated and becomes 0.

    Args:
        x: (B, C, H, W) float: class maps, or maps of class and instance.
        edge: (B, 1, H, W) float, boundary probability in [0, 1].
        radius: radius in pixels.
        beta: exponent of the affinities.
        n_steps: number of steps.
        method: see :func:`random_walk`.
        tolerance: see :func:`random_walk`.

    Returns:
        (B, C, H, W), not normalised, in the dtype of ``x``.

    Raises:
        TypeError: if ``x`` or ``edge`` is not floating point.
        ValueError: if the shapes do not match, or an option is out of range.

    Paper:
        Ahn, Cho and Kwak, "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations", CVPR 2019,
        arXiv:1904.05044, section 5.

    Differences:
        The background is not walked; :func:`walk_scores` prepares the result for a constant background score.

    Example:
        >>> import torch
        >>> from wsss_modules import propagate_to_edge
        >>> edge = torch.tensor([0.0, 0.0, 1.0, 0.0]).view(1, 1, 1, 4)
        >>> propagate_to_edge(torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 1, 1, 4), edge)
        tensor([[[[0.5000, 0.5000, 0.0000, 0.0000]]]])
    """
    check_ndim("x", x, 4, "(B, C, H, W)")
    check_shape("edge", edge, (x.shape[0], 1, *x.shape[2:]), "to match x")
    options = {"beta": beta, "n_steps": n_steps, "tolerance": tolerance}
    affinity = EdgeToAffinity(radius)(edge)
    return random_walk(x * (1 - edge), affinity, method=method, **options).to(x.dtype)  # type: ignore[arg-type]


def propagate_cam(
    cam: Tensor,
    affinity: LocalAffinity,
    *,
    alpha: float = 16.0,
    background: float | None = None,
    stride: int = 8,
    beta: float = 8.0,
    n_steps: int = 256,
    method: Method = "power",
    tolerance: float = 1e-7,
) -> Tensor:
    """PSA's inference: background score and class maps, averaged to the stride of the affinities and walked together.

    ``scores = [(1 - max_k cam)^alpha, cam]`` at full size, zero-padded right and below to a multiple of ``stride``,
    averaged over ``stride x stride`` blocks, then :func:`random_walk`.

    Args:
        cam: (B, K, H, W) float in [0, 1], at full size; classes that are absent are left out or zero.
        affinity: affinity at ``ceil(H / stride) x ceil(W / stride)``.
        alpha: exponent of the background score; larger means less background. Released: 16, 24.
        background: a constant score in the place of the power; 0.39 in MCTformer, which walks 64 steps.
        stride: pixels of an affinity cell along each side.
        beta: exponent of the affinities.
        n_steps: number of steps.
        method: see :func:`random_walk`.
        tolerance: see :func:`random_walk`.

    Returns:
        Scores (B, 1+K, h, w) in [0, 1], background first; :func:`upsample_scores` brings them to full size.

    Raises:
        ValueError: if the size of ``affinity`` is not that of the averaged maps, or an option is out of range.

    Paper:
        Ahn and Kwak, CVPR 2018, arXiv:1803.10464, section 3.4.

    Differences:
        The released code always walks 21 channels. The walk is linear and acts on each channel alone, so leaving out
        absent classes changes nothing.

    Example:
        >>> import torch
        >>> from wsss_modules import EdgeToAffinity, propagate_cam
        >>> affinity = EdgeToAffinity(radius=2)(torch.zeros(1, 1, 2, 2))
        >>> propagate_cam(torch.full((1, 1, 16, 16), 0.5), affinity, alpha=1)[0, :, 0, 0]
        tensor([0.5000, 0.5000])
    """
    check_ndim("cam", cam, 4, "(B, K, H, W)")
    check_floating("cam", cam)
    constant = None if background is None else cam.new_full((len(cam), 1, *cam.shape[2:]), background)
    scores = torch.cat([background_score(cam, alpha) if constant is None else constant, cam], dim=1)  # (B, 1+K, H, W)
    height, width = cam.shape[2:]
    pooled = F.avg_pool2d(F.pad(scores, (0, -width % stride, 0, -height % stride)), stride)
    options = {"beta": beta, "n_steps": n_steps, "tolerance": tolerance}
    return random_walk(pooled, affinity, method=method, **options)  # type: ignore[arg-type]


def upsample_scores(scores: Tensor, size: tuple[int, int], *, stride: int) -> Tensor:
    """Enlarge maps ``stride`` times (bilinear, ``align_corners=False``) and crop them to the image, right and below.

    Args:
        scores: (B, C, h, w) float.
        size: height H and width W of the image in pixels, at most ``stride`` times h and w.
        stride: factor.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: if ``size`` is larger than the enlarged map.

    Example:
        >>> import torch
        >>> from wsss_modules import upsample_scores
        >>> upsample_scores(torch.rand(1, 3, 5, 6), (37, 41), stride=8).shape
        torch.Size([1, 3, 37, 41])
    """
    check_ndim("scores", scores, 4, "(B, C, h, w)")
    if size[0] > stride * scores.shape[2] or size[1] > stride * scores.shape[3]:
        raise ValueError(f"size: expected at most {stride} times {tuple(scores.shape[2:])}, got {tuple(size)}")
    if scores.shape[1] == 0:  # an image without a class; interpolate refuses it
        return scores.new_zeros(scores.shape[0], 0, *size)
    large = F.interpolate(scores, scale_factor=float(stride), mode="bilinear", align_corners=False)
    return large[:, :, : size[0], : size[1]]


def walk_scores(walked: Tensor, size: tuple[int, int], *, stride: int = 4) -> Tensor:
    """IRN's class scores at full size: walked maps, enlarged, cropped and divided by their largest value.

    The maximum is taken over classes and pixels of an image together, after the crop. Compare with a constant
    background score (released: 0.25) by ``cam_to_mask(scores, 0.25)``.

    Args:
        walked: (B, C, h, w) float >= 0, from :func:`propagate_to_edge`.
        size: height H and width W of the image in pixels.
        stride: pixels of a cell along each side.

    Returns:
        (B, C, H, W) in [0, 1]; zeros for an image whose maps are all zero.

    Raises:
        ValueError: if ``size`` is larger than the enlarged map.

    Paper:
        Ahn, Cho and Kwak, CVPR 2019, arXiv:1904.05044, section 5.

    Differences:
        The released code divides by zero, and gives NaN, where all maps are zero.

    Example:
        >>> import torch
        >>> from wsss_modules import cam_to_mask, walk_scores
        >>> scores = walk_scores(torch.tensor([[[[0.4, 0.0]]]]), (4, 7))
        >>> cam_to_mask(scores, 0.25)[0, 0].tolist()
        [1, 1, 1, 1, 1, 0, 0]
    """
    large = upsample_scores(walked, size, stride=stride)
    if large.shape[1] == 0:
        return large
    largest = large.amax((1, 2, 3), keepdim=True)
    return large / torch.where(largest > 0, largest, 1)


def _check_options(n_steps: int, method: str, tolerance: float) -> None:
    if n_steps < 0:
        raise ValueError(f"n_steps: expected an integer >= 0, got {n_steps}")
    if method not in ("power", "chebyshev"):
        raise ValueError(f"method: expected 'power' or 'chebyshev', got {method!r}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: expected a number in [0, 1), got {tolerance}")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _chebyshev_weights(n_steps: int, tolerance: float) -> list[float]:
    """Weights of the Chebyshev polynomials in ``x^n_steps``, up to a rest of at most ``tolerance``, rescaled to sum 1.

    ``x^s = Σ_k c_k T_k(x)`` over k of the parity of s, with ``c_k = 2^(1-s) binom(s, (s-k)/2)``, halved for k = 0. The
    weights are positive and sum to 1; beyond k = d they sum to less than ``2 exp(-d²/2s)``.
    """
    weights = [0.0] * (n_steps + 1)
    weight = 2 * math.comb(n_steps, n_steps // 2) / 2**n_steps
    for k in range(n_steps % 2, n_steps + 1, 2):
        weights[k] = weight / 2 if k == 0 else weight
        if 1 - sum(weights) <= tolerance:
            break
        weight *= (n_steps - k) / (n_steps + k + 2)
    kept = sum(weights)
    return [weight / kept for weight in weights[: k + 1]]
