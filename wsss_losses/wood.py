"""Out-of-distribution images as a supervision of their own (W-OoD).

Axes: B images, K foreground classes, C channels of the pooled features, Q clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_losses._reduction import check_reduction
from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._distributed import sum_over_processes
from wsss_modules._precision import at_least_float32
from wsss_modules.prototypes import centre_distances, closest_pairs


def ood_metric_loss(
    features: Tensor,
    labels: Tensor,
    class_centres: Tensor,
    ood_centres: Tensor,
    class_valid: Tensor | None = None,
    ood_valid: Tensor | None = None,
    *,
    topk: float = 0.2,
    selection: Literal["batch", "image"] = "batch",
    margin: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    sync: bool = False,
) -> Tensor:
    r"""Pull each image to the centres of its classes and push it from the closest out-of-distribution (OoD) clusters.

    .. math::
        l_b = \frac{1}{Q} \Big[ \sum_k y_{bk} \|z_b - \mu_k\|_2 - \sum_{q \in S_b} \|z_b - \nu_q\|_2 \Big]

    with features z, class centres :math:`\mu`, OoD centres :math:`\nu` and the selected clusters :math:`S_b` of
    :func:`wsss_modules.closest_pairs`.

    Args:
        features: (B, C) pooled features of images with labels.
        labels: (B, K) multi-hot, or weights of the pull.
        class_centres: (K, C), e.g. of :class:`wsss_modules.FeatureCentreBank`; a constant here.
        ood_centres: (Q, C), a constant here.
        class_valid: (K,) bool, which class centres there are; all by default. The others don't count.
        ood_valid: (Q,) bool, the same of the OoD centres.
        topk: share of the (image, cluster) pairs that push, in [0, 1].
        selection: "batch" takes the closest pairs of the whole batch, "image" the closest clusters of each image.
        margin: distance beyond which a cluster does not push: :math:`-d` becomes :math:`\max(0, m - d)`, with the same
            gradient below the margin and a loss that is at least 0. By default there is none.
        reduction: over the images: "mean", "sum" or "none".
        sync: with ``selection="batch"`` choose among the pairs of all processes of a distributed run, and reduce over
            their images.

    Returns:
        Scalar, or (B,), in the dtype of ``features``. Without ``margin`` it may be negative.

    Raises:
        TypeError: ``features`` is not floating point.
        ValueError: a wrong shape, number or name.

    Paper:
        Lee, Oh, Yun, Choe, Kim and Yoon, "Weakly Supervised Semantic Segmentation using Out-of-Distribution Data", CVPR
        2022, arXiv:2203.03860.

    Differences:
        The released code selects over the batch, the default; ``selection="image"`` is the other reading. It writes
        ``mean(D_in) * 20 / Q``, which is the sum above for 20 classes; here K may be any. A missing centre is known
        there by its zeros, and fails for batches other than 16; here by ``class_valid`` and ``ood_valid``. A feature
        that lies on a centre has an infinite derivative there, and 0 here.

    Notes:
        No gradient through centres, threshold and selection. Nothing bounds the push but its weight and the selection:
        a pair that leaves the closest ones is let go. Centres stay where they are while the backbone learns, so watch
        the distance to the own class. Computed in float32 for half precision; no host synchronisation; works in
        ``torch.compile(fullgraph=True)`` without ``sync``. Under ``sync`` each process has the same number of images.

    Example:
        >>> import torch
        >>> from wsss_losses import ood_metric_loss
        >>> features, labels = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> class_centres, ood_centres = torch.tensor([[0.0, 2.0], [9.0, 9.0]]), torch.tensor([[1.0, 0.0], [8.0, 8.0]])
        >>> ood_metric_loss(features, labels, class_centres, ood_centres, topk=0.5)  # (2 - 1) / 2 clusters
        tensor(0.5000)
    """
    check_ndim("features", features, 2, "(B, C)")
    check_floating("features", features)
    batch, channels = features.shape
    check_shape("labels", labels, (batch, None), "to match features")
    check_shape("class_centres", class_centres, (labels.shape[1], channels), "to match labels and features")
    check_shape("ood_centres", ood_centres, (None, channels), "to match features")
    if class_valid is not None:
        check_shape("class_valid", class_valid, class_centres.shape[:1], "to match class_centres")
    if ood_valid is not None:
        check_shape("ood_valid", ood_valid, ood_centres.shape[:1], "to match ood_centres")
    _check_selection(topk, selection)
    check_reduction(reduction)
    values = at_least_float32(features)
    clusters = max(1, len(ood_centres))
    to_classes = centre_distances(values, class_centres.detach().to(values.dtype), class_valid)  # (B, K)
    to_clusters = centre_distances(values, ood_centres.detach().to(values.dtype), ood_valid)  # (B, Q)
    selected = closest_pairs(to_clusters, topk, valid=ood_valid, scope=selection, sync=sync).selected
    push = -to_clusters if margin is None else (margin - to_clusters).clamp(min=0)
    pull = to_classes * labels.to(values.dtype)
    loss = (pull.sum(1) + torch.where(selected, push, 0).sum(1)) / clusters  # (B,)
    return _reduce(loss, reduction, sync).to(features.dtype)


class OoDMetricLoss(nn.Module):
    """Pull to class centres, push from the closest OoD clusters; see :func:`ood_metric_loss`.

    Args:
        topk: share of the (image, cluster) pairs that push.
        selection: "batch" or "image".
        margin: distance beyond which a cluster does not push.
        reduction: over the images: "mean", "sum" or "none".
        sync: choose and reduce over the processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import OoDMetricLoss
        >>> from wsss_modules import FeatureCentreBank
        >>> _ = torch.manual_seed(0)
        >>> features, labels = torch.rand(4, 8, requires_grad=True), torch.eye(4)[:, :3]
        >>> bank = FeatureCentreBank(3, 10, 8).fit(features, labels, torch.rand(30, 8))
        >>> centres = (bank.class_centres, bank.ood_centres, bank.class_valid, bank.ood_valid)
        >>> OoDMetricLoss(topk=0.2)(features, labels, *centres).backward()
    """

    def __init__(
        self,
        *,
        topk: float = 0.2,
        selection: Literal["batch", "image"] = "batch",
        margin: float | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        sync: bool = False,
    ) -> None:
        super().__init__()
        _check_selection(topk, selection)
        check_reduction(reduction)
        self.topk, self.margin, self.sync = topk, margin, sync
        self.selection: Literal["batch", "image"] = selection
        self.reduction: Literal["mean", "sum", "none"] = reduction

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        class_centres: Tensor,
        ood_centres: Tensor,
        class_valid: Tensor | None = None,
        ood_valid: Tensor | None = None,
    ) -> Tensor:
        """Features (B, C), their labels and the centres -> loss."""
        return ood_metric_loss(
            features,
            labels,
            class_centres,
            ood_centres,
            class_valid,
            ood_valid,
            topk=self.topk,
            selection=self.selection,
            margin=self.margin,
            reduction=self.reduction,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"topk={self.topk}, selection={self.selection!r}, margin={self.margin}, reduction={self.reduction!r}, "
            f"sync={self.sync}"
        )


def ood_negative_loss(
    logits: Tensor, *, ignore_top: Sequence[int] = (), reduction: Literal["mean", "sum", "none"] = "mean"
) -> Tensor:
    r"""Binary cross-entropy of images that show none of the classes: every class is a negative.

    .. math:: l_b = \frac{1}{K} \sum_k \log(1 + e^{s_{bk}})

    Args:
        logits: (B, K) of out-of-distribution images, e.g. after :func:`wsss_modules.gradient_climb`.
        ignore_top: classes 0..K-1. An image whose strongest class is one of them costs 0: for a class that the images
            may show after all. The released code leaves out 4, the bottle of VOC.
        reduction: over the images: "mean" divides by B, whether images are left out or not; "sum" or "none".

    Returns:
        Scalar, or (B,), in the dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point.
        ValueError: a wrong shape, a class outside 0..K-1, or an unknown ``reduction``.

    Paper:
        Lee et al., CVPR 2022, arXiv:2203.03860.

    Differences:
        The released code always leaves out class 4, without saying why; here none is by default. It divides the sum by
        the number of images with labels; see :func:`wood_loss`.

    Notes:
        Computed in float32 for half precision, without a host synchronisation. Works in
        ``torch.compile(fullgraph=True)``. A mean over images, so that under DDP nothing needs to be exchanged.

    Example:
        >>> import torch
        >>> from wsss_losses import ood_negative_loss
        >>> logits = torch.tensor([[2.0, -1.0], [-1.0, 0.0]])
        >>> ood_negative_loss(logits, reduction="none"), ood_negative_loss(logits, ignore_top=(0,), reduction="none")
        (tensor([1.2201, 0.5032]), tensor([0.0000, 0.5032]))
    """
    check_ndim("logits", logits, 2, "(B, K)")
    check_floating("logits", logits)
    wrong = [index for index in ignore_top if not 0 <= index < logits.shape[1]]
    if wrong:
        raise ValueError(f"ignore_top: expected classes in 0..{logits.shape[1] - 1}, got {wrong}")
    check_reduction(reduction)
    values = at_least_float32(logits)
    loss = -F.logsigmoid(-values).mean(1)  # softplus, without its switch to the identity above 20
    if ignore_top:
        strongest = values.argmax(1)
        loss = torch.where(torch.stack([strongest == index for index in ignore_top]).any(0), 0, loss)
    return _reduce(loss, reduction, sync=False).to(logits.dtype)


class OoDNegativeLoss(nn.Module):
    """Binary cross-entropy of images that show none of the classes; see :func:`ood_negative_loss`.

    Args:
        ignore_top: images whose strongest class is one of these cost 0.
        reduction: over the images: "mean", "sum" or "none".

    Example:
        >>> import torch
        >>> from wsss_losses import OoDNegativeLoss
        >>> OoDNegativeLoss()(torch.zeros(2, 3))
        tensor(0.6931)
    """

    def __init__(self, *, ignore_top: Sequence[int] = (), reduction: Literal["mean", "sum", "none"] = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.ignore_top = tuple(ignore_top)
        self.reduction: Literal["mean", "sum", "none"] = reduction

    def forward(self, logits: Tensor) -> Tensor:
        """(B, K) logits of images without any of the classes -> loss."""
        return ood_negative_loss(logits, ignore_top=self.ignore_top, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"ignore_top={self.ignore_top}, reduction={self.reduction!r}"


class WOoDTerms(NamedTuple):
    """Scalars: ``total = classification + distance_weight * distance + ood_weight * ood``, and its terms."""

    total: Tensor
    classification: Tensor
    distance: Tensor
    ood: Tensor


def wood_loss(
    logits: Tensor,
    features: Tensor,
    ood_logits: Tensor,
    labels: Tensor,
    class_centres: Tensor,
    ood_centres: Tensor,
    class_valid: Tensor | None = None,
    ood_valid: Tensor | None = None,
    *,
    distance_weight: float = 0.007,
    ood_weight: float = 0.25,
    topk: float = 0.2,
    selection: Literal["batch", "image"] = "batch",
    margin: float | None = None,
    ignore_top: Sequence[int] = (),
    sync: bool = False,
) -> WOoDTerms:
    r"""Objective of W-OoD: tags, distances to class and OoD centres, and OoD images as negatives.

    .. math:: total = BCE(\mathrm{logits}, \mathrm{labels}) + w_d L_{distance} + w_o L_{ood}

    with :math:`BCE` the mean over images and classes, :math:`L_{distance}` of :func:`ood_metric_loss`, and
    :math:`L_{ood}` the sum of :func:`ood_negative_loss` divided by B, the number of images with labels.

    Args:
        logits: (B, K) of images with labels.
        features: (B, C) their pooled features, before the classifier.
        ood_logits: (M, K) of OoD images; M = B in the released code. Of climbed ones there, see
            :func:`wsss_modules.gradient_climb`.
        labels: (B, K) multi-hot.
        class_centres: see :func:`ood_metric_loss`.
        ood_centres: see :func:`ood_metric_loss`.
        class_valid: see :func:`ood_metric_loss`.
        ood_valid: see :func:`ood_metric_loss`.
        distance_weight: :math:`w_d`, at least 0.
        ood_weight: :math:`w_o`, at least 0.
        topk: see :func:`ood_metric_loss`.
        selection: see :func:`ood_metric_loss`.
        margin: see :func:`ood_metric_loss`.
        ignore_top: see :func:`ood_negative_loss`.
        sync: select pairs and average all terms over the processes of a distributed run, which have B images each.

    Returns:
        `WOoDTerms` in the dtype of ``logits``; the terms without their weights.

    Raises:
        TypeError: ``logits``, ``features`` or ``ood_logits`` is not floating point.
        ValueError: a wrong shape, number or name.

    Paper:
        Lee et al., CVPR 2022, arXiv:2203.03860.

    Differences:
        Those of the two terms. Dividing by B, not M, is the released arithmetic: with fewer OoD images each keeps its
        weight.

    Notes:
        Computed in float32 for half precision, without a host synchronisation. Works in
        ``torch.compile(fullgraph=True)`` without ``sync``.

    Example:
        >>> import torch
        >>> from wsss_losses import wood_loss
        >>> _ = torch.manual_seed(0)
        >>> logits, features, ood_logits = torch.zeros(2, 3), torch.rand(2, 8), torch.zeros(2, 3)
        >>> labels, class_centres, ood_centres = torch.eye(3)[:2], torch.rand(3, 8), torch.rand(5, 8)
        >>> terms = wood_loss(logits, features, ood_logits, labels, class_centres, ood_centres)
        >>> terms.classification, terms.ood
        (tensor(0.6931), tensor(0.6931))
    """
    check_ndim("logits", logits, 2, "(B, K)")
    check_floating("logits", logits)
    check_shape("labels", labels, logits.shape, "to match logits")
    check_shape("features", features, (len(logits), None), "to match logits")
    check_floating("features", features)
    check_shape("ood_logits", ood_logits, (None, logits.shape[1]), "to match logits")
    check_floating("ood_logits", ood_logits)
    _check_weights(distance_weight, ood_weight)
    values = at_least_float32(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(values, labels.to(values.dtype), reduction="none")
    classification = _reduce(cross_entropy.mean(1), "mean", sync)
    distance = ood_metric_loss(
        at_least_float32(features),
        labels,
        class_centres,
        ood_centres,
        class_valid,
        ood_valid,
        topk=topk,
        selection=selection,
        margin=margin,
        sync=sync,
    )
    negatives = ood_negative_loss(ood_logits.to(values.dtype), ignore_top=ignore_top, reduction="sum")
    ood = _average(negatives, len(logits), sync)
    total = classification + distance_weight * distance + ood_weight * ood
    return WOoDTerms(*(term.to(logits.dtype) for term in (total, classification, distance, ood)))


class WOoDLoss(nn.Module):
    """Objective of W-OoD; see :func:`wood_loss`.

    Args:
        distance_weight: weight of the distances.
        ood_weight: weight of the OoD images.
        topk: share of the (image, cluster) pairs that push.
        selection: "batch" or "image".
        margin: distance beyond which a cluster does not push.
        ignore_top: OoD images whose strongest class is one of these cost 0.
        sync: select and average over the processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import WOoDLoss
        >>> from wsss_modules import FeatureCentreBank, gradient_climb
        >>> _ = torch.manual_seed(0)
        >>> body, head = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 4)
        >>> pooled = lambda x: body(x).relu().mean((2, 3))
        >>> images, labels, outside = torch.randn(6, 3, 9, 9), torch.eye(6)[:, :4], torch.randn(6, 3, 9, 9)
        >>> bank = FeatureCentreBank(4, 5, 8).fit(pooled(images), labels, pooled(outside))
        >>> centres = (bank.class_centres, bank.ood_centres, bank.class_valid, bank.ood_valid)
        >>> climbed = gradient_climb(lambda x: head(pooled(x)), outside)
        >>> features = pooled(images)
        >>> terms = WOoDLoss()(head(features), features, head(pooled(climbed)), labels, *centres)
        >>> terms.total.backward()
    """

    def __init__(
        self,
        *,
        distance_weight: float = 0.007,
        ood_weight: float = 0.25,
        topk: float = 0.2,
        selection: Literal["batch", "image"] = "batch",
        margin: float | None = None,
        ignore_top: Sequence[int] = (),
        sync: bool = False,
    ) -> None:
        super().__init__()
        _check_selection(topk, selection)
        _check_weights(distance_weight, ood_weight)
        self.distance_weight, self.ood_weight, self.topk = distance_weight, ood_weight, topk
        self.selection: Literal["batch", "image"] = selection
        self.margin, self.ignore_top, self.sync = margin, tuple(ignore_top), sync

    def forward(
        self,
        logits: Tensor,
        features: Tensor,
        ood_logits: Tensor,
        labels: Tensor,
        class_centres: Tensor,
        ood_centres: Tensor,
        class_valid: Tensor | None = None,
        ood_valid: Tensor | None = None,
    ) -> WOoDTerms:
        """Predictions on images with labels and on OoD images, labels and centres -> total and terms."""
        return wood_loss(
            logits,
            features,
            ood_logits,
            labels,
            class_centres,
            ood_centres,
            class_valid,
            ood_valid,
            distance_weight=self.distance_weight,
            ood_weight=self.ood_weight,
            topk=self.topk,
            selection=self.selection,
            margin=self.margin,
            ignore_top=self.ignore_top,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"distance_weight={self.distance_weight}, ood_weight={self.ood_weight}, topk={self.topk}, "
            f"selection={self.selection!r}, margin={self.margin}, ignore_top={self.ignore_top}, sync={self.sync}"
        )


def _check_selection(topk: float, selection: str) -> None:
    if not 0 <= topk <= 1:
        raise ValueError(f"topk: expected a number in [0, 1], got {topk}")
    if selection not in ("batch", "image"):
        raise ValueError(f'selection: expected "batch" or "image", got {selection!r}')


def _check_weights(distance_weight: float, ood_weight: float) -> None:
    for name, weight in (("distance_weight", distance_weight), ("ood_weight", ood_weight)):
        if weight < 0:
            raise ValueError(f"{name}: expected at least 0, got {weight}")


def _reduce(loss: Tensor, reduction: Literal["mean", "sum", "none"], sync: bool) -> Tensor:
    """Reduce the (B,) losses of the images, with ``sync`` of all processes."""
    if reduction == "none":
        return loss
    return _average(loss.sum(), len(loss), sync) if reduction == "mean" else sum_over_processes(loss.sum(), sync)


def _average(total: Tensor, count: int, sync: bool) -> Tensor:
    """``total / count``, with ``sync`` of the totals and counts of all processes; 0 without an image."""
    totals, counts = sum_over_processes(torch.stack([total, total.new_full((), count)]), sync).unbind()
    return totals / counts.clamp(min=1)
