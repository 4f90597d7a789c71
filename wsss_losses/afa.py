"""AFA: affinity from attention, the segmentation loss balanced over background and foreground, and the whole objective.

Axes: B images, K foreground classes, N cells of the attention, H W pixels of the mask, h w cells of the decoder.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_losses._reduction import Reduction, check_reduction, reduce
from wsss_losses._soft_margin import soft_margin_costs
from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules._distributed import sum_over_processes
from wsss_modules._precision import at_least_float32

PooledReduction = Literal["batch", "mean", "sum", "none"]
Form = Literal["linear", "log"]


def multi_label_soft_margin_loss(logits: Tensor, labels: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Binary cross-entropy of each class, averaged over the classes of an image.

    .. math:: L_b = -\frac{1}{K} \sum_k \big[ y_k \log \sigma(z_k) + (1 - y_k) \log(1 - \sigma(z_k)) \big]

    Args:
        logits: z, (B, K) floating point.
        labels: y, (B, K) multi-hot, or soft in [0, 1].
        reduction: "mean" over the images, "sum", or "none" for (B,).

    Returns:
        A scalar or (B,), in the dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point.
        ValueError: shapes don't match, or an unknown ``reduction``.

    Paper:
        As in Ru et al., "Learning Affinity from Attention: End-to-End Weakly-Supervised Semantic Segmentation with
        Transformers", CVPR 2022, arXiv:2203.02664, eq. 1, and many others.

    Differences:
        *Is the missing minus in AFA's printed equation a typo?* Yes. Without it the loss would be lowest where every
        prediction contradicts its label; the released code minimises the usual positive loss, as written above. There
        is no option for the other sign.

    Notes:
        ``F.multilabel_soft_margin_loss`` for any precision: computed in float32 for half precision, as its gradient.
        Compiles with ``fullgraph=True``; no statistics over the batch.

    Example:
        >>> import torch
        >>> from wsss_losses import multi_label_soft_margin_loss
        >>> multi_label_soft_margin_loss(torch.tensor([[2.0, -2.0]]), torch.tensor([[1, 0]]))
        tensor(0.1269)
    """
    check_reduction(reduction)
    return reduce(_soft_margin_costs(logits, labels), reduction).to(logits.dtype)


