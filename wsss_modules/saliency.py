"""What a saliency map says about class scores: label maps, and which classes are foreground.

Axes: B images, K foreground classes of the image at hand, H W pixels.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules._precision import at_least_float32
from wsss_modules.cam import cam_to_mask

__all__ = [
    "SaliencyMaps",
    "edam_pseudo_label",
    "estimate_saliency",
    "fuse_saliency_labels",
    "route_by_saliency",
    "saliency_guided_scores",
]


def saliency_guided_scores(
    cam: Tensor, saliency: Tensor, *, salient: float = 20 / 255, alpha: float = 1e-6, beta: float = 0.99999
) -> Tensor:
    """Put a saliency map in front of class scores as the background, and make weak and certain scores decisive (EDAM).

    The background is 1 where the image is not salient, else 0. A class score below ``alpha`` becomes -2, one above
    ``beta`` 2. So where nothing is salient only a class that is all but certain wins; elsewhere the best class wins,
    unless none reaches ``alpha``.

    Args:
        cam: (B, K, H, W) floating point in [0, 1], class scores, before or after a CRF; absent classes 0. K may be 0.
        saliency: (B, 1, H, W) floating-point foreground probability in [0, 1].
        salient: Saliency up to which a pixel is not salient: 20 grey levels.
        alpha: Least score of a class.
        beta: Score above which a class needs no saliency.

    Returns:
        scores (B, 1+K, H, W), in -2..2, in the dtype of ``cam``.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: a wrong shape, or ``alpha`` above ``beta``.

    Paper:
        Wu et al., Embedded Discriminative Attention Mechanism for Weakly Supervised Semantic Segmentation, CVPR 2021.

    Differences:
        The released inference script fails, or ignores the saliency after a CRF; this is the rule of its evaluation.

    Notes:
        Works in ``torch.compile(fullgraph=True)``.

    Example:
        >>> cam, saliency = torch.tensor([[[[0.6, 0.6, 0.0, 1.0]]]]), torch.tensor([[[[0.9, 0.0, 0.9, 0.0]]]])
        >>> saliency_guided_scores(cam, saliency)[0, :, 0]
        tensor([[ 0.0000,  1.0000,  0.0000,  1.0000],
                [ 0.6000,  0.6000, -2.0000,  2.0000]])
    """
    check_ndim("cam", cam, 4, "(B, K, H, W)")
    check_floating("cam", cam)
    check_shape("saliency", saliency, (len(cam), 1, *cam.shape[2:]), "to match cam")
    check_floating("saliency", saliency)
    if alpha > beta:
        raise ValueError(f"alpha: expected at most beta = {beta}, got {alpha}")
    decided = torch.where(cam < alpha, -2.0, torch.where(cam > beta, 2.0, cam))
    return torch.cat([(saliency <= salient).to(cam.dtype), decided.to(cam.dtype)], 1)


def edam_pseudo_label(
    cam: Tensor,
    saliency: Tensor | None = None,
    *,
    keys: Tensor | None = None,
    threshold: float = 0.5,
    salient: float = 20 / 255,
    alpha: float = 1e-6,
    beta: float = 0.99999,
) -> Tensor:
    """Label each pixel with its best class or background: by `saliency_guided_scores`, or by a constant threshold.

    Args:
        cam: (B, K, H, W) floating point in [0, 1]: masks divided by their maxima, or the class scores of a CRF.
        saliency: (B, 1, H, W) floating-point foreground probability in [0, 1]; without it ``threshold`` is the
            background score.
        keys: (K,) int64 class of each map, 1..K as in a mask; default: map k is class k + 1.
        threshold: Background score, only without ``saliency``.
        salient: See `saliency_guided_scores`.
        alpha: See `saliency_guided_scores`.
        beta: See `saliency_guided_scores`.

    Returns:
        mask (B, H, W) int64: 0 background or a class. The first of several equal scores wins.

    Raises:
        TypeError: a tensor of the wrong kind.
        ValueError: a wrong shape, or ``alpha`` above ``beta``.

    Paper:
        Wu et al., CVPR 2021.

    Notes:
        With ``saliency`` the labels rest on image tags and on saliency, which is supervision of its own.

    Example:
        >>> cam, saliency = torch.tensor([[[[0.6, 0.6, 0.0, 1.0]]]]), torch.tensor([[[[0.9, 0.0, 0.9, 0.0]]]])
        >>> edam_pseudo_label(cam, saliency, keys=torch.tensor([7])), edam_pseudo_label(cam)
        (tensor([[[7, 0, 0, 7]]]), tensor([[[1, 1, 0, 1]]]))
    """
    if saliency is None:
        return cam_to_mask(cam, threshold, keys=keys)
    label = saliency_guided_scores(cam, saliency, salient=salient, alpha=alpha, beta=beta).argmax(1)
    if keys is None:
        return label
    check_shape("keys", keys, cam.shape[1:2], "to match cam")
    check_integer("keys", keys)
    return torch.cat([keys.new_zeros(1), keys])[label]


def fuse_saliency_labels(
    scores: Tensor,
    saliency: Tensor,
    *,
    keys: Tensor | None = None,
    conflict: float = 0.9,
    attention: float = 0.8,
    salient: float = 32 / 255,
    min_score: float = 0.0,
    min_foreground: float = 0.01,
    ignore_index: int = 255,
) -> Tensor:
    """Label objects by their class scores and background by the lack of saliency; ignore where the two disagree (RCA).

    The background score is ``1 - saliency``, and the highest score wins. Scores below ``min_score`` count as 0. A pixel
    is ignored if more than one score is above ``conflict``; or if background wins although the pixel is salient, or
    some class scores above ``attention``. An image of which less than ``min_foreground`` is labelled with a class is
    ignored as a whole.

    Args:
        scores: (B, 1+K, H, W) float in [0, 1], background first, usually after a dense CRF. The background channel is
            not read: saliency takes its place. K may be 0.
        saliency: (B, 1, H, W) float foreground probability in [0, 1].
        keys: (K,) int64 class of each map, 1..K as in a mask; default: map k is class k.
        conflict: A score above this is a claim; two claims cancel out.
        attention: A class score above this makes a pixel foreground, whatever the saliency says.
        salient: Saliency from which a pixel can't be background.
        min_score: Least score, of the background too (NSROM: 0.3).
        min_foreground: Least share of the image.
        ignore_index: Value of ignored pixels.

    Returns:
        mask (B, H, W) int64: 0 background, a class, or ``ignore_index``. The first of several equal scores wins.

    Raises:
        TypeError: ``scores`` or ``saliency`` is not floating point, or ``keys`` does not hold integers.
        ValueError: a wrong shape.

    Paper:
        Zhou, Zhang, Zhao and Li, Regional Semantic Contrast and Aggregation for Weakly Supervised Semantic
        Segmentation, CVPR 2022, arXiv:2203.09653.

    Notes:
        Masks of this function rest on image labels and on saliency, which is supervision of its own. Works in
        ``torch.compile(fullgraph=True)``.

    Example:
        >>> scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.7, 0.3, 0.95, 0.2]])[None, :, None]
        >>> saliency = torch.tensor([0.8, 0.1, 0.02, 0.4])[None, None, None]
        >>> fuse_saliency_labels(scores, saliency, keys=torch.tensor([7]))  # class, background, two claims, salient
        tensor([[[  7,   0, 255, 255]]])
    """
    check_ndim("scores", scores, 4, "(B, 1+K, H, W)")
    check_floating("scores", scores)
    if scores.shape[1] == 0:
        raise ValueError("scores: expected the background at channel 0, got no channel")
    check_shape("saliency", saliency, (scores.shape[0], 1, *scores.shape[2:]), "to match scores")
    check_floating("saliency", saliency)
    if keys is not None:
        check_shape("keys", keys, (scores.shape[1] - 1,), "to match scores")
        check_integer("keys", keys)
    both = torch.cat([(1 - saliency).to(scores.dtype), scores[:, 1:]], 1)
    if min_score > 0:
        both = torch.where(both < min_score, 0.0, both)
    label = both.argmax(1)
    foreground = (saliency >= salient)[:, 0] | (scores[:, 1:] > attention).any(1)
    doubtful = ((both > conflict).sum(1) > 1) | (foreground & (label == 0))
    classes = label if keys is None else torch.cat([keys.new_zeros(1), keys])[label]
    return ignore_without_foreground(torch.where(doubtful, ignore_index, classes), min_foreground, ignore_index)


def ignore_without_foreground(mask: Tensor, min_foreground: float, ignore_index: int) -> Tensor:
    """``mask`` (B, H, W), all ``ignore_index`` where less than ``min_foreground`` of an image belongs to a class."""
    labelled = ((mask > 0) & (mask != ignore_index)).flatten(1).double().mean(1)  # double: 1 % exactly is enough
    return torch.where((labelled < min_foreground)[:, None, None], ignore_index, mask)


@torch.no_grad()
def route_by_saliency(
    probability: Tensor,
    saliency: Tensor,
    labels: Tensor,
    *,
    threshold: float = 0.4,
    eps: float = 1e-4,
    eps_mode: Literal["pixels", "once"] = "pixels",
) -> Tensor:
    r"""Which of the present classes are salient objects: those whose area lies in the salient area (EPS).

    .. math:: |\{p_k > .5\} \cap \{s > .5\}| \,/\, (|\{p_k > .5\}| + n \epsilon) > threshold

    with n the number of pixels. The others, such as the rails of a train or an object that saliency overlooks, belong
    to the background of the saliency map.

    Args:
        probability: (B, 1+K, H, W) in [0, 1], background first: the softmax of class maps.
        saliency: (B, 1, H', W') foreground probability in [0, 1]; read at the nearest pixel if the size differs.
        labels: (B, K) multi-hot.
        threshold: Least share of a class's area. From 1 on no class is kept, below 0 every present one.
        eps: Keeps the divisor from 0.
        eps_mode: "pixels": one ``eps`` for each pixel of the map, as released, so that small areas are judged a little
            more strictly on large maps; "once".

    Returns:
        (B, K) bool, True for present classes that are kept as foreground, without gradient.

    Raises:
        TypeError: ``probability`` or ``saliency`` is not floating point.
        ValueError: a wrong shape, or an unknown ``eps_mode``.

    Paper:
        Lee, Lee, Lee and Shim, Railroad is not a Train: Saliency as Pseudo-pixel Supervision for Weakly Supervised
        Semantic Segmentation, CVPR 2021, arXiv:2105.08965.

    Notes:
        The ratio is the precision of a class's area, not an intersection over union. A class that is nowhere above .5
        has ratio 0 and is not kept. Compiles with ``fullgraph=True``.

    Example:
        >>> probability = torch.tensor([[[[0.1, 0.1, 0.2]], [[0.9, 0.2, 0.0]], [[0.0, 0.7, 0.8]]]])
        >>> route_by_saliency(probability, torch.tensor([[[[1.0, 0.0, 0.0]]]]), torch.tensor([[1, 1]]))
        tensor([[ True, False]])
    """
    check_ndim("probability", probability, 4, "(B, 1+K, H, W)")
    check_floating("probability", probability)
    check_shape("labels", labels, (probability.shape[0], probability.shape[1] - 1), "to match probability")
    check_eps_mode(eps_mode)
    dtype = torch.promote_types(probability.dtype, torch.float32)
    salient = (saliency_on_grid(saliency, probability) > 0.5).to(dtype).flatten(2)  # (B, 1, N)
    hard = (probability[:, 1:] > 0.5).to(dtype).flatten(2)  # (B, K, N)
    with torch.autocast(probability.device.type, enabled=False):  # one pass over the maps counts both
        area, inside = (hard @ torch.cat([torch.ones_like(salient), salient], 1).mT).unbind(2)  # (B, K) each
    pixels = probability.shape[2] * probability.shape[3] if eps_mode == "pixels" else 1
    return (labels > 0) & (inside / (area + pixels * eps) > threshold)


class SaliencyMaps(NamedTuple):
    """What `estimate_saliency` returns.

    Attributes:
        foreground: (B, 1, H, W) sum of the kept classes, in [0, 1].
        background: (B, 1, H, W) sum of the background and of the present classes that are not kept, in [0, 1].
        estimate: (B, 1, H, W) the saliency estimated from both, in [0, 1].
    """

    foreground: Tensor
    background: Tensor
    estimate: Tensor


def estimate_saliency(
    probability: Tensor, kept: Tensor, labels: Tensor, *, foreground_weight: float = 0.5
) -> SaliencyMaps:
    r"""Saliency as class maps have it: :math:`\lambda\, fg + (1 - \lambda)(1 - bg)` (EPS).

    Absent classes belong to neither map, so that :math:`1 - bg` counts their mass as foreground.

    Args:
        probability: (B, 1+K, H, W) in [0, 1], background first: the softmax of class maps.
        kept: (B, K) bool, see `route_by_saliency`; read for present classes only.
        labels: (B, K) multi-hot.
        foreground_weight: lambda, in [0, 1]: 0.5 for VOC, 0.9 for COCO.

    Returns:
        `SaliencyMaps` in the dtype of ``probability``.

    Raises:
        TypeError: ``probability`` is not floating point.
        ValueError: a wrong shape, or a weight outside [0, 1].

    Paper:
        Lee et al., CVPR 2021, arXiv:2105.08965.

    Notes:
        `wsss_losses.saliency_guided_map_loss` computes the estimate as one weighted sum and makes neither of the other
        two maps.

    Example:
        >>> probability = torch.tensor([[[[0.1]], [[0.6]], [[0.3]]]])
        >>> maps = estimate_saliency(probability, torch.tensor([[True, False]]), torch.tensor([[1, 1]]))
        >>> [round(x.item(), 2) for x in maps]
        [0.6, 0.4, 0.6]
    """
    check_ndim("probability", probability, 4, "(B, 1+K, H, W)")
    check_floating("probability", probability)
    check_foreground_weight(foreground_weight)
    classes = (probability.shape[0], probability.shape[1] - 1)
    check_shape("labels", labels, classes, "to match probability")
    check_shape("kept", kept, classes, "to match probability")
    p, present = at_least_float32(probability), (labels > 0)[:, :, None, None]
    chosen = kept.bool()[:, :, None, None]
    foreground = torch.where(present & chosen, p[:, 1:], 0.0).sum(1, keepdim=True)
    background = p[:, :1] + torch.where(present & ~chosen, p[:, 1:], 0.0).sum(1, keepdim=True)
    estimate = foreground_weight * foreground + (1 - foreground_weight) * (1 - background)
    return SaliencyMaps(*(x.to(probability.dtype) for x in (foreground, background, estimate)))


def check_eps_mode(eps_mode: str) -> None:
    """Raise ``ValueError`` for an unknown ``eps_mode`` of `route_by_saliency`."""
    if eps_mode not in ("pixels", "once"):
        raise ValueError(f'eps_mode: expected "pixels" or "once", got {eps_mode!r}')


def check_foreground_weight(foreground_weight: float) -> None:
    """Raise ``ValueError`` for a weight outside [0, 1]."""
    if not 0 <= foreground_weight <= 1:
        raise ValueError(f"foreground_weight: expected a number in [0, 1], got {foreground_weight}")


def saliency_on_grid(saliency: Tensor, maps: Tensor) -> Tensor:
    """``saliency`` (B, 1, H', W') at the nearest pixels of ``maps`` (B, C, H, W): (B, 1, H, W), checked."""
    check_floating("saliency", saliency)
    check_shape("saliency", saliency, (maps.shape[0], 1, None, None), "to match the class maps")
    return saliency if saliency.shape[2:] == maps.shape[2:] else F.interpolate(saliency, maps.shape[2:], mode="nearest")
