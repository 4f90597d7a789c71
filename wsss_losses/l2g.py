"""A network that sees the whole image learns what another sees in its parts (L2G).

Axes: B images, K foreground classes, H W cells of an image, n crops, h w cells of a crop.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from wsss_losses._reduction import Reduction, check_reduction, reduce
from wsss_losses._soft_margin import soft_margin_costs
from wsss_modules import crop_align, local_attention_target
from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules.crops import check_target_options


def local_to_global_transfer_loss(
    scores: Tensor,
    target: Tensor,
    boxes: Tensor,
    *,
    weight: float = 10.0,
    stride: float = 8,
    aligned: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared difference of what the maps of the whole image say inside the boxes and what the crops have taught.

    .. math:: L = \lambda \operatorname{mean}_{n, c, hw} (\operatorname{softmax}_c(A(scores)) - t)^2

    with A the reading of the boxes, see :func:`wsss_modules.crop_align`, and :math:`\lambda` = ``weight``.

    Args:
        scores: (B, 1+K, H, W) float, signed maps of whole images, background first; see
            :class:`wsss_modules.PixelCorrelationCAMHead`.
        target: (n, 1+K, h, w) in [0, 1], see :func:`wsss_modules.local_attention_target`. No gradient flows into it.
        boxes: (n, 5) numbers: image, x1, y1, x2, y2 of each crop in pixels of the input.
        weight: lambda, 10 for the 21 channels of VOC, 30 for the 81 of COCO.
        stride: pixels a cell of ``scores``.
        aligned: read the boxes without the released shift by half a cell; see :func:`wsss_modules.crop_align`.
        reduction: ``"mean"`` over all crops, channels and cells, ``"sum"`` over crops of the mean over the others, or
            ``"none"``: (n,).

    Returns:
        Scalar or (n,), in [0, ``weight``], in the dtype of ``scores``; 0 without a crop.

    Raises:
        TypeError: if ``scores`` or ``target`` is not floating point.
        ValueError: if a shape does not fit, or an option is unknown or out of range.

    Paper:
        Jiang, Yang, Hou and Wei, "L2G: A Simple Local-to-Global Knowledge Transfer Framework for Weakly Supervised
        Semantic Segmentation", CVPR 2022, arXiv:2204.03206.

    Notes:
        The mean counts the channels of absent classes, so that the weight is to grow with their number: about half of
        it in both published settings. The softmax sums to 1 and the target to 0 or less than 1 where a crop is unsure:
        such pixels are pulled to equal scores. Computed in float32 for half precision. Works in
        ``torch.compile(fullgraph=True)``.

    Example:
        >>> import torch
        >>> from wsss_losses import local_to_global_transfer_loss
        >>> scores = torch.tensor([[[[0.0, 20.0]], [[20.0, 0.0]]]])  # a class on the left
        >>> box = torch.tensor([[0, 0, 0, 16, 8]])
        >>> local_to_global_transfer_loss(scores, scores / 20, box, aligned=True) < 1e-6
        tensor(True)
    """
    _check_options(weight, reduction)
    check_ndim("scores", scores, 4, "(B, 1+K, H, W)")
    check_floating("scores", scores)
    check_floating("target", target)
    check_shape("boxes", boxes, (None, 5), "of image, x1, y1, x2, y2")
    check_shape("target", target, (len(boxes), scores.shape[1], None, None), "to match boxes, scores")
    dtype = torch.promote_types(scores.dtype, torch.float32)
    size = (target.shape[2], target.shape[3])
    read = crop_align(scores.to(dtype), boxes, size, stride=stride, aligned=aligned)
    cost = (read.softmax(1) - target.detach().to(dtype)).square().mean((1, 2, 3))  # (n,)
    return (weight * reduce(cost, reduction)).to(scores.dtype)