class MultiLabelSoftMarginLoss(nn.Module):
    """Binary cross-entropy of each class; see :func:`multi_label_soft_margin_loss`.

    Args:
        reduction: "mean", "sum" or "none".

    Example:
        >>> import torch
        >>> from wsss_losses import MultiLabelSoftMarginLoss
        >>> MultiLabelSoftMarginLoss()(torch.zeros(2, 3), torch.ones(2, 3))
        tensor(0.6931)
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits and labels (B, K) -> loss."""
        return multi_label_soft_margin_loss(logits, labels, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"reduction={self.reduction!r}"


def attention_affinity_loss(
    affinity: Tensor,
    target: Tensor,
    *,
    form: Form = "linear",
    reduction: PooledReduction = "batch",
    ignore_index: int = 255,
    eps: float = 1e-5,
    sync: bool = False,
) -> Tensor:
    r"""High affinity within a class, low affinity between classes, both groups of pairs weighing the same.

    .. math::
        L = \frac{1}{2\,(N^+ + 1)} \sum_{(i, j)^+} (1 - P_{ij}) + \frac{1}{2\,(N^- + 1)} \sum_{(i, j)^-} P_{ij}

    over the pairs with target 1 and those with target 0, N⁺ and N⁻ in number.

    Args:
        affinity: P, (B, N, N) floating point in [0, 1], see :class:`wsss_modules.AttentionAffinityHead`.
        target: (B, N, N) integers: 1 alike, 0 different, ``ignore_index`` unknown, see
            :func:`wsss_modules.labels_to_affinity`.
        form: "linear" as released; "log" puts -log(P + eps) and -log(1 + eps - P) in place of 1 - P and P, as PSA does.
        reduction: "batch" counts pairs over the whole batch, as released, so that the gradients of one image depend on
            the others; "mean", "sum" and "none" count them within each image.
        ignore_index: value of unknown pairs.
        eps: keeps the logarithms finite.
        sync: with "batch", sum counts and costs over the processes of a distributed run.

    Returns:
        A scalar or (B,), in [0, 1] if ``form`` is "linear"; exactly 0 without a pair. In the dtype of ``affinity``.

    Raises:
        TypeError: ``affinity`` is not floating point, or ``target`` not integers.
        ValueError: shapes differ, or an unknown ``form`` or ``reduction``.

    Paper:
        Ru et al., CVPR 2022, arXiv:2203.02664, eq. 5.

    Differences:
        The paper has no factors of 1/2, and writes the sigmoid out, which here is part of the head.

    Notes:
        Under DDP, ``sync=True`` gives value and (after DDP's averaging) gradient of one process with the whole batch.
        Computed in float32 for half precision. Compiles with ``fullgraph=True`` without ``sync``.

    Example:
        >>> import torch
        >>> from wsss_losses import attention_affinity_loss
        >>> from wsss_modules import labels_to_affinity
        >>> target = labels_to_affinity(torch.tensor([[[0, 0, 1, 1]]]), stride=1)
        >>> attention_affinity_loss(torch.full((1, 4, 4), 0.5), target)
        tensor(0.4444)
    """
    check_ndim("affinity", affinity, 3, "(B, N, N)")
    check_floating("affinity", affinity)
    check_shape("target", target, affinity.shape, "to match affinity")
    check_integer("target", target)
    _check_affinity_options(form, reduction)
    known = target != ignore_index
    p, positive, negative = at_least_float32(affinity), (target == 1) & known, (target == 0) & known
    if form == "linear":
        attract, repel = torch.where(positive, 1 - p, 0.0), torch.where(negative, p, 0.0)
    else:
        attract = torch.where(positive, -torch.log(torch.where(positive, p, 1.0) + eps), 0.0)
        repel = torch.where(negative, -torch.log(1 + eps - torch.where(negative, p, 0.0)), 0.0)
    axes = (0, 1, 2) if reduction == "batch" else (1, 2)
    sums = torch.stack([x.to(p.dtype).sum(axes) for x in (attract, repel, positive, negative)])  # (4,) or (4, B)
    attracted, repelled, n_positive, n_negative = sum_over_processes(sums, sync and reduction == "batch").unbind()
    cost = (attracted / (n_positive + 1) + repelled / (n_negative + 1)) / 2
    return (cost if reduction == "batch" else reduce(cost, reduction)).to(affinity.dtype)


class AttentionAffinityLoss(nn.Module):
    """Balanced loss of the affinities of all pairs of cells; see :func:`attention_affinity_loss`.

    Args:
        form: "linear" or "log".
        reduction: "batch", "mean", "sum" or "none".
        ignore_index: value of unknown pairs.
        eps: keeps the logarithms finite.
        sync: with "batch", sum counts and costs over the processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import AttentionAffinityLoss
        >>> from wsss_modules import AttentionAffinityHead, labels_to_affinity
        >>> _ = torch.manual_seed(0)
        >>> affinity = AttentionAffinityHead(4)([torch.randn(2, 4, 12, 12)])
        >>> target = labels_to_affinity(torch.randint(0, 3, (2, 48, 64)))
        >>> AttentionAffinityLoss()(affinity, target).backward()
    """

    def __init__(
        self,
        *,
        form: Form = "linear",
        reduction: PooledReduction = "batch",
        ignore_index: int = 255,
        eps: float = 1e-5,
        sync: bool = False,
    ) -> None:
        super().__init__()
        _check_affinity_options(form, reduction)
        self.form: Form = form
        self.reduction: PooledReduction = reduction
        self.ignore_index, self.eps, self.sync = ignore_index, eps, sync

    def forward(self, affinity: Tensor, target: Tensor) -> Tensor:
        """Affinities and their labels (B, N, N) -> loss."""
        return attention_affinity_loss(
            affinity,
            target,
            form=self.form,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            eps=self.eps,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"form={self.form!r}, reduction={self.reduction!r}, ignore_index={self.ignore_index}, "
            f"eps={self.eps}, sync={self.sync}"
        )


def balanced_cross_entropy_loss(logits: Tensor, mask: Tensor, *, ignore_index: int = 255, sync: bool = False) -> Tensor:
    r"""Cross-entropy in which background and foreground pixels weigh the same, however many there are of each.

    .. math:: L = \frac{1}{2 N_{bg}} \sum_{bg} CE + \frac{1}{2 N_{fg}} \sum_{fg} CE

    Args:
        logits: (B, 1 + K, h, w) floating point, background first; enlarged to the size of the mask (bilinear,
            ``align_corners=False``).
        mask: (B, H, W) integers: 0 background, 1..K, or ``ignore_index``.
        ignore_index: label of pixels that say nothing.
        sync: sum counts and costs over the processes of a distributed run.

    Returns:
        A scalar in the dtype of ``logits``. A group without a pixel costs 0.

    Raises:
        TypeError: ``logits`` is not floating point, or ``mask`` not integers.
        ValueError: shapes don't match.

    Paper:
        Ru et al., CVPR 2022, arXiv:2203.02664, section 3.5; as in earlier single-stage systems (Araslanov and Roth,
        CVPR 2020, arXiv:2005.08104), and at each scale of CLIMS' segmentation network that starts from ImageNet (Xie
        et al., CVPR 2022, arXiv:2203.02668).

    Differences:
        Where a group is empty, the released code gives NaN, and as it multiplies by 0.0 while the term is not yet used,
        NaN destroys a training before the term is active. Here the group costs 0, and :func:`afa_loss` does not
        evaluate terms of weight 0.

    Notes:
        Counts are those of the batch; ``sync=True`` gives value and (after DDP's averaging) gradient of one process
        with the whole batch. Computed in float32 for half precision. Compiles with ``fullgraph=True`` without ``sync``.

    Example:
        >>> import torch
        >>> from wsss_losses import balanced_cross_entropy_loss
        >>> mask = torch.tensor([[[0, 0, 0, 1]]])
        >>> logits = torch.zeros(1, 2, 1, 4)
        >>> logits[:, 0] = 9.0  # all background
        >>> balanced_cross_entropy_loss(logits, mask)
        tensor(4.5001)
    """
    check_ndim("logits", logits, 4, "(B, 1+K, h, w)")
    check_floating("logits", logits)
    check_shape("mask", mask, (len(logits), None, None), "(B, H, W) to match logits")
    check_integer("mask", mask, "did you pass scores?")
    with torch.autocast(logits.device.type, enabled=False):
        scores = at_least_float32(logits)
        if scores.shape[2:] != mask.shape[1:]:
            scores = F.interpolate(scores, mask.shape[1:], mode="bilinear", align_corners=False)
        cost = F.cross_entropy(scores, mask.long(), ignore_index=ignore_index, reduction="none")
    groups = mask == 0, (mask != 0) & (mask != ignore_index)
    sums = [torch.stack([torch.where(group, cost, 0.0).sum(), group.sum().to(cost.dtype)]) for group in groups]
    total, count = sum_over_processes(torch.stack(sums), sync).unbind(1)
    return ((total / count.clamp(min=1)).sum() / 2).to(logits.dtype)


class BalancedCrossEntropyLoss(nn.Module):
    """Cross-entropy balanced over background and foreground; see :func:`balanced_cross_entropy_loss`.

    Args:
        ignore_index: label of pixels that say nothing.
        sync: sum counts and costs over the processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import BalancedCrossEntropyLoss
        >>> logits = torch.randn(2, 4, 8, 8, requires_grad=True)
        >>> BalancedCrossEntropyLoss()(logits, torch.randint(0, 4, (2, 32, 32))).backward()
    """

    def __init__(self, *, ignore_index: int = 255, sync: bool = False) -> None:
        super().__init__()
        self.ignore_index, self.sync = ignore_index, sync

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, 1 + K, h, w) and mask (B, H, W) -> loss."""
        return balanced_cross_entropy_loss(logits, mask, ignore_index=self.ignore_index, sync=self.sync)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"ignore_index={self.ignore_index}, sync={self.sync}"


class AFATerms(NamedTuple):
    """Scalars: ``total = classification + seg_weight * segmentation + affinity_weight * affinity``."""

    total: Tensor
    classification: Tensor
    segmentation: Tensor
    affinity: Tensor


def afa_loss(
    logits: Tensor,
    seg_logits: Tensor | None,
    affinity: Tensor | None,
    labels: Tensor,
    mask: Tensor | None,
    target: Tensor | None,
    *,
    seg_weight: float = 0.1,
    affinity_weight: float = 0.1,
    ignore_index: int = 255,
    sync: bool = False,
) -> AFATerms:
    r"""Objective of AFA: tags, pseudo labels of the same step, and the affinities that these labels imply.

    .. math:: L = L_{cls} + \lambda_1 L_{seg} + \lambda_2 L_{aff}

    the terms being :func:`multi_label_soft_margin_loss`, :func:`balanced_cross_entropy_loss` and
    :func:`attention_affinity_loss`. A term of weight 0 is not evaluated and costs 0: its tensors may be None, as in the
    first 2,000 of 20,000 steps, when only tags are learnt.

    Args:
        logits: (B, K) floating point, scores of the images.
        seg_logits: (B, 1 + K, h, w) floating point, the decoder's output.
        affinity: (B, N, N) floating point in [0, 1].
        labels: (B, K) multi-hot.
        mask: (B, H, W) integers, the pseudo labels: 0 background, 1..K, or ``ignore_index``.
        target: (B, N, N) integers, labels of the pairs of cells: 1, 0 or ``ignore_index``.
        seg_weight: lambda 1, at least 0.
        affinity_weight: lambda 2, at least 0.
        ignore_index: label of pixels and pairs that say nothing.
        sync: sum counts and costs over the processes of a distributed run.

    Returns:
        The total and the three terms, scalars.

    Raises:
        TypeError: a prediction is not floating point, or a label map not integers.
        ValueError: shapes don't match, a negative weight, or a tensor that is needed is None.

    Paper:
        Ru et al., "Learning Affinity from Attention: End-to-End Weakly-Supervised Semantic Segmentation with
        Transformers", CVPR 2022, arXiv:2203.02664, section 3.5.

    Differences:
        The printed classification loss lacks a minus, a typo, see :func:`multi_label_soft_margin_loss`. The paper adds
        a regulariser with weight 0.01, the dense energy loss, which is commented out in the released training loop and
        is not part of this.

    Notes:
        Compiles with ``fullgraph=True`` without ``sync``. Computed in float32 for half precision.

    Example:
        >>> import torch
        >>> from wsss_losses import afa_loss
        >>> from wsss_modules import labels_to_affinity
        >>> _ = torch.manual_seed(0)
        >>> mask, labels = torch.randint(0, 3, (2, 64, 64)), torch.tensor([[1, 0], [1, 1]])
        >>> target = labels_to_affinity(mask)
        >>> terms = afa_loss(
        ...     torch.randn(2, 2), torch.randn(2, 3, 16, 16), torch.rand(2, 16, 16), labels, mask, target
        ... )
        >>> bool(torch.isclose(terms.total, terms.classification + 0.1 * terms.segmentation + 0.1 * terms.affinity))
        True
    """
    _check_weights(seg_weight, affinity_weight)
    costs = _soft_margin_costs(logits, labels)
    cost, count = sum_over_processes(torch.stack([costs.sum(), costs.new_tensor(float(len(costs)))]), sync).unbind()
    classification = (cost / count.clamp(min=1)).to(logits.dtype)
    segmentation = similarity = torch.zeros_like(classification)
    if seg_weight > 0:
        if seg_logits is None or mask is None:
            raise ValueError("seg_logits, mask: expected tensors unless seg_weight is 0, got None")
        segmentation = balanced_cross_entropy_loss(seg_logits, mask, ignore_index=ignore_index, sync=sync)
    if affinity_weight > 0:
        if affinity is None or target is None:
            raise ValueError("affinity, target: expected tensors unless affinity_weight is 0, got None")
        similarity = attention_affinity_loss(affinity, target, ignore_index=ignore_index, sync=sync)
    total = classification + seg_weight * segmentation + affinity_weight * similarity
    return AFATerms(total, classification, segmentation, similarity)


class AFALoss(nn.Module):
    """Tags, pseudo labels and affinities together; see :func:`afa_loss`.

    Args:
        seg_weight: weight of the segmentation loss.
        affinity_weight: weight of the affinity loss.
        ignore_index: label of pixels and pairs that say nothing.
        sync: sum counts and costs over the processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import AFALoss
        >>> warm_up = AFALoss(seg_weight=0, affinity_weight=0)
        >>> terms = warm_up(torch.zeros(2, 3), None, None, torch.ones(2, 3), None, None)
        >>> terms.total, terms.segmentation
        (tensor(0.6931), tensor(0.))
    """

    def __init__(
        self,
        *,
        seg_weight: float = 0.1,
        affinity_weight: float = 0.1,
        ignore_index: int = 255,
        sync: bool = False,
    ) -> None:
        super().__init__()
        _check_weights(seg_weight, affinity_weight)
        self.seg_weight, self.affinity_weight = seg_weight, affinity_weight
        self.ignore_index, self.sync = ignore_index, sync

    def forward(
        self,
        logits: Tensor,
        seg_logits: Tensor | None,
        affinity: Tensor | None,
        labels: Tensor,
        mask: Tensor | None,
        target: Tensor | None,
    ) -> AFATerms:
        """Predictions and their targets -> total and terms."""
        return afa_loss(
            logits,
            seg_logits,
            affinity,
            labels,
            mask,
            target,
            seg_weight=self.seg_weight,
            affinity_weight=self.affinity_weight,
            ignore_index=self.ignore_index,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"seg_weight={self.seg_weight}, affinity_weight={self.affinity_weight}, "
            f"ignore_index={self.ignore_index}, sync={self.sync}"
        )


def _soft_margin_costs(logits: Tensor, labels: Tensor) -> Tensor:
    check_ndim("logits", logits, 2, "(B, K)")
    check_shape("labels", labels, logits.shape, "to match logits")
    return soft_margin_costs("logits", logits, labels)


def _check_affinity_options(form: str, reduction: str) -> None:
    if form not in ("linear", "log"):
        raise ValueError(f'form: expected "linear" or "log", got {form!r}')
    check_reduction(reduction, ("batch", "mean", "sum", "none"))


def _check_weights(seg_weight: float, affinity_weight: float) -> None:
    for name, weight in (("seg_weight", seg_weight), ("affinity_weight", affinity_weight)):
        if weight < 0:
            raise ValueError(f"{name}: expected at least 0, got {weight}")
