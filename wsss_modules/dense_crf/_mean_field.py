"""Mean-field inference in a fully connected CRF with Gaussian edge potentials.

B batch, C labels (of the image at hand, background included), H W pixels, N = H*W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from wsss_modules._checks import check_floating, check_integer, check_ndim
from wsss_modules.dense_crf._exact import ExactGaussian
from wsss_modules.dense_crf._lattice import PermutohedralLattice
from wsss_modules.kernels.backend import Backend


@dataclass(frozen=True)
class CRFParameters:
    """What a dense CRF is made of: two Gaussian kernels under a Potts model, and a number of mean-field steps.

    A kernel is ``exp(-|f_i - f_j|^2 / 2)`` of features in units of their deviations. A weight of 0 drops its kernel.

    Attributes:
        iterations: mean-field steps; 0 gives softmax(-unary).
        gaussian_sxy: deviation of the spatial kernel, in pixels.
        gaussian_weight: its weight.
        bilateral_sxy: deviation of the bilateral kernel in space, in pixels.
        bilateral_srgb: its deviation in colour, in grey levels of 0..255.
        bilateral_weight: its weight.

    Raises:
        ValueError: a deviation is not positive, or a weight or the number of iterations is negative.
    """

    iterations: int = 10
    gaussian_sxy: float = 3.0
    gaussian_weight: float = 3.0
    bilateral_sxy: float = 80.0
    bilateral_srgb: float = 13.0
    bilateral_weight: float = 10.0

    def __post_init__(self) -> None:
        for name in ("gaussian_sxy", "bilateral_sxy", "bilateral_srgb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive deviation, got {getattr(self, name)}")
        for name in ("iterations", "gaussian_weight", "bilateral_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")


#: CAM scores to affinity labels (AffinityNet and the systems built on it: SEAM, AEFT, OC-CSE, EDAM, MCTformer, RCA).
PSA_CRF = CRFParameters()
#: Hard labels of CAMs (IRN and those built on it: AdvCAM, CLIMS, ReCAM, SIPE, C2AM), after :func:`unary_from_mask`.
IRN_CRF = CRFParameters(bilateral_sxy=50.0, bilateral_srgb=5.0)
#: Softmax output of a segmentation network (DeepLab-v2 in PyTorch: NSROM, L2G, EPS, CLIMS, ViT-PCM).
DEEPLAB_CRF = CRFParameters(gaussian_sxy=1.0, bilateral_sxy=67.0, bilateral_srgb=3.0, bilateral_weight=4.0)


class CRFKernels(NamedTuple):
    """The pairwise part of a CRF for given images: the costly half, to be made once and used for many unaries.

    Attributes:
        terms: (weight, filter) of each kernel; the filter of one image serves any batch.
        size: (H, W) in pixels.
    """

    terms: tuple[tuple[float, PermutohedralLattice | ExactGaussian], ...]
    size: tuple[int, int]


def unary_from_scores(scores: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Energies -log(clip(score, eps, 1)) of soft label scores.

    Scores are not brought to sum 1, so a pixel where all are low is one on which the unary has little to say.

    Args:
        scores: (B, C, H, W) label scores or probabilities, [0, 1], any floating type.
        eps: lowest score; 1e-5 is the choice of all released systems.

    Returns:
        (B, C, H, W) energies in [0, -log eps], same dtype. No gradient flows where the clip is at work.

    Raises:
        TypeError: ``scores`` is not floating point.
        ValueError: ``scores`` is not (B, C, H, W).

    Example:
        >>> unary_from_scores(torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1)).flatten()
        tensor([-0.0000,  0.6931, 11.5129])
    """
    check_ndim("scores", scores, 4, "(B, C, H, W)")
    check_floating("scores", scores)
    return -scores.to(_compute_dtype(scores)).clamp(eps, 1.0).log().to(scores.dtype)


