"""ViT-PCM: cross-entropy of max-pooled patch probabilities, and equivariance of patch predictions.

Axes: B images, K classes *including background at 0*, h w patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsss_losses._reduction import Reduction, check_reduction, reduce
from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32


def pooled_probability_bce_loss(
    pooled: Tensor, labels: Tensor, *, eps: float = 1e-7, reduction: Reduction = "mean"
) -> Tensor:
    r"""Binary cross-entropy of the probabilities that the surest patch gives each class.

    .. math::
        L_b = -\frac{1}{K} \sum_k \big[ y_k \log(q_k + \epsilon) + (1 - y_k) \log(1 - q_k + \epsilon) \big], \qquad
        q = \mathrm{clip}(\hat p, \epsilon, 1 - \epsilon)

    Args:
        pooled: (B, K) floating point in [0, 1], see :class:`wsss_modules.PatchClassifierGMP`.
        labels: y, (B, K) multi-hot, the background included.
        eps: least distance of a probability from 0 and 1.
        reduction: "mean" over the images, "sum", or "none" for (B,).

    Returns:
        A scalar or (B,), in the dtype of ``pooled``.

    Raises:
        TypeError: ``pooled`` is not floating point.
        ValueError: shapes don't match, an ``eps`` outside (0, 0.5), or an unknown ``reduction``.

    Paper:
        Rossetti et al., "Max Pooling with Vision Transformers Reconciles Class and Shape in Weakly Supervised Semantic
        Segmentation", ECCV 2022, arXiv:2210.17400, eq. 4.

    Differences:
        *Labels.* The released training reads them off the pixel masks: a class is there if it survives the shrinking of
        the mask, and the background is there if any pixel is background. That is more than image labels say. From tags
        alone, set the background to 1 for every image: photographs without any background are rare. The recipe does so,
        and takes its last checkpoint, where the released code chooses on masks of the validation images.

        *Arithmetic.* The second epsilon, inside the logarithms, is part of the Keras formula. A score that is clipped
        gets no gradient, however wrong it is. For a live gradient everywhere, feed
        :func:`multi_label_soft_margin_loss` with the ``pooled_logits`` of the classifier, which are the exact log-odds
        of the same scores.

    Notes:
        1 - 1e-7 rounds to 1 in half precision: computed in float32 at least. No statistics over the batch. Compiles
        with ``fullgraph=True``.

    Example:
        >>> import torch
        >>> from wsss_losses import pooled_probability_bce_loss
        >>> pooled_probability_bce_loss(torch.tensor([[0.9, 0.5, 0.0]]), torch.tensor([[1, 1, 0]]))
        tensor(0.2662)
    """
    check_ndim("pooled", pooled, 2, "(B, K)")
    check_floating("pooled", pooled)
    check_shape("labels", labels, pooled.shape, "to match pooled")
    _check_options(eps, reduction)
    q = at_least_float32(pooled).clamp(eps, 1 - eps)
    y = labels.to(q.dtype)
    cost = -(y * torch.log(q + eps) + (1 - y) * torch.log(1 - q + eps)).mean(1)
    return reduce(cost, reduction).to(pooled.dtype)


class PooledProbabilityBCELoss(nn.Module):
    """Cross-entropy of max-pooled patch probabilities; see :func:`pooled_probability_bce_loss`.

    Args:
        eps: least distance of a probability from 0 and 1.
        reduction: "mean", "sum" or "none".

    Example:
        >>> import torch
        >>> from wsss_losses import PooledProbabilityBCELoss
        >>> from wsss_modules import PatchClassifierGMP
        >>> out = PatchClassifierGMP(8, num_classes=3)(torch.randn(2, 8, 4, 6))
        >>> PooledProbabilityBCELoss()(out.pooled, torch.tensor([[1, 0, 1], [1, 1, 0]])).backward()
    """

    def __init__(self, *, eps: float = 1e-7, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_options(eps, reduction)
        self.eps = eps
        self.reduction: Reduction = reduction

    def forward(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Pooled probabilities and labels (B, K) -> loss."""
        return pooled_probability_bce_loss(pooled, labels, eps=self.eps, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"eps={self.eps}, reduction={self.reduction!r}"


def patch_equivariance_loss(
    view_probs: Tensor, target: Tensor, *, eps: float = 1e-7, reduction: Reduction = "mean"
) -> Tensor:
    r"""Cross-entropy of the patch probabilities of a transformed image against those of the image, transformed.

    .. math:: L_b = -\frac{1}{hw} \sum_u \sum_k t_{k,u} \log q_{k,u}, \qquad
        q = \mathrm{clip}\Big(\frac{p_k}{\sum_j p_j}, \epsilon, 1 - \epsilon\Big)

    Args:
        view_probs: p, (B, K, h, w) floating point, at least 0: probabilities of the transformed images.
        target: t, (B, K, h, w), at least 0, a constant: see :func:`wsss_modules.equivariance_target`.
        eps: least distance of a probability from 0 and 1.
        reduction: "mean" over the images, "sum", or "none" for (B,).

    Returns:
        A scalar or (B,), in the dtype of ``view_probs``; 0 for an image whose target is 0 everywhere.

    Raises:
        TypeError: ``view_probs`` is not floating point.
        ValueError: shapes don't match, an ``eps`` outside (0, 0.5), or an unknown ``reduction``.

    Paper:
        Rossetti et al., ECCV 2022, arXiv:2210.17400, section 3.4.

    Notes:
        No gradient reaches ``target``. Computed in float32 for half precision; no statistics over the batch. Compiles
        with ``fullgraph=True``.

    Example:
        >>> import torch
        >>> from wsss_losses import patch_equivariance_loss
        >>> from wsss_modules import PatchTransform, equivariance_target
        >>> _ = torch.manual_seed(0)
        >>> first, view = PatchTransform.draw(4), PatchTransform.draw(4)
        >>> probs, view_probs = (torch.randn(4, 3, 6, 6).softmax(1) for _ in range(2))
        >>> target = equivariance_target(probs, torch.tensor([[1, 1, 0]] * 4), first, view)
        >>> patch_equivariance_loss(view_probs, target).shape
        torch.Size([])
    """
    check_ndim("view_probs", view_probs, 4, "(B, K, h, w)")
    check_floating("view_probs", view_probs)
    check_shape("target", target, view_probs.shape, "to match view_probs")
    _check_options(eps, reduction)
    p = at_least_float32(view_probs)
    total = p.sum(1, keepdim=True)
    q = (p / torch.where(total > 0, total, 1.0)).clamp(eps, 1 - eps)
    cost = -(target.detach().to(q.dtype) * q.log()).sum(1).mean((1, 2))
    return reduce(cost, reduction).to(view_probs.dtype)


class PatchEquivarianceLoss(nn.Module):
    """Cross-entropy between the predictions of two views of an image; see :func:`patch_equivariance_loss`.

    Args:
        eps: least distance of a probability from 0 and 1.
        reduction: "mean", "sum" or "none".

    Example:
        >>> import torch
        >>> from wsss_losses import PatchEquivarianceLoss
        >>> PatchEquivarianceLoss()(torch.full((2, 4, 3, 3), 0.25), torch.full((2, 4, 3, 3), 0.25))
        tensor(1.3863)
    """

    def __init__(self, *, eps: float = 1e-7, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_options(eps, reduction)
        self.eps = eps
        self.reduction: Reduction = reduction

    def forward(self, view_probs: Tensor, target: Tensor) -> Tensor:
        """Probabilities of the views and what they should be (B, K, h, w) -> loss."""
        return patch_equivariance_loss(view_probs, target, eps=self.eps, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"eps={self.eps}, reduction={self.reduction!r}"


def _check_options(eps: float, reduction: str) -> None:
    check_reduction(reduction)
    if not 0 < eps < 0.5:
        raise ValueError(f"eps: expected a number between 0 and 0.5, got {eps}")
