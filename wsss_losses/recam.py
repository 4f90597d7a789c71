"""Softmax cross-entropy on class-masked features, and the whole objective of ReCAM.

Axes: B images, K foreground classes, D feature channels, M (image, present class) pairs of a batch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_losses._reduction import check_reduction, reduce
from wsss_modules._checks import check_floating, check_ndim, check_shape

Reduction = Literal["mean", "sum", "none"]


class SoftmaxReactivationTerms(NamedTuple):
    """``total``: the loss, a scalar or (B,); ``accuracy``: share of right answers, a scalar without gradient."""

    total: Tensor
    accuracy: Tensor


def sce_reactivation_loss(
    class_features: Tensor,
    labels: Tensor,
    recam_weight: Tensor,
    *,
    reduction: Reduction = "mean",
    empty_accuracy: float = 0.0,
) -> SoftmaxReactivationTerms:
    r"""Softmax cross-entropy in which every present class of an image is a sample of its own.

    .. math::
        L_b = \frac{1}{|P_b|} \sum_{k \in P_b}
        \Big[ \log \sum_{j=1}^{K} e^{w'_j \cdot z_{bk}} - w'_k \cdot z_{bk} \Big]

    with :math:`P_b` the present classes of image b and :math:`z_{bk}` its features under the map of class k. The
    classes that are absent stay in the denominator. Images count equally, however many classes they have.

    Args:
        class_features: z, floating point: (B, K, D) for all classes, of which only the present ones are read, or
            (M, D) for the present ones, ordered by image and then by class. See
            :func:`wsss_modules.class_masked_pooling`, :func:`wsss_modules.pool_present_classes`.
        labels: (B, K) multi-hot; above 0 means present.
        recam_weight: w', (K, D), or (K, D, 1, 1) as a convolution stores it.
        reduction: "mean" over the B images, "sum", or "none" for (B,).
        empty_accuracy: the accuracy of a batch without a label; ``math.nan`` keeps it out of a later average.

    Returns:
        The loss, 0 for an image without a label, and the share of the M samples whose largest logit is that of their
        class, both in the dtype of ``class_features``.

    Raises:
        TypeError: ``class_features`` or ``recam_weight`` is not floating point.
        ValueError: shapes don't match, or an unknown ``reduction``.

    Paper:
        Chen et al., "Class Re-Activation Maps for Weakly-Supervised Semantic Segmentation", CVPR 2022,
        arXiv:2203.00962.

    Differences:
        A batch without any label makes the released code return a number without a graph and divide by zero in the
        accuracy; here the loss is 0 and attached. As there, images without a label count in the mean, and soft labels
        are taken as hard ones.

    Notes:
        No statistics over the batch: under DDP the mean over processes with equal batches is that of one process; the
        accuracy is the process's own. Computed in float32 for half precision. With (B, K, D) it compiles with
        ``fullgraph=True``; with (M, D), whose size depends on the labels, the graph breaks.

    Example:
        >>> import torch
        >>> from wsss_losses import sce_reactivation_loss
        >>> class_features = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> sce_reactivation_loss(class_features, torch.tensor([[1, 1, 0]]), weight)
        SoftmaxReactivationTerms(total=tensor(0.8955), accuracy=tensor(0.5000))
    """
    _check_options(reduction)
    cost, accuracy = _sample_costs(class_features, labels, recam_weight, empty_accuracy)
    dtype = class_features.dtype
    return SoftmaxReactivationTerms(reduce(cost, reduction).to(dtype), accuracy.to(dtype))


class SoftmaxReactivationLoss(nn.Module):
    """Softmax cross-entropy of the present classes' features; see :func:`sce_reactivation_loss`.

    The second classifier is part of :class:`wsss_modules.ReCAMHead`; its weights come with each call.

    Args:
        reduction: "mean", "sum" or "none".
        empty_accuracy: the accuracy of a batch without a label.

    Example:
        >>> import torch
        >>> from wsss_losses import SoftmaxReactivationLoss
        >>> from wsss_modules import ReCAMHead
        >>> _ = torch.manual_seed(0)
        >>> out = ReCAMHead(8, num_classes=3)(torch.rand(2, 8, 5, 5))
        >>> labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> SoftmaxReactivationLoss()(out.class_features, labels, out.recam_weight).total.backward()
    """

    def __init__(self, *, reduction: Reduction = "mean", empty_accuracy: float = 0.0) -> None:
        super().__init__()
        _check_options(reduction)
        self.reduction: Reduction = reduction
        self.empty_accuracy = empty_accuracy

    def forward(self, class_features: Tensor, labels: Tensor, recam_weight: Tensor) -> SoftmaxReactivationTerms:
        """Class features, labels and the second classifier -> loss and accuracy."""
        return sce_reactivation_loss(
            class_features, labels, recam_weight, reduction=self.reduction, empty_accuracy=self.empty_accuracy
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"reduction={self.reduction!r}, empty_accuracy={self.empty_accuracy}"


class ReCAMTerms(NamedTuple):
    """``total = multi_label + sce_weight * reactivation``, scalars or (B,), and the ``accuracy`` of the second."""

    total: Tensor
    multi_label: Tensor
    reactivation: Tensor
    accuracy: Tensor


def recam_loss(
    logits: Tensor,
    class_features: Tensor,
    labels: Tensor,
    recam_weight: Tensor,
    *,
    sce_weight: float = 1.0,
    reduction: Reduction = "mean",
    empty_accuracy: float = 0.0,
) -> ReCAMTerms:
    r"""Objective of ReCAM: the multi-label loss of the image plus the softmax loss of its classes.

    .. math:: L = L_{bce}(\mathrm{logits}, y) + \lambda \, L_{sce}(z, y)

    with the binary cross-entropy averaged over the K classes ("multi-label soft margin") and :math:`L_{sce}` that of
    :func:`sce_reactivation_loss`. The first asks of each class alone whether it is there, so that a pixel may speak
    for several at once; the second makes them compete for it.

    Args:
        logits: (B, K) floating point, scores of the images.
        class_features: (B, K, D), or (M, D) for the present classes, see :func:`sce_reactivation_loss`.
        labels: (B, K) multi-hot; values between 0 and 1 are soft for the first loss and present for the second.
        recam_weight: (K, D), or (K, D, 1, 1), the second classifier.
        sce_weight: lambda, at least 0; 1 for VOC, 0.1 for COCO.
        reduction: "mean" over the B images, "sum", or "none" for (B,).
        empty_accuracy: the accuracy of a batch without a label.

    Returns:
        The total, both losses and the accuracy of the second classifier, in the dtype of ``logits``.

    Raises:
        TypeError: ``logits``, ``class_features`` or ``recam_weight`` is not floating point.
        ValueError: shapes don't match, a negative ``sce_weight``, or an unknown ``reduction``.

    Paper:
        Chen et al., "Class Re-Activation Maps for Weakly-Supervised Semantic Segmentation", CVPR 2022,
        arXiv:2203.00962.

    Differences:
        See :func:`sce_reactivation_loss` for batches without labels.

    Notes:
        Compiles with ``fullgraph=True`` if ``class_features`` are those of all classes. Computed in float32 for half
        precision. Under DDP exact without synchronisation, as no term depends on the rest of the batch.

    Example:
        >>> import torch
        >>> from wsss_losses import recam_loss
        >>> from wsss_modules import ReCAMHead
        >>> _ = torch.manual_seed(0)
        >>> labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> out = ReCAMHead(8, num_classes=3)(torch.rand(2, 8, 5, 5), labels)  # only present classes are pooled
        >>> terms = recam_loss(out.logits, out.class_features, labels, out.recam_weight, sce_weight=0.5)
        >>> bool(torch.isclose(terms.total, terms.multi_label + 0.5 * terms.reactivation))
        True
    """
    check_ndim("logits", logits, 2, "(B, K)")
    check_floating("logits", logits)
    check_shape("labels", labels, logits.shape, "to match logits")
    _check_options(reduction, sce_weight)
    cost, accuracy = _sample_costs(class_features, labels, recam_weight, empty_accuracy)
    scores = logits.to(cost.dtype)
    bce = F.binary_cross_entropy_with_logits(scores, labels.to(cost.dtype), reduction="none").mean(1)
    first, second = reduce(bce, reduction), reduce(cost, reduction)
    terms = first + sce_weight * second, first, second, accuracy
    return ReCAMTerms(*(term.to(logits.dtype) for term in terms))


class ReCAMLoss(nn.Module):
    """Multi-label loss plus softmax loss of the present classes; see :func:`recam_loss`.

    Args:
        sce_weight: lambda, at least 0; 1 for VOC, 0.1 for COCO.
        reduction: "mean", "sum" or "none".
        empty_accuracy: the accuracy of a batch without a label.

    Example:
        >>> import torch
        >>> from wsss_losses import ReCAMLoss
        >>> from wsss_modules import ReCAMHead
        >>> _ = torch.manual_seed(0)
        >>> out = ReCAMHead(8, num_classes=3)(torch.rand(2, 8, 5, 5))
        >>> labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> ReCAMLoss()(out.logits, out.class_features, labels, out.recam_weight).total.backward()
    """

    def __init__(self, *, sce_weight: float = 1.0, reduction: Reduction = "mean", empty_accuracy: float = 0.0) -> None:
        super().__init__()
        _check_options(reduction, sce_weight)
        self.sce_weight = sce_weight
        self.reduction: Reduction = reduction
        self.empty_accuracy = empty_accuracy

    def forward(self, logits: Tensor, class_features: Tensor, labels: Tensor, recam_weight: Tensor) -> ReCAMTerms:
        """Image logits, class features, labels and the second classifier -> total and terms."""
        return recam_loss(
            logits,
            class_features,
            labels,
            recam_weight,
            sce_weight=self.sce_weight,
            reduction=self.reduction,
            empty_accuracy=self.empty_accuracy,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"sce_weight={self.sce_weight}, reduction={self.reduction!r}, empty_accuracy={self.empty_accuracy}"


def _sample_costs(
    class_features: Tensor, labels: Tensor, recam_weight: Tensor, empty_accuracy: float
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the present classes of each image (B,), and the accuracy over all of them ()."""
    check_ndim("labels", labels, 2, "(B, K)")
    if labels.shape[1] == 0:
        raise ValueError(f"labels: expected at least one class, got shape {tuple(labels.shape)}")
    check_floating("class_features", class_features)
    check_floating("recam_weight", recam_weight)
    weight = recam_weight
    if weight.ndim == 4:
        check_shape("recam_weight", weight, (labels.shape[1], None, 1, 1), "to match labels")
        weight = weight.flatten(1)
    check_shape("recam_weight", weight, (labels.shape[1], None), "to match labels")
    channels, present = weight.shape[1], labels > 0
    dtype = torch.promote_types(class_features.dtype, torch.float32)
    with torch.autocast(class_features.device.type, enabled=False):
        w = weight.to(dtype)
        if class_features.ndim == 2:
            image, target = present.nonzero(as_tuple=True)
            check_shape("class_features", class_features, (len(target), channels), "for the present classes of labels")
            logits = F.linear(class_features.to(dtype), w)  # (M, K)
            entropy = F.cross_entropy(logits, target, reduction="none")
            cost = logits.new_zeros(labels.shape).index_put((image, target), entropy)
            right = logits.argmax(1) == target
        else:
            check_shape("class_features", class_features, (*labels.shape, channels), "to match labels, recam_weight")
            samples = torch.where(present[:, :, None], class_features, 0.0).to(dtype)
            logits = F.linear(samples, w)  # (B, K, K)
            target = torch.arange(labels.shape[1], device=labels.device).expand(labels.shape)
            known = torch.where(present, target, -100)
            cost = F.cross_entropy(logits.mT, known, reduction="none", ignore_index=-100)  # (B, K)
            right = (logits.argmax(2) == target) & present
        mean = cost.sum(1) / present.sum(1).clamp(min=1)
    count = present.sum()
    accuracy = torch.where(count > 0, right.sum() / count.clamp(min=1), empty_accuracy)
    return mean, accuracy


def _check_options(reduction: str, sce_weight: float = 0.0) -> None:
    check_reduction(reduction)
    if sce_weight < 0:
        raise ValueError(f"sce_weight: expected at least 0, got {sce_weight}")
