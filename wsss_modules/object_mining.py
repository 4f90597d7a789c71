"""Labels for objects that saliency misses: initial labels, potential object mining, non-salient regions (NSROM).

Axes: B images, K foreground classes of the image at hand, H W pixels, N = H W.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules.cam import normalize_cam
from wsss_modules.saliency import fuse_saliency_labels, ignore_without_foreground

__all__ = ["background_extraction_label", "box_dilation", "non_salient_region_masking", "potential_object_mining"]


def background_extraction_label(
    cam: Tensor,
    saliency: Tensor,
    *,
    keys: Tensor | None = None,
    conflict: float = 0.9,
    foreground: float = 0.3,
    salient: float = 32 / 255,
    attention: float = 0.8,
    min_foreground: float = 0.0,
    ignore_index: int = 255,
) -> Tensor:
    """Label objects by their attention and background by the lack of saliency, ignoring doubtful pixels (NSROM).

    Every map is stretched to 0..1, then `fuse_saliency_labels` decides: the highest of the maps and ``1 - saliency``
    wins, those below ``foreground`` counting as 0; a pixel is ignored if several are above ``conflict``, or if it is
    background by this, but salient or above ``attention`` in some class.

    Args:
        cam: (B, K, H, W) floating point of any scale, the attention maps of the second classifier; a map of zeros, of
            an absent class or one without a map, claims nothing. K may be 0.
        saliency: (B, 1, H, W) float foreground probability in [0, 1].
        keys: (K,) int64 class of each map, 1..K as in a mask; default: map k is class k + 1.
        conflict: A score above this is a claim; two claims cancel out.
        foreground: Least score of a class, and of the background.
        salient: Saliency from which a pixel can't be background: 32 grey levels.
        attention: Attention above which a pixel can't be background.
        min_foreground: Least share of an image that is labelled with a class, else all of it is ignored; by default
            `potential_object_mining`, which comes next, sees to that.
        ignore_index: Value of ignored pixels.

    Returns:
        mask (B, H, W) int64: 0 background, a class, or ``ignore_index``. The first of several equal scores wins.

    Raises:
        TypeError: a tensor of the wrong kind.
        ValueError: a wrong shape.

    Paper:
        Yao, Chen, Xie, Zhang, Shen, Wu, Tang and Zhang, Non-Salient Region Object Mining for Weakly Supervised Semantic
        Segmentation, CVPR 2021, arXiv:2103.14581.

    Notes:
        Rests on image labels and on saliency, which is supervision of its own. Works in
        ``torch.compile(fullgraph=True)``.

    Example:
        >>> cam = torch.tensor([[[[0.0, 3.0, 10.0, 9.0]]]])
        >>> saliency = torch.tensor([[[[0.0, 0.1, 0.9, 0.0]]]])
        >>> background_extraction_label(cam, saliency)  # at the last pixel two claims
        tensor([[[  0,   0,   1, 255]]])
    """
    check_ndim("cam", cam, 4, "(B, K, H, W)")
    check_floating("cam", cam)
    # float32, as released: 75 of 250 grey levels then reach 0.3, of which they miss a little in double precision
    stretched = normalize_cam(cam.float(), 1e-8, subtract_min=True)
    return fuse_saliency_labels(
        F.pad(stretched, (0, 0, 0, 0, 1, 0)),  # a place for the background, which is not read
        saliency,
        keys=keys,
        conflict=conflict,
        attention=attention,
        salient=salient,
        min_score=foreground,
        min_foreground=min_foreground,
        ignore_index=ignore_index,
    )


def potential_object_mining(
    mask: Tensor,
    cam: Tensor,
    *,
    keys: Tensor | None = None,
    foreground: float = 0.3,
    min_foreground: float = 0.01,
    ignore_index: int = 255,
) -> Tensor:
    r"""Ignore background pixels where the attention of a class says that there may be an object (NSROM).

    Every map is stretched to 0..1. Its threshold is the median over the pixels that are labelled with the class; if
    that is not known, because there is none or the map is 0 there, the median of the upper half of what exceeds
    ``foreground``:

    .. math::
        \theta_k = \operatorname{med}_{y = k} a_k, \quad\text{else}\quad
        \theta_k = \operatorname{med}\{a_k > \operatorname{med}\{a_k > \tau\}\}

    A background pixel with :math:`a_k > \theta_k` for some class becomes ``ignore_index``; nothing else changes. An
    image of which less than ``min_foreground`` is labelled with a class is ignored as a whole.

    Args:
        mask: (B, H, W) int64: 0 background, classes, ``ignore_index``; see `background_extraction_label`.
        cam: (B, K, H, W) floating point of any scale, the maps of the *first* classifier; absent classes 0.
        keys: (K,) int64 class of each map, 1..K as in ``mask``; default: map k is class k + 1.
        foreground: tau, for classes without labelled pixels.
        min_foreground: Least share of the image; 0 keeps all images.
        ignore_index: Value of ignored pixels.

    Returns:
        mask (B, H, W) int64.

    Raises:
        TypeError: a tensor of the wrong kind.
        ValueError: a wrong shape.

    Paper:
        Yao et al., CVPR 2021, arXiv:2103.14581.

    Notes:
        A map that is constant mines nothing. All classes are mined from the mask as it came, at once: medians by one
        sort, O(K N log N). Works in ``torch.compile(fullgraph=True)``.

    Example:
        >>> mask = torch.tensor([[[1, 1, 1, 0, 0]]])
        >>> cam = torch.tensor([[[[5.0, 6.0, 9.0, 8.0, 1.0]]]])
        >>> potential_object_mining(mask, cam)  # 8 is above the median of 5, 6 and 9
        tensor([[[  1,   1,   1, 255,   0]]])
    """
    check_ndim("cam", cam, 4, "(B, K, H, W)")
    check_floating("cam", cam)
    check_shape("mask", mask, (len(cam), *cam.shape[2:]), "to match cam")
    check_integer("mask", mask, "did you pass scores?")
    if keys is None:
        keys = torch.arange(1, 1 + cam.shape[1], device=mask.device)
    check_shape("keys", keys, cam.shape[1:2], "to match cam")
    check_integer("keys", keys)
    if cam.shape[1] == 0:
        return ignore_without_foreground(mask, min_foreground, ignore_index)
    # double, as released: a value that lies midway between the two that make a median is told from it by rounding
    values = rearrange(normalize_cam(cam.double(), 1e-8, subtract_min=True), "b k h w -> b k (h w)")
    own = mask.flatten(1)[:, None] == keys[:, None]  # (B, K, N)
    known = (own & (values > 0)).any(2, keepdim=True)
    high = values > foreground
    upper = high & (values > _median(values, high))
    threshold = _median(values, torch.where(known, own, upper))
    mined = (values > threshold).any(1).view_as(mask) & (mask == 0)
    return ignore_without_foreground(torch.where(mined, ignore_index, mask), min_foreground, ignore_index)


def non_salient_region_masking(
    segmentation: Tensor,
    pseudo_label: Tensor,
    saliency: Tensor,
    labels: Tensor,
    *,
    dilation: int = 30,
    min_classes: int = 2,
    restrict_to_image_labels: bool = False,
    min_foreground: float = 0.01,
    ignore_index: int = 255,
) -> Tensor:
    """Labels for a second segmentation network: what the first one sees, without what is far from any object (NSROM).

    In images with at least ``min_classes`` classes, what the network takes for background gets the class that the
    pseudo label has there, if any; then all pixels that are farther than ``dilation`` / 2 from objects and from salient
    pixels are ignored, since objects may hide there. Simpler images keep the segmentation as it is.

    Args:
        segmentation: (B, H, W) int64, masks of the first network, after a dense CRF.
        pseudo_label: (B, H, W) int64, the labels that it was trained on; see `potential_object_mining`.
        saliency: (B, 1, H, W) float foreground probability in [0, 1]; salient is all that is not 0 as 8 bits.
        labels: (B, K) multi-hot image labels, which count the classes.
        dilation: Side of the square by which objects grow, in pixels, see `box_dilation`.
        min_classes: Classes from which an image is complex. (The paper speaks of complex images only.)
        restrict_to_image_labels: Take pixels that the network gives to an absent class for unknown: the pseudo label's
            class, or ignored. Off in the released code, whose networks may add classes.
        min_foreground: Least share of an image that is labelled with a class, else all of it is ignored.
        ignore_index: Value of ignored pixels.

    Returns:
        mask (B, H, W) int64.

    Raises:
        TypeError: a tensor of the wrong kind.
        ValueError: a wrong shape, or ``dilation`` below 1.

    Paper:
        Yao et al., CVPR 2021, arXiv:2103.14581.

    Notes:
        Works in ``torch.compile(fullgraph=True)``.

    Example:
        >>> segmentation, pseudo = torch.tensor([[[1, 0, 0, 0, 0, 0]]]), torch.tensor([[[1, 0, 2, 0, 0, 0]]])
        >>> nothing = torch.zeros(1, 1, 1, 6)
        >>> non_salient_region_masking(segmentation, pseudo, nothing, torch.tensor([[1, 1]]), dilation=3)
        tensor([[[  1,   0,   2,   0, 255, 255]]])
    """
    check_ndim("segmentation", segmentation, 3, "(B, H, W)")
    check_integer("segmentation", segmentation, "did you pass scores?")
    check_shape("pseudo_label", pseudo_label, segmentation.shape, "to match segmentation")
    check_integer("pseudo_label", pseudo_label, "did you pass scores?")
    check_shape("saliency", saliency, (len(segmentation), 1, *segmentation.shape[1:]), "to match segmentation")
    check_floating("saliency", saliency)
    check_shape("labels", labels, (len(segmentation), None), "to match segmentation")
    found, absent = segmentation, torch.zeros_like(segmentation, dtype=torch.bool)
    if restrict_to_image_labels:
        allowed = F.pad(labels > 0, (1, 0), value=True)  # (B, 1+K)
        inside = segmentation.clamp(0, labels.shape[1])
        absent = ~allowed.gather(1, inside.flatten(1)).view_as(segmentation) | (inside != segmentation)
        absent = absent & (segmentation != ignore_index)
        found = torch.where(absent, 0, segmentation)
    has_class = (pseudo_label > 0) & (pseudo_label != ignore_index)
    complex_image = ((labels > 0).sum(1) >= min_classes)[:, None, None]
    filled = torch.where((found == 0) & has_class & (complex_image | absent), pseudo_label, found)
    filled = torch.where(absent & (filled == 0), ignore_index, filled)
    near = box_dilation((filled != 0) | (saliency[:, 0] >= 0.5 / 255), dilation)
    mask = torch.where(complex_image & ~near, ignore_index, filled)
    return ignore_without_foreground(mask, min_foreground, ignore_index)


def box_dilation(mask: Tensor, size: int) -> Tensor:
    r"""Grow a region by a square: true where any pixel of the ``size`` x ``size`` square around is.

    The square of pixel x covers x - s // 2 .. x - s // 2 + s - 1, so that an even one reaches farther up and left;
    what is outside of the picture does not count.

    Args:
        mask: (..., H, W) bool, or numbers, of which all but 0 count.
        size: s, side of the square in pixels, at least 1 (which changes nothing); it may exceed the picture.

    Returns:
        (..., H, W) bool.

    Raises:
        ValueError: fewer than two axes, or ``size`` below 1.

    Notes:
        A square has a true pixel if its sum is not 0, and sums are differences of running sums along rows and then
        columns: O(H W), whatever the size, where a maximum over the square takes O(H W s^2). Works in
        ``torch.compile(fullgraph=True)``.

    Example:
        >>> box_dilation(torch.tensor([[0, 0, 0, 0, 1, 0, 0]]), 4).int()
        tensor([[0, 0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    """
    if mask.ndim < 2:
        raise ValueError(f"mask: expected shape (..., H, W), got {tuple(mask.shape)}")
    if size < 1:
        raise ValueError(f"size: expected at least 1 pixel, got {size}")
    along_rows = _any_in_window(mask != 0, size, -1)
    return _any_in_window(along_rows, size, -2)


def _any_in_window(mask: Tensor, size: int, axis: int) -> Tensor:
    """Whether any of the ``size`` places around each one along ``axis`` (-1 or -2) is true."""
    before = size // 2 + 1  # one more, so that the sum before the first place is there
    pad = (before, size - size // 2 - 1)
    sums = F.pad(mask.to(torch.int32), pad if axis == -1 else (0, 0, *pad)).cumsum(axis, dtype=torch.int32)
    length = mask.shape[axis]
    return sums.narrow(axis, size, length) > sums.narrow(axis, 0, length)


def _median(values: Tensor, chosen: Tensor) -> Tensor:
    """Median of the ``chosen`` ones of ``values`` (..., N), the mean of the middle two: (..., 1); infinite for none."""
    ordered = torch.where(chosen, values, float("inf")).sort(-1).values
    count = chosen.sum(-1, keepdim=True)
    low, high = (ordered.gather(-1, (count + shift).clamp(min=0) // 2) for shift in (-1, 0))
    return torch.where(count > 0, (low + high) / 2, float("inf"))