def unary_from_mask(mask: Tensor, num_labels: int, *, gt_prob: float = 0.7, ignore_index: int = 255) -> Tensor:
    """Energies of a hard label map that is right with probability ``gt_prob``.

    -log gt_prob at the label of the pixel and -log((1 - gt_prob) / (C - 1)) at the others; all labels alike, log C, on
    ignored pixels. With one label there is nothing to decide: the CRF returns the map unchanged.

    Args:
        mask: (B, H, W) integers in 0..C-1 or ``ignore_index``. Compact labels: number the classes present in the
            image, background 0, rather than all classes of the data set.
        num_labels: C, labels.
        gt_prob: confidence in the labels, in (0, 1).
        ignore_index: value of pixels without a label.

    Returns:
        (B, C, H, W) float32 energies.

    Raises:
        TypeError: ``mask`` is not of integers.
        ValueError: ``mask`` is not (B, H, W) or holds other values; ``num_labels`` < 1; ``gt_prob`` outside (0, 1).

    Notes:
        The check of the values reads one number back from the device.

    Example:
        >>> unary_from_mask(torch.tensor([[[0, 2, 255]]]), 3)[0, :, 0]
        tensor([[0.3567, 1.8971, 1.0986],
                [1.8971, 1.8971, 1.0986],
                [1.8971, 0.3567, 1.0986]])
    """
    check_ndim("mask", mask, 3, "(B, H, W)")
    check_integer("mask", mask, "did you pass scores?")
    if num_labels < 1:
        raise ValueError(f"num_labels: expected 1 or more, got {num_labels}")
    if not 0 < gt_prob < 1:
        raise ValueError(f"gt_prob: expected a probability between 0 and 1, got {gt_prob}")
    mask = mask.long()
    ignored = mask == ignore_index
    if bool(((mask < 0) | (mask >= num_labels)).logical_and_(~ignored).any()):
        raise ValueError(
            f"mask: expected labels in 0..{num_labels - 1} or {ignore_index}, got {mask.min()}..{mask.max()}; "
            "number the present classes compactly"
        )
    label = torch.arange(num_labels, device=mask.device)[:, None, None]
    at_label = -math.log(gt_prob)
    elsewhere = -math.log((1 - gt_prob) / max(num_labels - 1, 1))
    unary = torch.where(mask[:, None] == label, at_label, elsewhere).to(torch.float32)
    return unary.masked_fill(ignored[:, None], math.log(num_labels))


def crf_kernels(
    image: Tensor,
    parameters: CRFParameters = PSA_CRF,
    *,
    dtype: torch.dtype = torch.float32,
    exact: bool = False,
    backend: Backend = "auto",
) -> CRFKernels:
    """The two kernels of a CRF for a batch of images, for :func:`mean_field` or :class:`DenseCRF`.

    Args:
        image: (B, 3, H, W) RGB in 0..255, uint8 or any other type; not normalised. Treated as constant.
        parameters: deviations and weights.
        dtype: float32 or float64, the precision of the filters.
        exact: sum over all pairs of pixels in place of the permutohedral lattice, in time that grows with N^2.
        backend: of exact sums: ``"torch"``, ``"triton"``, or ``"auto"``: Triton on a GPU.

    Returns:
        The kernels. The spatial one is the same for all images of a size and is made once for the batch.

    Raises:
        ValueError: ``image`` is not (B, 3, H, W), or its values can't be 0..255 (mean-subtracted, or scaled to [0, 1]).

    Example:
        >>> image = torch.randint(0, 256, (1, 3, 8, 9))
        >>> [weight for weight, _ in crf_kernels(image, IRN_CRF).terms]
        [3.0, 10.0]
    """
    check_ndim("image", image, 4, "(B, 3, H, W)")
    batch, channels, height, width = image.shape
    if channels != 3 or image.numel() == 0:
        raise ValueError(f"image: expected shape (B, 3, H, W), got {tuple(image.shape)}")
    image = image.detach()
    if image.dtype != torch.uint8:
        _check_range(image)
    y, x = torch.meshgrid(*(torch.arange(n, device=image.device, dtype=dtype) for n in (height, width)), indexing="ij")
    xy = torch.stack([x.flatten(), y.flatten()], 1)  # (N, 2)

    def kernel(features: Tensor) -> PermutohedralLattice | ExactGaussian:
        return ExactGaussian(features, backend=backend) if exact else PermutohedralLattice(features)

    terms = []
    if parameters.gaussian_weight > 0:
        terms.append((parameters.gaussian_weight, kernel(xy[None] / parameters.gaussian_sxy)))
    if parameters.bilateral_weight > 0:
        rgb = rearrange(image.to(dtype), "b c h w -> b (h w) c")
        place = (xy / parameters.bilateral_sxy).expand(batch, -1, -1)
        features = torch.cat([place, rgb / parameters.bilateral_srgb], 2)
        terms.append((parameters.bilateral_weight, kernel(features)))
    return CRFKernels(tuple(terms), (height, width))


