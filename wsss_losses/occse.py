"""The objective of class-specific adversarial erasing with an ordinary classifier (OC-CSE).

Axes: B images, K foreground classes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_losses._reduction import check_reduction
from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32


class ClassSpecificErasingTerms(NamedTuple):
    """``total = classification + weight * erasing``: scalars, or (B,) with ``reduction="none"``."""

    total: Tensor
    classification: Tensor
    erasing: Tensor


def class_specific_erasing_loss(
    logits: Tensor,
    erased_logits: Tensor,
    labels: Tensor,
    remaining: Tensor,
    *,
    weight: float = 0.3,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> ClassSpecificErasingTerms:
    r"""Cross-entropy of the images, and of a frozen classifier that must miss just the class that was erased.

    .. math::
        total = BCE(\mathrm{logits}, \mathrm{labels}) + w \, BCE(\mathrm{erased\_logits}, \mathrm{remaining})

    with :math:`BCE` the binary cross-entropy of logits, averaged over the K classes of an image.

    Args:
        logits: (B, K) of the network that learns, from the images.
        erased_logits: (B, K) of the frozen classifier, from the erased images; see
            :class:`wsss_modules.FrozenClassifier` and :func:`wsss_modules.class_specific_erase`.
        labels: (B, K) multi-hot, or probabilities.
        remaining: (B, K) the labels without the erased class; see :func:`wsss_modules.sample_erase_class`. An image of
            one class has zeros: nothing is left to see.
        weight: w, at least 0. The published one grows in equal steps from 0.3 in the first of 15 epochs to 1.0 in the
            last.
        reduction: Over the images: "mean", "sum" or "none".

    Returns:
        `ClassSpecificErasingTerms` in the dtype of ``logits``; ``erasing`` without its weight. An image without a label
        has nothing to erase, so that it has no part in ``erasing`` nor in the count of its mean.

    Raises:
        TypeError: ``logits`` or ``erased_logits`` is not floating point.
        ValueError: a wrong shape, a negative ``weight``, or an unknown ``reduction``.

    Paper:
        Kweon, Yoon, Kim, Park and Yoon, Unlocking the Potential of Ordinary Classifier: Class-specific Adversarial
        Erasing Framework for Weakly Supervised Semantic Segmentation, ICCV 2021, pp. 6994-7003.

    Differences:
        The released code fails for an image without a label. Where all have one, the terms are equal.

    Notes:
        The gradient of ``erasing`` reaches the maps through the erased images. Computed in float32 for half precision.
        Compiles with ``fullgraph=True``. A mean over images, so that under DDP nothing needs to be exchanged; only if
        processes hold different numbers of images without a label do their means weigh images differently.

    Example:
        >>> import torch
        >>> from wsss_losses import class_specific_erasing_loss
        >>> labels, remaining = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]])
        >>> misses_it = class_specific_erasing_loss(torch.ones(1, 2), torch.tensor([[-3.0, 3.0]]), labels, remaining)
        >>> sees_it = class_specific_erasing_loss(torch.ones(1, 2), torch.tensor([[3.0, 3.0]]), labels, remaining)
        >>> misses_it.erasing, sees_it.erasing
        (tensor(0.0486), tensor(1.5486))
    """
    check_ndim("logits", logits, 2, "(B, K)")
    check_floating("logits", logits)
    check_shape("erased_logits", erased_logits, logits.shape, "to match logits")
    check_floating("erased_logits", erased_logits)
    check_shape("labels", labels, logits.shape, "to match logits")
    check_shape("remaining", remaining, logits.shape, "to match logits")
    if weight < 0:
        raise ValueError(f"weight: expected at least 0, got {weight}")
    check_reduction(reduction)
    labelled = (labels > 0).any(1)
    classification = _cross_entropy(logits, labels)  # (B,)
    erasing = torch.where(labelled, _cross_entropy(erased_logits, remaining), 0.0)
    if reduction == "mean":
        classification, erasing = classification.mean(), erasing.sum() / labelled.sum().clamp(min=1)
    elif reduction == "sum":
        classification, erasing = classification.sum(), erasing.sum()
    terms = (classification + weight * erasing, classification, erasing)
    return ClassSpecificErasingTerms(*(term.to(logits.dtype) for term in terms))


class ClassSpecificErasingLoss(nn.Module):
    """Objective of class-specific erasing; see :func:`class_specific_erasing_loss`.

    ``weight`` is a plain attribute: set it at each epoch to let it grow.

    Args:
        weight: weight of the erased images' term.
        reduction: over the images: "mean", "sum" or "none".

    Example:
        >>> import torch
        >>> from wsss_losses import ClassSpecificErasingLoss
        >>> from wsss_modules import ClassSpecificErase, FrozenClassifier, sample_erase_class
        >>> _ = torch.manual_seed(0)
        >>> learner, judge = torch.nn.Conv2d(3, 4, 3, 2), FrozenClassifier(torch.nn.Conv2d(3, 4, 3, 2))
        >>> images, labels = torch.randn(2, 3, 16, 16), torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]])
        >>> cam, pick = learner(images), sample_erase_class(labels)
        >>> _, erased_images = ClassSpecificErase()(cam, pick.erased, images)
        >>> erased_logits = judge(erased_images).mean((2, 3))
        >>> terms = ClassSpecificErasingLoss(weight=0.3)(cam.mean((2, 3)), erased_logits, labels, pick.remaining)
        >>> terms.total.backward()
    """

    def __init__(self, *, weight: float = 0.3, reduction: Literal["mean", "sum", "none"] = "mean") -> None:
        super().__init__()
        self.weight = weight
        self.reduction: Literal["mean", "sum", "none"] = reduction

    def forward(
        self, logits: Tensor, erased_logits: Tensor, labels: Tensor, remaining: Tensor
    ) -> ClassSpecificErasingTerms:
        """Logits of images and of erased images, all labels and those that remain -> total and terms."""
        return class_specific_erasing_loss(
            logits, erased_logits, labels, remaining, weight=self.weight, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"weight={self.weight}, reduction={self.reduction!r}"


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the classes of each image, (B,), at least in float32."""
    values = at_least_float32(logits)
    return F.binary_cross_entropy_with_logits(values, targets.to(values.dtype), reduction="none").mean(1)
