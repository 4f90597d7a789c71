"""Agreement of the ordinary and the image-specific class activation maps, and the whole objective of SIPE.

Axes: B images, K foreground classes, H W cells.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_losses._reduction import Reduction, check_reduction, reduce
from wsss_modules._checks import check_floating, check_ndim, check_shape

Detach = Literal["cam", "is_cam"]


def general_specific_consistency_loss(
    scores: Tensor,
    is_cam: Tensor,
    valid: Tensor | None = None,
    *,
    detach: Detach | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""L1 distance of the ordinary and the image-specific CAM, background included.

    .. math:: L_b = \frac{1}{(1+K) H W} \sum_{c, i} |s_{bci} - m_{bci}|

    The ordinary ("general") map learns from the image-specific one where a whole object is, and holds it to what the
    classifier knows.

    Args:
        scores: s, (B, 1+K, H, W) floating point in [0, 1], background first: `Exploration.scores` of
            :func:`wsss_modules.explore_prototypes`.
        is_cam: m, (B, 1+K, H, W) floating point in [0, 1]: its ``is_cam``, divided by the maximum of each map
            (:func:`wsss_modules.normalize_cam`).
        valid: (B, 1 or 1+K, H, W) bool or numbers: differences are only counted where it is above 0; the divisor stays.
        detach: "cam" keeps the gradient from ``scores``, "is_cam" from ``is_cam``; by default both learn.
        reduction: "mean" over the images, "sum", or "none" for (B,).

    Returns:
        A scalar or (B,), at most 1 an image for maps in [0, 1], in the dtype of ``scores``.

    Raises:
        TypeError: ``scores`` or ``is_cam`` is not floating point.
        ValueError: shapes don't match, or an unknown ``detach`` or ``reduction``.

    Paper:
        Chen, Yang, Lai and Xie, "Self-supervised Image-specific Prototype Exploration for Weakly Supervised Semantic
        Segmentation", CVPR 2022, arXiv:2203.02909.

    Differences:
        In the released code the scores, but not the image-specific maps, are 0 in the padding of a crop, so that the
        loss pulls these to 0 there: the default. Give ``valid`` to leave the padding out. ``detach`` is not in it.

    Notes:
        Absent classes, 0 in both maps, add nothing but stay in the divisor: the same maps cost 81 / 21 times less
        among the classes of COCO than among those of VOC. No statistics over the batch. Computed in float32 for half
        precision. Compiles with ``fullgraph=True``.

    Example:
        >>> import torch
        >>> from wsss_losses import general_specific_consistency_loss
        >>> scores = torch.tensor([[[[1.0, 0.2]], [[0.0, 0.8]]]])
        >>> is_cam = torch.tensor([[[[1.0, 0.0]], [[0.2, 1.0]]]])
        >>> general_specific_consistency_loss(scores, is_cam)
        tensor(0.1500)
    """
    _check(scores, is_cam, valid, detach, reduction)
    return reduce(_distances(scores, is_cam, valid, detach), reduction).to(scores.dtype)