def mean_field(unary: Tensor, kernels: CRFKernels, iterations: int = 10) -> Tensor:
    r"""Approximate label marginals of a fully connected CRF whose kernels are at hand.

    .. math:: Q^0 = \mathrm{softmax}(-U), \qquad Q^{t+1} = \mathrm{softmax}\Big(-U + \sum_m w_m \hat K_m Q^t\Big)

    with K̂ = N^-1/2 K N^-1/2 the symmetrically normalised kernels, self term included (a Potts model: only agreement
    with like pixels counts).

    Args:
        unary: (B, C, H, W) energies U, any floating type; +inf rules a label out of a pixel. Differentiable.
        kernels: from :func:`crf_kernels`; those of a single image serve all B unaries.
        iterations: mean-field steps.

    Returns:
        (B, C, H, W) probabilities, sum 1 over C, in the dtype of ``unary``; computed in float32 at least.

    Raises:
        TypeError: ``unary`` is not floating point.
        ValueError: ``unary`` does not fit the size or the number of the images.

    Notes:
        Time and memory grow with C: pass the labels of the image (background and present classes), not those of the
        data set. In a batch with different label sets, +inf has the effect of leaving a label out.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> kernels = crf_kernels(torch.randint(0, 256, (1, 3, 8, 9)))
        >>> mean_field(torch.rand(4, 2, 8, 9), kernels, iterations=3).shape
        torch.Size([4, 2, 8, 9])
    """
    check_ndim("unary", unary, 4, "(B, C, H, W)")
    check_floating("unary", unary)
    if unary.shape[2:] != kernels.size:
        raise ValueError(f"unary: expected size {kernels.size} of the image, got {tuple(unary.shape[2:])}")
    for _, lattice in kernels.terms:
        if lattice.batch not in (1, unary.shape[0]):
            raise ValueError(f"unary: expected a batch of {lattice.batch} to match the images, got {unary.shape[0]}")
    negative = rearrange(-unary.to(_compute_dtype(unary)), "b c h w -> b (h w) c")  # (B, N, C)
    q = _softmax(negative)
    for _ in range(iterations):
        logits = negative
        for weight, lattice in kernels.terms:
            logits = torch.add(logits, lattice.filter(q), alpha=weight)
        q = _softmax(logits)
    return rearrange(q, "b (h w) c -> b c h w", h=unary.shape[2]).to(unary.dtype)


