"""Pixel-adaptive refinement (PAR, AFA): maps are averaged over near pixels of like colour, again and again.

Axes: B images, C maps, H W pixels, h w cells, P neighbours of a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32
from wsss_modules.affinity.offsets import Offset
from wsss_modules.kernels.backend import Backend, runs_triton

DILATIONS = (1, 2, 4, 8, 12, 24)
EPS = 1e-8


@dataclass(eq=False)
class PixelAdaptiveKernel:
    """The weights with which each pixel averages its neighbours; see :func:`pixel_adaptive_kernel`.

    They depend on the image alone, so one kernel serves all maps of an image: made once, used for every threshold.

    Args:
        offsets: P pairs ``(dy, dx)``.
        weights: (B, P, H, W) float, at least 0.

    Example:
        >>> import torch
        >>> from wsss_modules import pixel_adaptive_kernel
        >>> kernel = pixel_adaptive_kernel(torch.rand(1, 3, 12, 16), (1, 2))
        >>> kernel.refine(torch.rand(1, 4, 12, 16), num_iter=3).shape
        torch.Size([1, 4, 12, 16])
    """

    offsets: tuple[Offset, ...]
    weights: Tensor

    def refine(self, masks: Tensor, num_iter: int, *, backend: Backend = "auto") -> Tensor:
        """Average ``masks`` ``num_iter`` times.

        Args:
            masks: (B, C, h, w) floating point; brought to (H, W) first, bilinear with ``align_corners=True``.
            num_iter: at least 0.
            backend: ``"torch"``, ``"triton"``, or ``"auto"``: Triton on a GPU.

        Returns:
            (B, C, H, W) in the dtype of ``masks``.

        Raises:
            TypeError: ``masks`` is not floating point.
            ValueError: another number of images, or a negative ``num_iter``.
        """
        check_ndim("masks", masks, 4, "(B, C, h, w)")
        check_shape("masks", masks, (len(self.weights), None, None, None), "for the images of the kernel")
        check_floating("masks", masks)
        if num_iter < 0:
            raise ValueError(f"num_iter: expected at least 0, got {num_iter}")
        dtype = torch.promote_types(masks.dtype, self.weights.dtype)
        size = (self.weights.shape[2], self.weights.shape[3])
        if masks.numel() == 0:  # an image without a class; interpolate refuses it
            return masks.new_zeros(*masks.shape[:2], *size)
        with torch.autocast(masks.device.type, enabled=False):
            maps, weights = masks.to(dtype), self.weights.to(dtype)
            if tuple(maps.shape[2:]) != size:
                maps = F.interpolate(maps, size, mode="bilinear", align_corners=True)
            average = _average
            if runs_triton(backend, maps, weights):
                from wsss_modules.kernels.pixel_adaptive import average_neighbours as average
            for _ in range(num_iter):
                maps = average(maps, weights, self.offsets)
        return maps.to(masks.dtype)


def pixel_adaptive_kernel(
    image: Tensor,
    dilations: Sequence[int] = DILATIONS,
    *,
    w1: float = 0.3,
    w2: float = 0.01,
    normalize: bool = False,
    image_gradient: bool = False,
) -> PixelAdaptiveKernel:
    r"""Weights of the 8 neighbours of each pixel at each dilation, by colour and by distance.

    .. math::
        w_k(p) = \mathrm{softmax}_k\Big(-\frac{1}{3}\sum_c \Big(\frac{|I_k - I_p|_c}{w_1\,\sigma_c(p)}\Big)^2\Big)
        + w_2\, \mathrm{softmax}_k\Big(-\Big(\frac{d_k}{w_1\,\sigma(d)}\Big)^2\Big)

    with :math:`\sigma_c(p)` the deviation of channel c over the P neighbours of p (unbiased, without p itself),
    :math:`d_k` the distance to neighbour k in pixels and :math:`\sigma(d)` its deviation over the P neighbours. At the
    border of the image the outermost pixels are repeated.

    Args:
        image: (B, 3, H, W) floating point in [0, 1] (any number of channels, any gain: deviations take it out).
        dilations: distances of the rings of neighbours in pixels.
        w1: width of both kernels, relative to the deviation; above 0.
        w2: weight of the kernel of distance.
        normalize: divide the weights by their sum, 1 + w2.
        image_gradient: let the gradient flow into ``image``; it is a constant by default, as in the released code.

    Returns:
        Weights (B, P, H, W), P = 8 len(dilations), dilation by dilation, each in raster order. They add up to 1 + w2.

    Raises:
        TypeError: ``image`` is not floating point.
        ValueError: a wrong shape, no dilation or one below 1, or ``w1`` not above 0.

    Paper:
        Ru et al., "Learning Affinity from Attention: End-to-End Weakly-Supervised Semantic Segmentation with
        Transformers", CVPR 2022, arXiv:2203.02664, section 3.4.

    Differences:
        The paper has a width of its own for the distances; the released code uses ``w1`` for both, which is what this
        does. The released weights are not normalised, so that maps grow by 1 + w2 in each iteration (all alike: the
        strongest class stays). Where the neighbourhood has one colour, all its weights are equal, and the gradient to
        the image is 0.

    Notes:
        Three passes over P shifted views of the padded image; nothing of the size P C H W is stored. Computed in
        float32 for half precision.

    Example:
        >>> import torch
        >>> from wsss_modules import pixel_adaptive_kernel
        >>> pixel_adaptive_kernel(torch.zeros(1, 3, 4, 4), (1,), w2=0).weights[0, :, 0, 0]
        tensor([0.1250, 0.1250, 0.1250, 0.1250, 0.1250, 0.1250, 0.1250, 0.1250])
    """
    check_ndim("image", image, 4, "(B, 3, H, W)")
    check_floating("image", image)
    offsets = _ring_offsets(dilations)
    if not w1 > 0:
        raise ValueError(f"w1: expected a number above 0, got {w1}")
    with (
        torch.autocast(image.device.type, enabled=False),
        torch.set_grad_enabled(torch.is_grad_enabled() and image_gradient),
    ):
        pixels = at_least_float32(image)
        padded = _pad(pixels, offsets)

        def difference(offset: Offset) -> Tensor:
            return _moved(padded, offset, pixels) - pixels  # (B, 3, H, W)

        # the deviation of I_k is that of I_k - I_p; two passes, since a difference of squares would cancel
        mean = torch.zeros_like(pixels)
        for offset in offsets:
            mean = mean + difference(offset)
        mean = mean / len(offsets)
        variance = torch.zeros_like(pixels)
        for offset in offsets:
            variance = variance + (difference(offset) - mean).square()
        variance = variance / (len(offsets) - 1)
        varied = variance > 0  # selected before the root, whose slope at 0 is infinite
        deviation = torch.where(varied, torch.where(varied, variance, 1.0).sqrt(), 0.0)
        precision = 1 / ((deviation + EPS) * w1)
        costs = [(difference(offset) * precision).square().mean(1) for offset in offsets]
        weights = (-torch.stack(costs, 1)).softmax(1)  # (B, P, H, W)
        weights = weights + w2 * _distance_weights(offsets, w1, weights)
        if normalize:
            weights = weights / (1 + w2)
    return PixelAdaptiveKernel(offsets, weights)


def pixel_adaptive_refinement(
    image: Tensor,
    masks: Tensor,
    *,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
    w1: float = 0.3,
    w2: float = 0.01,
    normalize: bool = False,
    image_gradient: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    r"""Refine maps by averaging each pixel over its neighbours, weighted by likeness of colour and by distance.

    .. math:: m_{t+1}(p) = \sum_k w_k(p)\, m_t(p + o_k)

    ``num_iter`` times, with the weights of :func:`pixel_adaptive_kernel` and replicated borders.

    Args:
        image: (B, 3, H, W) floating point in [0, 1].
        masks: (B, C, h, w) floating point, any range; brought to the size of the image first.
        dilations: distances of the rings of neighbours in pixels.
        num_iter: iterations, at least 0: 10 for VOC, 15 for COCO.
        w1: width of the kernels.
        w2: weight of the kernel of distance.
        normalize: divide the weights by their sum, 1 + w2.
        image_gradient: let the gradient flow into ``image`` too.
        backend: ``"torch"``, ``"triton"``, or ``"auto"``: Triton on a GPU.

    Returns:
        (B, C, H, W) in the dtype of ``masks``, between the extremes of ``masks`` times (1 + w2)^num_iter.

    Raises:
        TypeError: ``image`` or ``masks`` is not floating point.
        ValueError: shapes don't match, or an option is out of range.

    Paper:
        Ru et al., CVPR 2022, arXiv:2203.02664, section 3.4.

    Differences:
        See :func:`pixel_adaptive_kernel`.

    Notes:
        The released code gathers all neighbours of all maps, a (B, C, P, H, W) tensor, in every iteration. Here each
        neighbour is a slice of the padded map: memory for the weights (B, P, H, W) and two copies of the maps. On a GPU
        an iteration is one launch (:mod:`wsss_modules.kernels.pixel_adaptive`). Linear
        in ``masks``, so a kernel that is made once serves several calls. Compiles with ``fullgraph=True``.

    Example:
        >>> import torch
        >>> from wsss_modules import pixel_adaptive_refinement
        >>> image = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]).expand(1, 3, 6, 6)
        >>> masks = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0]).expand(1, 1, 6, 6)  # ends before the edge
        >>> pixel_adaptive_refinement(image, masks, dilations=(1, 2), num_iter=5)[0, 0, 3].round()
        tensor([1., 1., 1., 0., 0., 0.])
    """
    check_shape("masks", masks, (len(image), None, None, None), "(B, C, h, w) to match image")
    kernel = pixel_adaptive_kernel(image, dilations, w1=w1, w2=w2, normalize=normalize, image_gradient=image_gradient)
    return kernel.refine(masks, num_iter, backend=backend)


class PixelAdaptiveRefinement(nn.Module):
    """PAR with fixed options; see :func:`pixel_adaptive_refinement`.

    Args:
        dilations: distances of the rings of neighbours in pixels.
        num_iter: iterations, 10 for VOC, 15 for COCO.
        w1: width of the kernels.
        w2: weight of the kernel of distance.
        normalize: divide the weights by their sum.
        image_gradient: let the gradient flow into the image too.
        backend: see :func:`pixel_adaptive_refinement`.

    Example:
        >>> import torch
        >>> from wsss_modules import PixelAdaptiveRefinement
        >>> refine = PixelAdaptiveRefinement(dilations=(1, 2), num_iter=5)
        >>> refine(torch.rand(2, 3, 16, 20), torch.rand(2, 4, 8, 10)).shape
        torch.Size([2, 4, 16, 20])
    """

    def __init__(
        self,
        dilations: Sequence[int] = DILATIONS,
        num_iter: int = 10,
        *,
        w1: float = 0.3,
        w2: float = 0.01,
        normalize: bool = False,
        image_gradient: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _ring_offsets(dilations)
        if num_iter < 0 or not w1 > 0:
            raise ValueError(f"num_iter, w1: expected at least 0 and a number above 0, got {num_iter} and {w1}")
        self.dilations, self.num_iter = tuple(dilations), num_iter
        self.w1, self.w2, self.normalize, self.image_gradient = w1, w2, normalize, image_gradient
        self.backend: Backend = backend

    def kernel(self, image: Tensor) -> PixelAdaptiveKernel:
        """The weights for images (B, 3, H, W), for several calls of :meth:`PixelAdaptiveKernel.refine`."""
        options = {"normalize": self.normalize, "image_gradient": self.image_gradient}
        return pixel_adaptive_kernel(image, self.dilations, w1=self.w1, w2=self.w2, **options)

    def forward(self, image: Tensor, masks: Tensor) -> Tensor:
        """Images (B, 3, H, W) and maps (B, C, h, w) -> (B, C, H, W)."""
        check_shape("masks", masks, (len(image), None, None, None), "(B, C, h, w) to match image")
        return self.kernel(image).refine(masks, self.num_iter, backend=self.backend)

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"dilations={self.dilations}, num_iter={self.num_iter}, w1={self.w1}, w2={self.w2}, "
            f"normalize={self.normalize}, image_gradient={self.image_gradient}"
        )


def denormalize_images(
    images: Tensor,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    *,
    legacy: bool = False,
) -> Tensor:
    """Undo the normalisation of a network's input: 8-bit grey levels divided by 255, as PAR wants them.

    Args:
        images: (B, C, H, W) floating point, ``(x - mean) / std`` of images x in [0, 1].
        mean: mean of each channel in [0, 1].
        std: deviation of each channel.
        legacy: truncate to whole grey levels, and let what is out of range wrap around, as the released code of AFA
            does; by default levels are rounded and clamped.

    Returns:
        (B, C, H, W) in [0, 1], multiples of 1/255, in the dtype of ``images`` or float32.

    Raises:
        TypeError: ``images`` is not floating point.
        ValueError: not one mean and deviation for each channel.

    Differences:
        Truncation takes a level from values that come out just below a whole number; see ``legacy``.

    Example:
        >>> import torch
        >>> from wsss_modules import denormalize_images
        >>> (denormalize_images(torch.zeros(1, 3, 1, 1)) * 255).flatten()
        tensor([124., 116., 104.])
    """
    check_ndim("images", images, 4, "(B, C, H, W)")
    check_floating("images", images)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != images.shape[1]:
            raise ValueError(f"{name}: expected one number for each of {images.shape[1]} channels, got {len(values)}")
    x = at_least_float32(images.detach())
    scale, shift = ([255 * v for v in values] for values in (std, mean))
    levels = x * x.new_tensor(scale).view(-1, 1, 1) + x.new_tensor(shift).view(-1, 1, 1)
    if legacy:
        return levels.trunc().remainder(256) / 255
    return levels.round().clamp(0, 255) / 255


def _ring_offsets(dilations: Sequence[int]) -> tuple[Offset, ...]:
    if not dilations or min(dilations) < 1:
        raise ValueError(f"dilations: expected at least one number of pixels, each at least 1, got {tuple(dilations)}")
    ring = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    return tuple((dilation * y, dilation * x) for dilation in dilations for y, x in ring)


def _distance_weights(offsets: tuple[Offset, ...], w1: float, like: Tensor) -> Tensor:
    """Softmax of the distances, the same at every pixel: (P, 1, 1)."""
    lengths = [math.hypot(*offset) for offset in offsets]
    mean = sum(lengths) / len(lengths)
    deviation = math.sqrt(sum((length - mean) ** 2 for length in lengths) / (len(lengths) - 1))
    costs = [-((length / (deviation + EPS) / w1) ** 2) for length in lengths]
    return torch.tensor(costs, dtype=torch.float64).softmax(0).to(like.device, like.dtype).view(-1, 1, 1)


def _pad(x: Tensor, offsets: tuple[Offset, ...]) -> Tensor:
    reach = max(max(abs(dy), abs(dx)) for dy, dx in offsets)
    return F.pad(x, (reach, reach, reach, reach), mode="replicate")


def _moved(padded: Tensor, offset: Offset, like: Tensor) -> Tensor:
    """The neighbours of all pixels at one offset, a view of (..., H, W)."""
    height, width = like.shape[-2:]
    reach = (padded.shape[-1] - width) // 2
    return padded.narrow(-2, reach + offset[0], height).narrow(-1, reach + offset[1], width)


def _average(maps: Tensor, weights: Tensor, offsets: tuple[Offset, ...]) -> Tensor:
    in_place = not (torch.is_grad_enabled() and (maps.requires_grad or weights.requires_grad))
    padded, total = _pad(maps, offsets), torch.zeros_like(maps)
    for p, offset in enumerate(offsets):
        weight, neighbour = weights[:, p : p + 1], _moved(padded, offset, maps)
        total = total.addcmul_(weight, neighbour) if in_place else total.addcmul(weight, neighbour)
    return total
