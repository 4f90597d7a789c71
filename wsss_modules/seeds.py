"""Confident labels: from maps to masks that say "unsure" where a strong and a weak background disagree.

Axes: B images, K foreground classes of the image at hand, H W pixels, h w cells.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules.cam import cam_to_mask
from wsss_modules.dense_crf import DenseCRF, unary_from_mask

__all__ = ["confident_label", "confident_label_from_cam", "confident_label_from_scores"]


def confident_label(
    low_scores: Tensor, high_scores: Tensor, *, pool: int = 1, eps: float = 1e-5, ignore_index: int = 255
) -> Tensor:
    """Keep the labels that hold under a strong and under a weak background (PSA).

    A class that wins although the background is strong (low alpha) is certain; so is background that wins although it
    is weak (high alpha), and it has the last word. All else is unsure, as are cells where every score is below ``eps``:
    the padding of a crop.

    Args:
        low_scores: (B, 1+K, H, W) float, background first: scores with a low alpha (4), see `background_score`, usually
            after a dense CRF.
        high_scores: (B, 1+K, H, W) float: the same with a high alpha (24 or 32).
        pool: Average the scores over blocks of this many pixels first (PSA: 8, the network's stride).
        eps: Least score of a cell that is not padding.
        ignore_index: Value of unsure cells.

    Returns:
        mask (B, H // pool, W // pool) int64: 0 background, k the k-th channel, or ``ignore_index``. The first of
        several equal scores wins.

    Raises:
        TypeError: scores are not floating point.
        ValueError: shapes differ, or there is no channel.

    Paper:
        Ahn and Kwak, Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly Supervised Semantic
        Segmentation, CVPR 2018, arXiv:1803.10464, section 3.2.

    Notes:
        Affinity labels only compare labels for equality, so channel numbers serve as well as class numbers.

    Example:
        >>> low = torch.tensor([[0.8, 0.2, 0.6], [0.2, 0.8, 0.4]])[None, :, None]
        >>> high = torch.tensor([[0.6, 0.1, 0.3], [0.4, 0.9, 0.7]])[None, :, None]
        >>> confident_label(low, high)
        tensor([[[  0,   1, 255]]])
    """
    check_ndim("low_scores", low_scores, 4, "(B, 1+K, H, W)")
    check_shape("high_scores", high_scores, low_scores.shape, "to match low_scores")
    check_floating("low_scores", low_scores)
    check_floating("high_scores", high_scores)
    if low_scores.shape[1] == 0:
        raise ValueError("low_scores: expected the background at channel 0, got no channel")
    if pool != 1:
        low_scores, high_scores = F.avg_pool2d(low_scores, pool), F.avg_pool2d(high_scores, pool)
    low, label = low_scores.max(1)
    high, under_weak = high_scores.max(1)
    label = torch.where(label == 0, ignore_index, label)
    label = torch.where(under_weak == 0, 0, label)
    return torch.where(torch.maximum(low, high) < eps, ignore_index, label)


def confident_label_from_cam(
    cam: Tensor,
    image: Tensor | None = None,
    fg: float = 0.30,
    bg: float = 0.05,
    *,
    crf: DenseCRF | None = None,
    keys: Tensor | None = None,
    gt_prob: float = 0.7,
    ignore_index: int = 255,
) -> Tensor:
    """Keep the classes that exceed a high threshold and the background that stays under a low one (IRN).

    Each threshold gives a mask (`cam_to_mask`), which the dense CRF refines. A pixel that the first mask gives to a
    class keeps it, whatever the second says; one that both give to background is background; the others are unsure.

    Args:
        cam: (B, K, H, W) normalised maps of the classes present, in [0, 1]; K may be 0. Images with different classes
            must come one by one.
        image: (B, 3, H, W) RGB in 0..255, uint8 or any other type; only read by the CRF.
        fg: Background score of the first mask.
        bg: Background score of the second mask, at most ``fg``.
        crf: Refine both masks with it; IRN: ``DenseCRF(IRN_CRF)``. Both share the lattice of the image. None: no CRF.
        keys: (K,) int64 class of each map, 1..K as in a mask; default: map k is class k + 1.
        gt_prob: Confidence of the CRF in the masks.
        ignore_index: Value of unsure pixels.

    Returns:
        mask (B, H, W) int64: 0 background, a class, or ``ignore_index``.

    Raises:
        ValueError: a wrong shape, ``bg`` above ``fg``, or a CRF without an image.

    Paper:
        Ahn, Cho and Kwak, Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations, CVPR 2019,
        arXiv:1904.05044, section 3.2.

    Differences:
        Without a class the released CRF divides by zero; here the result is all background.

    Example:
        >>> cam = torch.tensor([[[[0.9, 0.2, 0.01]]]])
        >>> confident_label_from_cam(cam, keys=torch.tensor([7]))
        tensor([[[  7, 255,   0]]])
    """
    check_ndim("cam", cam, 4, "(B, K, H, W)")
    channels = cam.shape[1]
    if bg > fg:
        raise ValueError(f"bg: expected at most fg = {fg}, got {bg}")
    if keys is not None:
        check_shape("keys", keys, (channels,), "to match cam")
        check_integer("keys", keys)
    certain, possible = cam_to_mask(cam, fg), cam_to_mask(cam, bg)  # maps numbered 1..K, not classes yet
    return _agreement("cam", certain, possible, channels, image, crf, keys, gt_prob, ignore_index)


def confident_label_from_scores(
    scores: Tensor,
    image: Tensor | None = None,
    bg_weight: float = 0.5,
    *,
    crf: DenseCRF | None = None,
    keys: Tensor | None = None,
    gt_prob: float = 0.7,
    ignore_index: int = 255,
) -> Tensor:
    """Keep the classes that win against the background, and the background that still wins at a lower weight (SIPE).

    For maps with a background channel of their own, which need no threshold. The argmax of the scores is the first
    mask, that with the background times ``bg_weight`` the second; then as `confident_label_from_cam`.

    Args:
        scores: (B, 1+K, H, W) floating point, at least 0, background first and then the classes present; K may be 0.
            Images with different classes must come one by one.
        image: (B, 3, H, W) RGB in 0..255, uint8 or any other type; only read by the CRF.
        bg_weight: In [0, 1], weight of the background in the second mask.
        crf: Refine both masks with it; SIPE: ``DenseCRF(IRN_CRF)``. None: no CRF.
        keys: (K,) int64 class of each map, 1..K as in a mask; default: map k is class k + 1.
        gt_prob: Confidence of the CRF in the masks.
        ignore_index: Value of unsure pixels.

    Returns:
        mask (B, H, W) int64: 0 background, a class, or ``ignore_index``. The first of several equal scores wins.

    Raises:
        TypeError: ``scores`` is not floating point.
        ValueError: a wrong shape, a ``bg_weight`` outside [0, 1], or a CRF without an image.

    Paper:
        Chen, Yang, Lai and Xie, Self-supervised Image-specific Prototype Exploration for Weakly Supervised Semantic
        Segmentation, CVPR 2022, arXiv:2203.02909; as in its released code.

    Differences:
        The released code halves the background of its input in place.

    Example:
        >>> scores = torch.tensor([[[[0.2, 0.6, 0.9]], [[0.9, 0.4, 0.1]]]])
        >>> confident_label_from_scores(scores, keys=torch.tensor([7]))
        tensor([[[  7, 255,   0]]])
    """
    check_ndim("scores", scores, 4, "(B, 1+K, H, W)")
    check_floating("scores", scores)
    channels = scores.shape[1] - 1
    if channels < 0:
        raise ValueError("scores: expected the background at channel 0, got no channel")
    if not 0 <= bg_weight <= 1:
        raise ValueError(f"bg_weight: expected a number in [0, 1], got {bg_weight}")
    if keys is not None:
        check_shape("keys", keys, (channels,), "to match scores")
        check_integer("keys", keys)
    certain = scores.argmax(1)
    possible = torch.cat([bg_weight * scores[:, :1], scores[:, 1:]], 1).argmax(1)
    return _agreement("scores", certain, possible, channels, image, crf, keys, gt_prob, ignore_index)


def _agreement(
    name: str,
    certain: Tensor,
    possible: Tensor,
    channels: int,
    image: Tensor | None,
    crf: DenseCRF | None,
    keys: Tensor | None,
    gt_prob: float,
    ignore_index: int,
) -> Tensor:
    """Classes of the first mask, background where both have it, else unsure; masks number the maps 1..channels."""
    if crf is not None and channels > 0:
        if image is None:
            raise ValueError("image: expected (B, 3, H, W) RGB in 0..255 for the CRF, got None")
        check_shape("image", image, (certain.shape[0], 3, *certain.shape[1:]), f"to match {name}")
        kernels = crf.prepare(image)
        certain, possible = (
            crf(kernels, unary_from_mask(mask, channels + 1, gt_prob=gt_prob)).argmax(1) for mask in (certain, possible)
        )
    classes = certain if keys is None else torch.cat([keys.new_zeros(1), keys])[certain]
    return torch.where(certain > 0, classes, torch.where(possible > 0, ignore_index, 0))