def dense_crf(
    image: Tensor | CRFKernels,
    unary: Tensor,
    parameters: CRFParameters = PSA_CRF,
    *,
    exact: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Refine label maps by the edges of their image: :func:`mean_field` over the kernels of :func:`crf_kernels`.

    Args:
        image: (B, 3, H, W) RGB in 0..255, uint8 or any other type, constant; or the kernels made from it by
            :func:`crf_kernels` with the same parameters. One image (B = 1) serves a whole batch of unaries.
        unary: (B, C, H, W) energies of the C labels present (:func:`unary_from_scores`, :func:`unary_from_mask`), any
            floating type. Differentiable.
        parameters: deviations, weights, iterations: :data:`PSA_CRF`, :data:`IRN_CRF`, :data:`DEEPLAB_CRF` or your own.
        exact: sum over all pairs of pixels, see :func:`crf_kernels`; of finished kernels no matter.
        backend: of exact sums, see :func:`crf_kernels`.

    Returns:
        (B, C, H, W) probabilities, sum 1 over C, in the dtype of ``unary``.

    Raises:
        TypeError, ValueError: as :func:`crf_kernels` and :func:`mean_field`.

    Paper:
        P. Kraehenbuehl, V. Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials",
        NeurIPS 2011 (arXiv:1210.5644).

    Differences:
        As in the authors' code, and unlike the paper's algorithm 1, the message to a pixel includes its own Q, and the
        kernels are normalised symmetrically.

    Notes:
        Making the kernels takes about half of the time, so make them once for several unaries of an image. CPU memory
        on top of the inputs, 3 labels, 10 iterations, largest of the three presets (resident set of a fresh process):

        =========  =====================  ====================
        image      peak, no gradient      held by the kernels
        =========  =====================  ====================
        500x375    91 MB                  40 MB
        1024x1024  520 MB                 207 MB
        =========  =====================  ====================

        A gradient keeps one (B, C, H, W) map per iteration more. A batch is one lattice, not a loop over images.
        The size of the lattice depends on the image, so ``torch.compile`` breaks its graph once, where the kernels are
        made (and the device is synchronised there); :func:`mean_field` over finished kernels is a single graph.
        Results are those of the published C++ code up to rounding, so they carry its approximation of the Gaussians
        too; ``exact`` has the Gaussians themselves.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> image = torch.randint(0, 256, (1, 3, 12, 16), dtype=torch.uint8)
        >>> mask = torch.randint(0, 2, (1, 12, 16))
        >>> probability = dense_crf(image, unary_from_mask(mask, num_labels=2), IRN_CRF)
        >>> probability.shape
        torch.Size([1, 2, 12, 16])
    """
    if isinstance(image, Tensor):
        check_ndim("unary", unary, 4, "(B, C, H, W)")
        check_floating("unary", unary)
        image = crf_kernels(image, parameters, dtype=_compute_dtype(unary), exact=exact, backend=backend)
    return mean_field(unary, image, parameters.iterations)


class DenseCRF(nn.Module):
    """:func:`dense_crf` with its parameters stored.

    Args:
        parameters: deviations, weights, iterations.
        exact: see :func:`crf_kernels`.
        backend: see :func:`crf_kernels`.

    Example:
        Two unaries of an image over one pair of lattices:

        >>> _ = torch.manual_seed(0)
        >>> crf = DenseCRF(PSA_CRF)
        >>> image = torch.randint(0, 256, (1, 3, 12, 16), dtype=torch.uint8)
        >>> scores = torch.rand(2, 3, 12, 16)
        >>> both = crf(image, unary_from_scores(scores))
        >>> kernels = crf.prepare(image)  # or one after the other, if they differ in labels
        >>> torch.equal(crf(kernels, unary_from_scores(scores[:1])), both[:1])
        True
    """

    def __init__(self, parameters: CRFParameters = PSA_CRF, *, exact: bool = False, backend: Backend = "auto") -> None:
        super().__init__()
        self.crf_parameters, self.exact = parameters, exact
        self.backend: Backend = backend

    def prepare(self, image: Tensor, *, dtype: torch.dtype = torch.float32) -> CRFKernels:
        """The kernels of ``image``, to pass in its place: :func:`crf_kernels`."""
        return crf_kernels(image, self.crf_parameters, dtype=dtype, exact=self.exact, backend=self.backend)

    def forward(self, image: Tensor | CRFKernels, unary: Tensor) -> Tensor:
        """(B, C, H, W) probabilities: see :func:`dense_crf`."""
        return dense_crf(image, unary, self.crf_parameters, exact=self.exact, backend=self.backend)

    def extra_repr(self) -> str:
        """The parameters."""
        return f"{self.crf_parameters}, exact=True" if self.exact else str(self.crf_parameters)


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis of (B, N, C), through the middle one: ten times faster when C is small."""
    return logits.transpose(1, 2).softmax(1).transpose(1, 2).contiguous()


def _compute_dtype(x: Tensor) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _check_range(image: Tensor) -> None:
    """Refuse normalised images: the CRF would still run, and see no edges or the wrong ones."""
    low, high = (float(x) for x in image.aminmax())
    if not (low >= 0 and high <= 255):
        raise ValueError(f"image: expected RGB values in 0..255, got {low:g}..{high:g}; undo the normalisation")
    if high <= 1 and image.is_floating_point() and bool((image != image.round()).any()):
        raise ValueError(f"image: expected RGB values in 0..255, got {low:g}..{high:g}; multiply by 255")
