"""Pseudo regions of the present classes, their pooled features, and who is mixed with whom (RCA).

Axes: B images, K foreground classes, D feature channels, H W cells, R (image, present class) pairs of a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32


class RegionPool(NamedTuple):
    """One embedding for each image and class.

    Attributes:
        embedding: (B, K, D) mean feature of the region, 0 where it is empty.
        area: (B, K) int64 number of its cells.
    """

    embedding: Tensor
    area: Tensor


class RegionMixUp(NamedTuple):
    """The draws of a mix-up over the R present (image, class) pairs of a batch, in the order of ``labels.nonzero()``.

    Attributes:
        partner: (R,) int64 image that the partner comes from, 0..B-1; may be the pair's own.
        partner_class: (R,) int64 its class, a column of the labels: 0..K-1.
        weight: (R,) float in [0, 1], share of the pair itself; the partner has the rest.
    """

    partner: Tensor
    partner_class: Tensor
    weight: Tensor


def region_mask(cam: Tensor) -> Tensor:
    r"""Cells where the probability of a class is above its own mean over the image: RCA's pseudo region.

    .. math:: m_k = [\, s_k > \operatorname{mean}_{hw} s_k \,], \qquad s = \operatorname{softmax}_k(cam)

    Args:
        cam: (B, K, H, W) float class maps before any ReLU, of any sign. The softmax runs over the classes.

    Returns:
        (B, K, H, W) bool, without gradient. No image label takes part: select the present classes yourself.

    Raises:
        TypeError: ``cam`` is not floating point.
        ValueError: ``cam`` does not have four axes.

    Paper:
        Zhou, Zhang, Zhao and Li, Regional Semantic Contrast and Aggregation for Weakly Supervised Semantic
        Segmentation, CVPR 2022, arXiv:2203.09653.

    Differences:
        A map that is constant but for rounding has no region here; in the released code the rounding decides between
        none (which ends in NaN) and any part of the image.

    Notes:
        With one class the softmax is 1 everywhere, so that there is no region: RCA needs K of at least 2. Half
        precision is compared in float32. Works in ``torch.compile(fullgraph=True)``.

    Example:
        >>> cam = torch.tensor([[[[2.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]]])
        >>> region_mask(cam)[0, :, 0].int()
        tensor([[1, 0, 0],
                [0, 1, 1]], dtype=torch.int32)
    """
    check_ndim("cam", cam, 4, "(B, K, H, W)")
    check_floating("cam", cam)
    cam = cam.detach()
    probability = at_least_float32(cam).softmax(1)
    if probability.shape[2:].numel() == 0 or probability.shape[1] == 0:
        return torch.zeros_like(probability, dtype=torch.bool)
    low, high = probability.amin((2, 3), keepdim=True), probability.amax((2, 3), keepdim=True)
    varies = high - low > 8 * torch.finfo(probability.dtype).eps * high  # by more than its rounding
    return (probability > probability.mean((2, 3), keepdim=True)) & varies


def region_pool(features: Tensor, cam: Tensor) -> RegionPool:
    """Mean feature of each class's region (see :func:`region_mask`), for every image and class.

    Args:
        features: (B, D, H, W) float.
        cam: (B, K, H, W) float class maps before any ReLU, on the same grid.

    Returns:
        :class:`RegionPool`, in the dtype of ``features``, at least float32: all B·K pairs, because their number does
        not depend on the data. ``pool.embedding[labels > 0]`` are the (R, D) of the present classes. Gradients reach
        ``features`` only.

    Raises:
        TypeError: an input is not floating point.
        ValueError: the two differ in images or grid.

    Paper:
        Zhou et al., CVPR 2022, arXiv:2203.09653.

    Differences:
        The released code divides by zero for an empty region, here its embedding is 0 and its area says so.

    Notes:
        One batched product instead of a masked copy of the features a region. Works in
        ``torch.compile(fullgraph=True)``.

    Example:
        >>> features = torch.arange(3.0).view(1, 1, 1, 3)
        >>> cam = torch.tensor([[[[2.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]]])
        >>> pool = region_pool(features, cam)
        >>> pool.embedding[0, :, 0], pool.area[0]
        (tensor([0.0000, 1.5000]), tensor([1, 2]))
    """
    check_ndim("features", features, 4, "(B, D, H, W)")
    check_floating("features", features)
    check_ndim("cam", cam, 4, "(B, K, H, W)")
    check_shape("cam", cam, (features.shape[0], None, *features.shape[2:]), "to match features")
    return pool_masks(features, region_mask(cam))


def pool_masks(features: Tensor, mask: Tensor) -> RegionPool:
    """Mean of ``features`` (B, D, H, W) over each of the masks (B, K, H, W)."""
    area = mask.sum((2, 3))
    wide = at_least_float32(features)
    with torch.autocast(features.device.type, enabled=False):
        total = wide.flatten(2) @ mask.flatten(2).to(wide.dtype).mT  # (B, D, K)
    return RegionPool(total.mT / area.clamp(min=1)[..., None], area)


def draw_region_mix_up(labels: Tensor, beta: int = 8, generator: torch.Generator | None = None) -> RegionMixUp:
    """Draw a partner and a mixing weight for each present (image, class) pair of a batch.

    The partner is a uniformly drawn image of the batch (also the pair's own) and one of its classes, uniformly drawn;
    the weight follows Beta(``beta``, ``beta``).

    Args:
        labels: (B, K) multi-hot; present means greater than 0.
        beta: Both parameters of the beta distribution, a whole number of at least 1.
        generator: Source of the draws, on the device of ``labels``.

    Returns:
        :class:`RegionMixUp` with R = number of present pairs. A partner image without a class gives weight 1.

    Raises:
        ValueError: a wrong shape or ``beta``.

    Paper:
        Zhou et al., CVPR 2022, arXiv:2203.09653.

    Notes:
        Beta(n, n) with a whole n is the median of 2n - 1 uniform numbers, which needs no sampler that leaves the
        generator out. R depends on the labels, so this breaks the graph of ``torch.compile``.

    Example:
        >>> labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> mix = draw_region_mix_up(labels, generator=torch.Generator().manual_seed(0))
        >>> bool(labels[mix.partner, mix.partner_class].all()), mix.weight.shape
        (True, torch.Size([3]))
    """
    check_ndim("labels", labels, 2, "(B, K)")
    if beta < 1 or beta != int(beta):
        raise ValueError(f"beta: expected a whole number of at least 1, got {beta}")
    present, device = labels > 0, labels.device
    pairs = present.nonzero().shape[0]
    partner = torch.randint(max(1, len(labels)), (pairs,), generator=generator, device=device)
    lots = torch.rand(pairs, labels.shape[1], generator=generator, device=device)
    partner_class = torch.where(present[partner], lots, -1.0).argmax(1) if pairs else partner
    weight = torch.rand(pairs, 2 * int(beta) - 1, generator=generator, device=device).median(1).values
    return RegionMixUp(partner, partner_class, torch.where(present[partner, partner_class], weight, 1.0))
