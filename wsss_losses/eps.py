"""Saliency as pixel supervision of class maps (EPS).

Axis letters: B batch, K foreground classes, C = 1 + K maps with the background first, H W map size.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_losses._reduction import Reduction, check_reduction, reduce
from wsss_losses._soft_margin import soft_margin_costs
from wsss_modules import route_by_saliency
from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules.saliency import check_eps_mode, check_foreground_weight, saliency_on_grid

EpsMode = Literal["pixels", "once"]


def saliency_guided_map_loss(
    scores: Tensor,
    saliency: Tensor,
    labels: Tensor,
    valid: Tensor | None = None,
    *,
    threshold: float = 0.4,
    foreground_weight: float = 0.5,
    eps: float = 1e-4,
    eps_mode: EpsMode = "pixels",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared difference of a saliency map and the one that the class maps make.

    With :math:`p = softmax(scores)` over background and classes, the present classes are parted into those that are
    salient objects (kept) and the others, see :func:`wsss_modules.route_by_saliency`, and

    .. math::
        fg = \sum_{kept} p_k, \quad bg = p_0 + \sum_{present, not\ kept} p_k, \quad
        \hat s = \lambda\, fg + (1 - \lambda)(1 - bg), \quad L = \operatorname{mean} (\hat s - s)^2

    Args:
        scores: (B, 1+K, H, W) float, signed class maps, background first; see
            :class:`wsss_modules.BackgroundAwareCAMHead`.
        saliency: (B, 1, H', W') float, foreground probability in [0, 1]; read at the nearest pixel of the maps.
        labels: (B, K) multi-hot; present means greater than 0.
        valid: (B, 1, H', W') bool or numbers, on any grid: only where it is above 0 are maps compared, means taken and
            classes judged; by default everywhere, padding included, as released.
        threshold: least share of a class's area that must be salient; 0.4 for VOC and COCO.
        foreground_weight: lambda, in [0, 1]; 0.5 for VOC, 0.9 for COCO.
        eps: keeps the divisor of that share from 0.
        eps_mode: ``"pixels"`` (released) or ``"once"``, see :func:`wsss_modules.route_by_saliency`.
        reduction: ``"mean"`` over all images and pixels, ``"sum"`` over images of the mean over pixels, or ``"none"``:
            (B,).

    Returns:
        Scalar or (B,), in [0, 1], in the dtype of ``scores``.

    Raises:
        TypeError: if ``scores`` or ``saliency`` is not floating point.
        ValueError: if a shape does not fit, or an option is unknown or out of range.

    Paper:
        Lee, Lee, Lee and Shim, "Railroad is not a Train: Saliency as Pseudo-pixel Supervision for Weakly Supervised
        Semantic Segmentation", CVPR 2021, arXiv:2105.08965.

    Differences:
        The parser of the released code has a threshold of 0.5 by default, its scripts give 0.4.

    Notes:
        Absent classes belong to neither map, so that with :math:`\lambda < 1` they are pushed up in the salient area
        through ``1 - bg``, and down by the classification. No gradient flows through the routing. The estimate is
        affine in p: one sum over channels with weights (B, C), no masks of the size of the maps. Where the image was
        padded, a saliency of 0 makes the padding supervised background, unless ``valid`` leaves it out; an image that
        is padding only costs 0. The terms of an image don't depend on the others. Computed in float32 for half
        precision. Works in ``torch.compile(fullgraph=True)``.

    Example:
        >>> import torch
        >>> from wsss_losses import saliency_guided_map_loss
        >>> scores = torch.tensor([[[[0.0, 8.0]], [[8.0, 0.0]]]])  # background, and one class on the left
        >>> saliency_guided_map_loss(scores, torch.tensor([[[[1.0, 0.0]]]]), torch.ones(1, 1)) < 1e-6
        tensor(True)
    """
    _check_options(foreground_weight, eps_mode, reduction)
    check_ndim("scores", scores, 4, "(B, 1+K, H, W)")
    check_floating("scores", scores)
    check_shape("labels", labels, (scores.shape[0], scores.shape[1] - 1), "to match scores")
    dtype = torch.promote_types(scores.dtype, torch.float32)
    target = saliency_on_grid(saliency, scores).to(dtype)
    p = scores.to(dtype).softmax(1)
    inside = None if valid is None else _on_grid(valid, scores).to(dtype)  # (B, 1, H, W), 0 or 1
    judged = p.detach() if inside is None else p.detach() * inside
    kept = route_by_saliency(judged, target, labels, threshold=threshold, eps=eps, eps_mode=eps_mode)
    # kept: lambda; background and present but not kept: -(1 - lambda); absent: 0
    of_classes = torch.where(kept, foreground_weight, foreground_weight - 1.0) * (labels > 0)
    weight = F.pad(of_classes.to(dtype), (1, 0), value=foreground_weight - 1)  # (B, C)
    with torch.autocast(scores.device.type, enabled=False):
        estimate = (1 - foreground_weight) + torch.einsum("bchw,bc->bhw", p, weight)
    difference = (estimate - target[:, 0]).square()
    if inside is None:
        cost = difference.mean((1, 2))  # (B,)
    else:
        cost = (difference * inside[:, 0]).sum((1, 2)) / inside[:, 0].sum((1, 2)).clamp(min=1)
    return reduce(cost, reduction).to(scores.dtype)