class GeneralSpecificConsistencyLoss(nn.Module):
    """L1 distance of the ordinary and the image-specific CAM; see :func:`general_specific_consistency_loss`.

    Args:
        detach: "cam", "is_cam" or None.
        reduction: "mean", "sum" or "none".

    Example:
        >>> import torch
        >>> from wsss_losses import GeneralSpecificConsistencyLoss
        >>> maps = torch.rand(2, 4, 5, 6)
        >>> GeneralSpecificConsistencyLoss()(maps, maps)
        tensor(0.)
    """

    def __init__(self, *, detach: Detach | None = None, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_options(detach, reduction)
        self.detach = detach
        self.reduction: Reduction = reduction

    def forward(self, scores: Tensor, is_cam: Tensor, valid: Tensor | None = None) -> Tensor:
        """Ordinary maps, image-specific maps and where they count -> loss."""
        return general_specific_consistency_loss(scores, is_cam, valid, detach=self.detach, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"detach={self.detach!r}, reduction={self.reduction!r}"


class SIPETerms(NamedTuple):
    """``total = classification + gsc_weight * consistency``, scalars or (B,)."""

    total: Tensor
    classification: Tensor
    consistency: Tensor


def sipe_loss(
    logits: Tensor,
    scores: Tensor,
    is_cam: Tensor,
    labels: Tensor,
    valid: Tensor | None = None,
    *,
    gsc_weight: float = 1.0,
    detach: Detach | None = None,
    reduction: Reduction = "mean",
) -> SIPETerms:
    r"""Objective of SIPE: the multi-label loss of the image plus the agreement of both kinds of maps.

    .. math:: L = L_{bce}(\mathrm{logits}, y) + \lambda \, L_{gsc}(s, m)

    with the binary cross-entropy averaged over the K classes and :func:`general_specific_consistency_loss`.

    Args:
        logits: (B, K) floating point, scores of the images.
        scores: (B, 1+K, H, W) ordinary maps with background, in [0, 1].
        is_cam: (B, 1+K, H, W) image-specific maps divided by their maxima.
        labels: (B, K) multi-hot.
        valid: (B, 1 or 1+K, H, W) where the maps are compared; default: everywhere, as released.
        gsc_weight: lambda, at least 0.
        detach: "cam", "is_cam" or None.
        reduction: "mean" over the images, "sum", or "none" for (B,).

    Returns:
        The total and both terms, in the dtype of ``logits``.

    Raises:
        TypeError: ``logits``, ``scores`` or ``is_cam`` is not floating point.
        ValueError: shapes don't match, a negative ``gsc_weight``, or an unknown ``detach`` or ``reduction``.

    Paper:
        Chen et al., "Self-supervised Image-specific Prototype Exploration for Weakly Supervised Semantic Segmentation",
        CVPR 2022, arXiv:2203.02909.

    Differences:
        See :func:`general_specific_consistency_loss`.

    Notes:
        Under DDP exact without synchronisation, as no term depends on the rest of the batch. Computed in float32 for
        half precision. Compiles with ``fullgraph=True``. The released training clips the gradient to length 1.

    Example:
        >>> import torch
        >>> from wsss_losses import sipe_loss
        >>> from wsss_modules import explore_prototypes, normalize_cam
        >>> _ = torch.manual_seed(0)
        >>> class_maps, labels = torch.randn(2, 3, 5, 6, requires_grad=True), torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> found = explore_prototypes(class_maps, torch.randn(2, 8, 5, 6), labels)
        >>> terms = sipe_loss(class_maps.mean((2, 3)), found.scores, normalize_cam(found.is_cam), labels)
        >>> bool(torch.isclose(terms.total, terms.classification + terms.consistency))
        True
    """
    check_ndim("logits", logits, 2, "(B, K)")
    check_floating("logits", logits)
    check_shape("labels", labels, logits.shape, "to match logits")
    check_shape("scores", scores, (len(logits), 1 + logits.shape[1], None, None), "to match logits")
    _check(scores, is_cam, valid, detach, reduction)
    _check_weight(gsc_weight)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    with torch.autocast(logits.device.type, enabled=False):
        bce = F.binary_cross_entropy_with_logits(logits.to(dtype), labels.to(dtype), reduction="none")
    costs = bce.sum(1) / max(1, bce.shape[1]), _distances(scores, is_cam, valid, detach)
    classification, consistency = (reduce(cost, reduction) for cost in costs)
    terms = classification + gsc_weight * consistency, classification, consistency
    return SIPETerms(*(term.to(logits.dtype) for term in terms))


class SIPELoss(nn.Module):
    """Multi-label loss plus agreement of both kinds of maps; see :func:`sipe_loss`.

    Args:
        gsc_weight: lambda, at least 0.
        detach: "cam", "is_cam" or None.
        reduction: "mean", "sum" or "none".

    Example:
        >>> import torch
        >>> from wsss_losses import SIPELoss
        >>> maps, labels = torch.rand(2, 4, 5, 6), torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> SIPELoss()(torch.zeros(2, 3), maps, maps, labels).total
        tensor(0.6931)
    """

    def __init__(self, *, gsc_weight: float = 1.0, detach: Detach | None = None, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_options(detach, reduction)
        _check_weight(gsc_weight)
        self.gsc_weight = gsc_weight
        self.detach = detach
        self.reduction: Reduction = reduction

    def forward(
        self, logits: Tensor, scores: Tensor, is_cam: Tensor, labels: Tensor, valid: Tensor | None = None
    ) -> SIPETerms:
        """Image logits, both kinds of maps, labels and where maps count -> total and terms."""
        return sipe_loss(
            logits,
            scores,
            is_cam,
            labels,
            valid,
            gsc_weight=self.gsc_weight,
            detach=self.detach,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"gsc_weight={self.gsc_weight}, detach={self.detach!r}, reduction={self.reduction!r}"


def _distances(scores: Tensor, is_cam: Tensor, valid: Tensor | None, detach: str | None) -> Tensor:
    """Mean absolute difference of the maps of each image: (B,)."""
    dtype = torch.promote_types(torch.promote_types(scores.dtype, is_cam.dtype), torch.float32)
    first = (scores.detach() if detach == "cam" else scores).to(dtype)
    second = (is_cam.detach() if detach == "is_cam" else is_cam).to(dtype)
    difference = first - second
    if valid is not None:
        difference = torch.where(valid > 0, difference, 0.0)
    return difference.abs().sum((1, 2, 3)) / max(1, difference[:1].numel())


def _check(scores: Tensor, is_cam: Tensor, valid: Tensor | None, detach: str | None, reduction: str) -> None:
    check_ndim("scores", scores, 4, "(B, 1+K, H, W)")
    check_floating("scores", scores)
    check_shape("is_cam", is_cam, scores.shape, "to match scores")
    check_floating("is_cam", is_cam)
    if valid is not None and tuple(valid.shape) != (len(scores), 1, *scores.shape[2:]):
        check_shape("valid", valid, scores.shape, "to match scores, or one channel")
    _check_options(detach, reduction)


def _check_options(detach: str | None, reduction: str) -> None:
    check_reduction(reduction)
    if detach not in (None, "cam", "is_cam"):
        raise ValueError(f'detach: expected "cam", "is_cam" or None, got {detach!r}')


def _check_weight(gsc_weight: float) -> None:
    if gsc_weight < 0:
        raise ValueError(f"gsc_weight: expected at least 0, got {gsc_weight}")
