"""Maps and labels that are made anew from every batch while a network trains (AFA).

Axes: B images, K foreground classes, H W pixels, h w cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32
from wsss_modules._regions import check_regions, inside_regions
from wsss_modules.cam import cam_to_mask, merge_flip, normalize_cam

__all__ = ["cam_to_label", "merge_multiscale_cams", "present_softmax"]


def merge_multiscale_cams(maps: Sequence[Tensor], size: tuple[int, int], *, eps: float = 1e-5) -> Tensor:
    r"""Merge signed maps of images and of their mirror images over several scales.

    .. math:: a = \sum_s r(\max(u_s, \mathrm{flip}(u'_s))), \qquad
        \hat a = \frac{a - \min a}{\max (a - \min a) + \epsilon}

    with r = ReLU and :math:`u_s, u'_s` the maps of both views, brought to ``size``; minimum and maximum are those of
    each map.

    Args:
        maps: one (2B, K, h_i, w_i) floating-point tensor for each scale, signed: B images, then their B mirror images.
            The order of the scales does not matter.
        size: (H, W) of the result in pixels.
        eps: added to the maximum.

    Returns:
        (B, K, H, W) in [0, 1], in the dtype of the first of ``maps``. Absent classes are stretched to 1 as well:
        multiply by the labels, or pass these to what reads the maps.

    Raises:
        TypeError: maps are not floating point.
        ValueError: no map, an odd number of rows, or numbers of images or classes that differ.

    Paper:
        Ru et al., "Learning Affinity from Attention: End-to-End Weakly-Supervised Semantic Segmentation with
        Transformers", CVPR 2022, arXiv:2203.02664.

    Differences:
        The released code looks the affinity for its random walk up by the place of the largest scale in a list of
        another order than that of the maps; keep affinities with their scales instead.

    Notes:
        Bilinear, ``align_corners=False``. :func:`multi_scale_cam` is the merge of PSA and IRN: it adds both views up,
        and does not subtract the minimum.

    Example:
        >>> import torch
        >>> from wsss_modules import merge_multiscale_cams
        >>> maps = [torch.randn(4, 3, 5, 7), torch.randn(4, 3, 3, 4)]
        >>> merge_multiscale_cams(maps, (80, 112)).shape
        torch.Size([2, 3, 80, 112])
    """
    if not maps:
        raise ValueError("maps: expected at least one tensor (2B, K, h, w), got none")
    rows, channels = maps[0].shape[:2] if maps[0].ndim == 4 else (0, 0)
    total: Tensor | None = None
    for i, scale in enumerate(maps):
        check_ndim(f"maps[{i}]", scale, 4, "(2B, K, h, w)")
        check_shape(f"maps[{i}]", scale, (rows, channels, None, None), "to match maps[0]")
        check_floating(f"maps[{i}]", scale)
        if rows % 2:
            raise ValueError(f"maps[{i}]: expected images and as many mirror images, got {rows} rows")
        if scale.numel() == 0:
            continue
        full = F.interpolate(at_least_float32(scale), size, mode="bilinear", align_corners=False)
        merged = F.relu(merge_flip(*full.chunk(2), reduce="max"))
        total = merged if total is None else total + merged
    if total is None:
        return maps[0].new_zeros(rows // 2, channels, *size)
    return normalize_cam(total, eps, subtract_min=True).to(maps[0].dtype)


def present_softmax(cam: Tensor, labels: Tensor, background: float) -> Tensor:
    r"""Let a constant background and the maps of the present classes compete by a softmax.

    .. math:: s_j = \frac{e^{a_j}}{\sum_{i \in \{0\} \cup P} e^{a_i}}, \qquad a_0 = background

    over the present classes P; absent ones get 0.

    Args:
        cam: (B, K, H, W) floating point, usually in [0, 1]. K may be 0.
        labels: (B, K) multi-hot or bool; above 0 means present.
        background: the score of the background before the softmax.

    Returns:
        scores (B, 1 + K, H, W) that add up to 1 at each pixel, in the dtype of ``cam``.

    Raises:
        TypeError: ``cam`` is not floating point.
        ValueError: a wrong shape.

    Paper:
        Ru et al., CVPR 2022, arXiv:2203.02664, section 3.3.

    Example:
        >>> import torch
        >>> from wsss_modules import present_softmax
        >>> present_softmax(torch.zeros(1, 3, 1, 1), torch.tensor([[1, 0, 0]]), 0.0).flatten()
        tensor([0.5000, 0.5000, 0.0000, 0.0000])
    """
    check_ndim("cam", cam, 4, "(B, K, H, W)")
    check_floating("cam", cam)
    check_shape("labels", labels, cam.shape[:2], "to match cam")
    values = torch.where((labels > 0)[:, :, None, None], at_least_float32(cam), float("-inf"))
    constant = values.new_full((len(cam), 1, *cam.shape[2:]), background)
    return torch.cat([constant, values], 1).softmax(1).to(cam.dtype)


def cam_to_label(
    cam: Tensor,
    labels: Tensor,
    *,
    background: float = 0.45,
    band: tuple[float, float] | None = None,
    regions: Tensor | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """Label each pixel with the strongest present class, with background, or as unsure in between.

    Args:
        cam: (B, K, H, W) floating point, at least 0, usually in [0, 1].
        labels: (B, K) multi-hot; absent classes can't win.
        background: pixels whose strongest map is at most this are background; not used with a ``band``.
        band: (low, high): at most ``low`` is background, above ``high`` a class, in between unsure.
        regions: (B, 4) int64, the part of each image that is not padding, ``x1, y1, x2, y2`` in pixels, half-open; all
            of it by default.
        ignore_index: label of unsure pixels and of those outside the region.

    Returns:
        mask (B, H, W) int64: 0 background, 1..K classes, or ``ignore_index``.

    Raises:
        TypeError: ``cam`` is not floating point, or ``regions`` not integers.
        ValueError: a wrong shape, or a ``band`` that ends below its beginning.

    Paper:
        Ru et al., CVPR 2022, arXiv:2203.02664, section 3.1.

    Notes:
        :func:`cam_to_mask` with a region and a band; :func:`confident_label_from_cam` refines both ends by a CRF.

    Example:
        >>> import torch
        >>> from wsss_modules import cam_to_label
        >>> cam = torch.tensor([[[[0.1, 0.4, 0.5, 0.9]]]])
        >>> cam_to_label(cam, torch.tensor([[1]])), cam_to_label(cam, torch.tensor([[1]]), band=(0.35, 0.55))
        (tensor([[[0, 0, 1, 1]]]), tensor([[[  0, 255, 255,   1]]]))
    """
    check_floating("cam", cam)
    if band is None:
        mask = cam_to_mask(cam, background, labels=labels)
    else:
        low, high = band
        if low > high:
            raise ValueError(f"band: expected (low, high) in ascending order, got {band}")
        certain = cam_to_mask(cam, high, labels=labels)
        possible = cam_to_mask(cam, low, labels=labels) > 0
        mask = torch.where((certain == 0) & possible, ignore_index, certain)
    if regions is None:
        return mask
    check_regions(regions, len(cam))
    return torch.where(inside_regions(regions, (cam.shape[2], cam.shape[3])), mask, ignore_index)