class LocalToGlobalTransferLoss(nn.Module):
    """Maps of whole images against what crops have taught; see :func:`local_to_global_transfer_loss`.

    Args:
        weight: lambda, 10 for VOC, 30 for COCO.
        stride: pixels a cell of the maps.
        aligned: read the boxes without the released shift by half a cell.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from wsss_losses import LocalToGlobalTransferLoss
        >>> from wsss_modules import corner_and_random_boxes, local_attention_target
        >>> _ = torch.manual_seed(0)
        >>> boxes = corner_and_random_boxes((64, 64), 48)
        >>> target = local_attention_target(torch.randn(6, 4, 6, 6), torch.tensor([[1, 0, 1]]).expand(6, 3))
        >>> scores = torch.randn(1, 4, 8, 8, requires_grad=True)
        >>> LocalToGlobalTransferLoss()(scores, target, boxes).backward()
    """

    def __init__(
        self,
        *,
        weight: float = 10.0,
        stride: float = 8,
        aligned: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_options(weight, reduction)
        self.weight, self.stride, self.aligned = weight, stride, aligned
        self.reduction: Reduction = reduction

    def forward(self, scores: Tensor, target: Tensor, boxes: Tensor) -> Tensor:
        """Maps of whole images, targets of the crops and their boxes -> loss."""
        return local_to_global_transfer_loss(
            scores,
            target,
            boxes,
            weight=self.weight,
            stride=self.stride,
            aligned=self.aligned,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"weight={self.weight}, stride={self.stride}, aligned={self.aligned}, reduction={self.reduction!r}"


class L2GTerms(NamedTuple):
    """``total = transfer + classification + global_weight * global_classification``, scalars."""

    total: Tensor
    transfer: Tensor
    classification: Tensor
    global_classification: Tensor


def l2g_loss(
    global_scores: Tensor,
    local_logits: Tensor,
    local_scores: Tensor,
    labels: Tensor,
    boxes: Tensor,
    saliency: Tensor | None = None,
    *,
    weight: float = 10.0,
    threshold: float = 1e-3,
    background: Literal["binary", "value"] = "binary",
    empty_saliency: Literal["zero", "attention"] = "zero",
    global_weight: float = 0.0,
    stride: float = 8,
    aligned: bool = False,
) -> L2GTerms:
    """Objective of L2G: crops are classified, and the network of whole images learns the maps of the crops.

    The defaults are VOC's; for COCO ``weight=30, threshold=0.1, background="value"``.

    Args:
        global_scores: (B, 1+K, H, W) float, signed maps of whole images, background first.
        local_logits: (n, K) float, class scores of the crops.
        local_scores: (n, 1+K, h, w) float, signed maps of the crops, background first; without gradient here.
        labels: (B, K) multi-hot tags of the images.
        boxes: (n, 5) numbers: image, x1, y1, x2, y2 of each crop in pixels of the input; see
            :func:`wsss_modules.corner_and_random_boxes`.
        saliency: (n, 1, H', W') float in [0, 1], cut as the crops; None for attention transfer alone.
        weight: weight of the transfer, 10 for VOC, 30 for COCO.
        threshold: 0.001 for VOC, 0.1 for COCO; see :func:`wsss_modules.local_attention_target`.
        background: ``"binary"`` for VOC, ``"value"`` for COCO.
        empty_saliency: ``"zero"`` (released) or ``"attention"``, in crops without any saliency.
        global_weight: weight of a classification of the whole images by the mean of their maps.
        stride: pixels a cell of ``global_scores``.
        aligned: read the boxes without the released shift by half a cell.

    Returns:
        The total and its terms, in the dtype of ``global_scores``.

    Raises:
        TypeError: if a tensor that must be is not floating point.
        ValueError: if a shape does not fit, or an option is unknown or out of range.

    Paper:
        Jiang, Yang, Hou and Wei, CVPR 2022.

    Differences:
        The released code computes the classification of the whole images, and prints it, but does not add it, so that
        classes reach that network through the crops alone; hence the default ``global_weight=0``. Its accumulation of
        steps divides the classification but not the transfer: divide the total.

    Notes:
        The crops' network receives only the gradient of its classification, the other only that of the transfer. Every
        crop has the labels of its image, also where it shows none of the objects. No statistics over the batch. Works
        in ``torch.compile(fullgraph=True)``.

    Example:
        >>> import torch
        >>> from wsss_losses import l2g_loss
        >>> from wsss_modules import corner_and_random_boxes
        >>> _ = torch.manual_seed(0)
        >>> boxes = corner_and_random_boxes((64, 64), 48, images=2)
        >>> labels, local = torch.tensor([[1, 0, 1], [0, 1, 0]]), torch.randn(12, 4, 6, 6)
        >>> terms = l2g_loss(torch.randn(2, 4, 8, 8), local[:, 1:].mean((2, 3)), local, labels, boxes)
        >>> bool(terms.total == terms.transfer + terms.classification)
        True
    """
    _check_options(weight, "mean", global_weight)
    check_ndim("global_scores", global_scores, 4, "(B, 1+K, H, W)")
    check_floating("global_scores", global_scores)
    batch, classes = global_scores.shape[0], global_scores.shape[1] - 1
    check_shape("labels", labels, (batch, classes), "to match global_scores")
    check_shape("boxes", boxes, (None, 5), "of image, x1, y1, x2, y2")
    check_shape("local_logits", local_logits, (len(boxes), classes), "to match boxes, labels")
    check_shape("local_scores", local_scores, (len(boxes), 1 + classes, None, None), "to match boxes, labels")
    check_floating("local_scores", local_scores)
    of_crops = labels[boxes[:, 0].long()]  # (n, K)
    dtype = torch.promote_types(global_scores.dtype, torch.float32)
    target = local_attention_target(
        local_scores.to(dtype),
        of_crops,
        saliency,
        threshold=threshold,
        background=background,
        empty_saliency=empty_saliency,
    )
    whole = global_scores.to(dtype)
    transfer = local_to_global_transfer_loss(whole, target, boxes, weight=weight, stride=stride, aligned=aligned)
    classification = reduce(soft_margin_costs("local_logits", local_logits, of_crops), "mean")
    of_whole = reduce(soft_margin_costs("global_scores", whole[:, 1:].mean((2, 3)), labels), "mean")
    total = transfer + classification
    if global_weight > 0:
        total = total + global_weight * of_whole
    return L2GTerms(*(term.to(global_scores.dtype) for term in (total, transfer, classification, of_whole)))


class L2GLoss(nn.Module):
    """Classification of crops plus transfer of their maps to the network of whole images; see :func:`l2g_loss`.

    Args:
        weight: weight of the transfer, 10 for VOC, 30 for COCO.
        threshold: 0.001 for VOC, 0.1 for COCO.
        background: ``"binary"`` for VOC, ``"value"`` for COCO.
        empty_saliency: ``"zero"`` or ``"attention"``.
        global_weight: weight of a classification of the whole images.
        stride: pixels a cell of the maps of whole images.
        aligned: read the boxes without the released shift by half a cell.

    Example:
        >>> import torch
        >>> from wsss_losses import L2GLoss
        >>> from wsss_modules import corner_and_random_boxes
        >>> _ = torch.manual_seed(0)
        >>> boxes, labels = corner_and_random_boxes((64, 64), 48), torch.tensor([[1, 0, 1]])
        >>> whole, local = (torch.randn(size, requires_grad=True) for size in ((1, 4, 8, 8), (6, 4, 6, 6)))
        >>> logits, saliency = local[:, 1:].mean((2, 3)), torch.rand(6, 1, 48, 48)
        >>> L2GLoss()(whole, logits, local, labels, boxes, saliency).total.backward()
    """

    def __init__(
        self,
        *,
        weight: float = 10.0,
        threshold: float = 1e-3,
        background: Literal["binary", "value"] = "binary",
        empty_saliency: Literal["zero", "attention"] = "zero",
        global_weight: float = 0.0,
        stride: float = 8,
        aligned: bool = False,
    ) -> None:
        super().__init__()
        _check_options(weight, "mean", global_weight)
        check_target_options(threshold, background, empty_saliency)
        self.weight, self.threshold, self.global_weight = weight, threshold, global_weight
        self.background: Literal["binary", "value"] = background
        self.empty_saliency: Literal["zero", "attention"] = empty_saliency
        self.stride, self.aligned = stride, aligned

    def forward(
        self,
        global_scores: Tensor,
        local_logits: Tensor,
        local_scores: Tensor,
        labels: Tensor,
        boxes: Tensor,
        saliency: Tensor | None = None,
    ) -> L2GTerms:
        """Maps of whole images, scores and maps of their crops, tags, boxes and saliency -> total and terms."""
        return l2g_loss(
            global_scores,
            local_logits,
            local_scores,
            labels,
            boxes,
            saliency,
            weight=self.weight,
            threshold=self.threshold,
            background=self.background,
            empty_saliency=self.empty_saliency,
            global_weight=self.global_weight,
            stride=self.stride,
            aligned=self.aligned,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"weight={self.weight}, threshold={self.threshold}, background={self.background!r}, "
            f"empty_saliency={self.empty_saliency!r}, global_weight={self.global_weight}, stride={self.stride}, "
            f"aligned={self.aligned}"
        )


def _check_options(weight: float, reduction: str, global_weight: float = 0.0) -> None:
    check_reduction(reduction)
    for name, value in (("weight", weight), ("global_weight", global_weight)):
        if value < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}")