def _on_grid(valid: Tensor, maps: Tensor) -> Tensor:
    check_shape("valid", valid, (maps.shape[0], 1, None, None), "to match the class maps")
    return saliency_on_grid((valid > 0).float(), maps)


def _check_options(foreground_weight: float, eps_mode: str, reduction: str) -> None:
    check_foreground_weight(foreground_weight)
    check_eps_mode(eps_mode)
    check_reduction(reduction)


class SaliencyGuidedMapLoss(nn.Module):
    """Saliency as supervision of class maps; see :func:`saliency_guided_map_loss`.

    Args:
        threshold: least share of a class's area that must be salient.
        foreground_weight: lambda, 0.5 for VOC, 0.9 for COCO.
        eps: keeps the divisor of that share from 0.
        eps_mode: ``"pixels"`` or ``"once"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from wsss_losses import SaliencyGuidedMapLoss
        >>> _ = torch.manual_seed(0)
        >>> scores, saliency = torch.randn(2, 4, 7, 7, requires_grad=True), torch.rand(2, 1, 56, 56)
        >>> SaliencyGuidedMapLoss()(scores, saliency, torch.tensor([[1, 0, 0], [1, 0, 1]])).backward()
    """

    def __init__(
        self,
        *,
        threshold: float = 0.4,
        foreground_weight: float = 0.5,
        eps: float = 1e-4,
        eps_mode: EpsMode = "pixels",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_options(foreground_weight, eps_mode, reduction)
        self.threshold, self.foreground_weight, self.eps = threshold, foreground_weight, eps
        self.eps_mode: EpsMode = eps_mode
        self.reduction: Reduction = reduction

    def forward(self, scores: Tensor, saliency: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
        """Class maps, saliency and labels -> loss."""
        return saliency_guided_map_loss(
            scores,
            saliency,
            labels,
            valid,
            threshold=self.threshold,
            foreground_weight=self.foreground_weight,
            eps=self.eps,
            eps_mode=self.eps_mode,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"threshold={self.threshold}, foreground_weight={self.foreground_weight}, eps={self.eps}, "
            f"eps_mode={self.eps_mode!r}, reduction={self.reduction!r}"
        )


class EPSTerms(NamedTuple):
    """``total = classification + saliency``, scalars or (B,)."""

    total: Tensor
    classification: Tensor
    saliency: Tensor


def eps_loss(
    logits: Tensor,
    scores: Tensor,
    saliency: Tensor,
    labels: Tensor,
    valid: Tensor | None = None,
    *,
    threshold: float = 0.4,
    foreground_weight: float = 0.5,
    eps: float = 1e-4,
    eps_mode: EpsMode = "pixels",
    reduction: Reduction = "mean",
) -> EPSTerms:
    """Objective of EPS: the multi-label loss of the image plus that of its saliency map, in equal parts.

    Args:
        logits: (B, K) float, scores of the images; see :class:`wsss_modules.BackgroundAwareCAMHead`.
        scores: (B, 1+K, H, W) float, see :func:`saliency_guided_map_loss`.
        saliency: (B, 1, H', W') float in [0, 1].
        labels: (B, K) multi-hot.
        valid: (B, 1, H', W'), see :func:`saliency_guided_map_loss`.
        threshold: see :func:`saliency_guided_map_loss`.
        foreground_weight: see :func:`saliency_guided_map_loss`.
        eps: see :func:`saliency_guided_map_loss`.
        eps_mode: see :func:`saliency_guided_map_loss`.
        reduction: ``"mean"`` over images, ``"sum"`` or ``"none"``.

    Returns:
        The total and both terms, in the dtype of ``logits``.

    Raises:
        TypeError: if ``logits``, ``scores`` or ``saliency`` is not floating point.
        ValueError: if a shape does not fit, or an option is unknown or out of range.

    Paper:
        Lee et al., CVPR 2021, arXiv:2105.08965.

    Example:
        >>> import torch
        >>> from wsss_losses import eps_loss
        >>> from wsss_modules import BackgroundAwareCAMHead
        >>> _ = torch.manual_seed(0)
        >>> out, labels = BackgroundAwareCAMHead(8, 3)(torch.rand(2, 8, 5, 5)), torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> terms = eps_loss(out.logits, out.scores, torch.rand(2, 1, 40, 40), labels)
        >>> bool(terms.total == terms.classification + terms.saliency)
        True
    """
    check_ndim("logits", logits, 2, "(B, K)")
    check_floating("logits", logits)
    check_shape("labels", labels, logits.shape, "to match logits")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    of_saliency = saliency_guided_map_loss(
        scores.to(dtype) if scores.is_floating_point() else scores,
        saliency,
        labels,
        valid,
        threshold=threshold,
        foreground_weight=foreground_weight,
        eps=eps,
        eps_mode=eps_mode,
        reduction=reduction,
    )
    classification = reduce(soft_margin_costs("logits", logits, labels), reduction)
    terms = classification + of_saliency, classification, of_saliency
    return EPSTerms(*(term.to(logits.dtype) for term in terms))


class EPSLoss(nn.Module):
    """Multi-label loss plus saliency as supervision of the class maps; see :func:`eps_loss`.

    Args:
        threshold: least share of a class's area that must be salient.
        foreground_weight: lambda, 0.5 for VOC, 0.9 for COCO.
        eps: keeps the divisor of that share from 0.
        eps_mode: ``"pixels"`` or ``"once"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from wsss_losses import EPSLoss
        >>> from wsss_modules import BackgroundAwareCAMHead
        >>> _ = torch.manual_seed(0)
        >>> out, labels = BackgroundAwareCAMHead(8, 3)(torch.rand(2, 8, 5, 5)), torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> EPSLoss()(out.logits, out.scores, torch.rand(2, 1, 40, 40), labels).total.backward()
    """

    def __init__(
        self,
        *,
        threshold: float = 0.4,
        foreground_weight: float = 0.5,
        eps: float = 1e-4,
        eps_mode: EpsMode = "pixels",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_options(foreground_weight, eps_mode, reduction)
        self.threshold, self.foreground_weight, self.eps = threshold, foreground_weight, eps
        self.eps_mode: EpsMode = eps_mode
        self.reduction: Reduction = reduction

    def forward(
        self, logits: Tensor, scores: Tensor, saliency: Tensor, labels: Tensor, valid: Tensor | None = None
    ) -> EPSTerms:
        """Image logits, class maps, saliency and labels -> total and terms."""
        return eps_loss(
            logits,
            scores,
            saliency,
            labels,
            valid,
            threshold=self.threshold,
            foreground_weight=self.foreground_weight,
            eps=self.eps,
            eps_mode=self.eps_mode,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"threshold={self.threshold}, foreground_weight={self.foreground_weight}, eps={self.eps}, "
            f"eps_mode={self.eps_mode!r}, reduction={self.reduction!r}"
        )
