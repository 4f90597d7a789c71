"""Attraction and repulsion of AEFT: erasing taught by a triplet of an image, its erased copy and another image.

Axis letters: B images, K foreground classes, H W cells, N images over all processes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_losses._reduction import check_reduction
from wsss_modules import minmax_cam
from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules._distributed import gather_over_processes, sum_over_processes
from wsss_modules._precision import at_least_float32

Reduction = Literal["mean", "present", "sum", "none"]
_REDUCTIONS = get_args(Reduction)  # not where it is asked for: torch.compile of torch 2.6 can't follow it


def erasing_attraction_loss(
    gpp: Tensor, gpp_masked: Tensor, labels: Tensor, *, reduction: Reduction = "mean", sync: bool = False
) -> Tensor:
    r"""Pull an image and its erased copy together: after erasing, each present class must respond as much as before.

    .. math::
        A_{ik} = l_{ik} \underset{hw}{mean}\ r(gpp_{ik}), \qquad loss = \frac{1}{B K} \sum_{ik} |A_{ik} - P_{ik}|

    with r = ReLU and P the same of ``gpp_masked``. What is compared are the responses themselves, not labels: the copy
    need not be classified as if nothing were missing.

    Args:
        gpp: (B, K, H, W) class maps of the images, signed, such as `wsss_modules.GatedPyramidPooling` gives.
        gpp_masked: (B, K, h, w) those of the erased images, see `wsss_modules.soft_erase_mask`; any size.
        labels: (B, K) multi-hot; present means greater than 0.
        reduction: "mean" over all B K entries, of which absent classes are zeros; "present": over the present ones
            only; "sum"; "none": (B, K).
        sync: sum costs and counts over the processes of a distributed run.

    Returns:
        A scalar, or (B, K) for "none", in the dtype of ``gpp``. 0 where no class is present.

    Raises:
        TypeError: a map is not floating point.
        ValueError: a wrong shape, or an unknown ``reduction``.

    Paper:
        Yoon, Kweon, Cho, Kim and Yoon, "Adversarial Erasing Framework via Triplet with Gated Pyramid Pooling Layer for
        Weakly Supervised Semantic Segmentation", ECCV 2022.

    Differences:
        The released "mean" shrinks as the data set has more classes, since few of them are present in an image;
        "present" does not.

    Notes:
        Neither side is a constant: gradients flow to both. AEFT weighs this by 0.2. Computed in float32 for half
        precision. Works in ``torch.compile(fullgraph=True)`` without ``sync``.

    Example:
        >>> import torch
        >>> from wsss_losses import erasing_attraction_loss
        >>> gpp, labels = torch.tensor([[[[1.0, 3.0]], [[5.0, 5.0]]]]), torch.tensor([[1, 0]])
        >>> erasing_attraction_loss(gpp, gpp / 2, labels), erasing_attraction_loss(
        ...     gpp, gpp / 2, labels, reduction="present"
        ... )
        (tensor(0.5000), tensor(1.))
    """
    check_reduction(reduction, _REDUCTIONS)
    for name, maps in (("gpp", gpp), ("gpp_masked", gpp_masked)):
        check_floating(name, maps)
        check_ndim(name, maps, 4, "(B, K, H, W)")
    check_shape("gpp_masked", gpp_masked, (*gpp.shape[:2], None, None), "to match gpp")
    check_shape("labels", labels, gpp.shape[:2], "to match gpp")
    present = labels > 0
    dtype = torch.promote_types(gpp.dtype, torch.float32)
    anchor, positive = (F.relu(maps.to(dtype)).mean((2, 3)) for maps in (gpp, gpp_masked))  # (B, K) each
    cost = torch.where(present, anchor - positive, 0.0).abs()
    if reduction == "none":
        return cost.to(gpp.dtype)
    if reduction == "sum":
        return sum_over_processes(cost.sum(), sync).to(gpp.dtype)
    counted = present if reduction == "present" else torch.ones_like(present)
    total, count = sum_over_processes(torch.stack([cost.sum(), counted.sum().to(dtype)]), sync).unbind()
    return (total / count.clamp(min=1)).to(gpp.dtype)


class ErasingAttractionLoss(nn.Module):
    """Pull an image and its erased copy together; see :func:`erasing_attraction_loss`.

    Args:
        reduction: "mean", "present", "sum" or "none".
        sync: sum costs and counts over the processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import ErasingAttractionLoss
        >>> from wsss_modules import GatedPyramidPooling, SoftErase
        >>> _ = torch.manual_seed(0)
        >>> images, labels = torch.randn(2, 3, 64, 64), torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> net, pooling = torch.nn.Conv2d(3, 3, 3, stride=4, padding=1), GatedPyramidPooling(3)
        >>> cam = net(images)
        >>> erased = images * SoftErase()(cam, labels, images.shape[2:])
        >>> loss = ErasingAttractionLoss()(pooling(cam).gpp, pooling(net(erased)).gpp, labels)
        >>> loss.backward()
    """

    def __init__(self, *, reduction: Reduction = "mean", sync: bool = False) -> None:
        super().__init__()
        check_reduction(reduction, _REDUCTIONS)
        self.reduction: Reduction = reduction
        self.sync = sync

    def forward(self, gpp: Tensor, gpp_masked: Tensor, labels: Tensor) -> Tensor:
        """(B, K, H, W) maps of images and erased images, (B, K) labels -> the loss."""
        return erasing_attraction_loss(gpp, gpp_masked, labels, reduction=self.reduction, sync=self.sync)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"reduction={self.reduction!r}, sync={self.sync}"


class ErasingRepulsionTerms(NamedTuple):
    """What :func:`erasing_repulsion_loss` returns.

    Attributes:
        total: scalar, the loss.
        distance: (B,) squared distance of each image and its negative; means nothing where there is none. With
            ``sync``, those of all processes, (N,).
        hard: scalar, the number of hard anchors, without gradient.
    """

    total: Tensor
    distance: Tensor
    hard: Tensor


def erasing_repulsion_loss(
    gpp: Tensor,
    cam: Tensor,
    labels: Tensor,
    negative_index: Tensor,
    valid: Tensor | None = None,
    *,
    margin: float = 0.5,
    threshold: float = 0.2,
    negative_threshold: float = 1.0,
    min_hard: int = 5,
    eps: float = 1e-5,
    sync: bool = False,
) -> ErasingRepulsionTerms:
    r"""Push an image, less its strongly activated areas, away from one that shares no class with it.

    With :math:`f = gpp / (\max_{hw} |gpp| + \epsilon)` and n the maps ``cam`` stretched by `wsss_modules.minmax_cam`

    .. math::
        a_{ik} = l_{ik} \underset{n_{ik} < threshold}{mean} f_{ik}, \qquad
        b_{ik} = l_{ik} \underset{n_{ik} < negative\_threshold}{mean} f_{ik}, \qquad
        d_i = \sum_k (a_{ik} - b_{j(i)k})^2

    where j(i) is the negative of image i, with its own labels. Anchors with ``d < margin`` are hard; the loss is the
    mean of ``margin - d`` over them if there are at least ``min_hard``, else 0.

    An image and its negative share no class, so that ``d`` is the sum of both squared lengths and not an angle: the
    loss raises the normalised responses of both, and for the anchor only those beside the most discriminative part.

    Args:
        gpp: (B, K, H, W) class maps, signed, such as `wsss_modules.GatedPyramidPooling` gives.
        cam: (B, K, H, W) class maps, signed, that say which cells are left out. They get no gradient.
        labels: (B, K) multi-hot; present means greater than 0.
        negative_index: (B,) int64 place of each image's negative in the batch, see
            `wsss_modules.sample_disjoint_negatives`. Outside of 0..B-1, e.g. -1: there is none.
        valid: (B,) bool, False for anchors to leave out; default: all that have a negative.
        margin: squared distance from which on an anchor is not hard.
        threshold: activation in [0, 1] from which on a cell of the anchor is left out.
        negative_threshold: the same for the negative; the released 1.0 leaves out the peak at most.
        min_hard: fewest hard anchors for which there is a loss; a batch of fewer images never has one.
        eps: added to maxima and counts, and used by `wsss_modules.minmax_cam`.
        sync: compare with the images of all processes of a distributed run; ``negative_index`` then counts these in the
            order of the ranks.

    Returns:
        Total, distances and number of hard anchors, in the dtype of ``gpp``; the total is in [0, margin]. An anchor
        without a label, or whose negative has none, is left out.

    Raises:
        TypeError: a map is not floating point, or ``negative_index`` does not hold integers.
        ValueError: a wrong shape, or a negative ``margin`` or ``min_hard``.

    Paper:
        Yoon, Kweon, Cho, Kim and Yoon, "Adversarial Erasing Framework via Triplet with Gated Pyramid Pooling Layer for
        Weakly Supervised Semantic Segmentation", ECCV 2022.

    Differences:
        The released code counts cells in single precision whatever the maps have, which in double precision makes a
        relative difference of 1e-7. It has no ``valid``: where an image of the batch has no partner, it pairs images
        wrongly, see `wsss_modules.sample_disjoint_negatives`.

    Notes:
        The total jumps as the number of hard anchors passes ``min_hard``, and depends on the batch, not on its images
        alone. The masks are comparisons, without gradient; ``gpp`` gets it through its maximum as well. AEFT weighs
        this by 0.15. Under DDP each process pairs, counts and averages its own images; ``sync=True`` gathers the
        pooled vectors (B, K), and gives value and (after DDP's averaging) gradient of one process with the whole batch.
        Computed in float32 for half precision. Works in ``torch.compile(fullgraph=True)`` without ``sync``.

    Example:
        >>> import torch
        >>> from wsss_losses import erasing_repulsion_loss
        >>> from wsss_modules import sample_disjoint_negatives
        >>> generator = torch.Generator().manual_seed(0)
        >>> gpp = torch.randn(6, 3, 8, 8, generator=generator)
        >>> labels = torch.eye(3).repeat(2, 1)
        >>> index, valid = sample_disjoint_negatives(labels, generator=generator)
        >>> terms = erasing_repulsion_loss(gpp, gpp, labels, index, valid)
        >>> terms.hard
        tensor(6.)
    """
    _check_triplets(gpp, cam, labels, negative_index, valid)
    _check_hardness(margin, min_hard)
    present = labels > 0
    dtype = torch.promote_types(gpp.dtype, torch.float32)
    relative = gpp.to(dtype)
    relative = relative / (relative.abs().amax((2, 3), keepdim=True) + eps).clamp(min=torch.finfo(dtype).tiny)
    activation = minmax_cam(at_least_float32(cam.detach()), eps)
    anchor = _mean_below(relative, activation, threshold, present, eps)  # (B, K)
    negative = _mean_below(relative, activation, negative_threshold, present, eps)

    tagged = present.any(1)
    chosen = negative_index.to(torch.int64)
    chosen = torch.where(tagged if valid is None else tagged & valid, chosen, -1)
    vectors = gather_over_processes(torch.stack([anchor, negative], 1), sync)  # (N, 2, K)
    chosen, tagged = gather_over_processes(torch.stack([chosen, tagged.to(torch.int64)], 1), sync).unbind(1)
    anchor, negative = vectors.unbind(1)

    paired = (chosen >= 0) & (chosen < len(negative))
    partner = torch.where(paired, chosen, 0)
    paired = paired & (tagged[partner] > 0)
    distance = (anchor - negative[partner]).square().sum(1)  # (N,)
    hard = paired & (distance < margin)
    count = hard.sum()
    mean = torch.where(hard, margin - distance, 0.0).sum() / count.clamp(min=1)
    total = torch.where(count >= min_hard, mean, 0.0)
    return ErasingRepulsionTerms(total.to(gpp.dtype), distance.to(gpp.dtype), count.to(gpp.dtype))


class ErasingRepulsionLoss(nn.Module):
    """Push an image, less its activated areas, away from one that shares no class; see :func:`erasing_repulsion_loss`.

    Args:
        margin: squared distance from which on an anchor is not hard.
        threshold: activation in [0, 1] from which on a cell of the anchor is left out.
        negative_threshold: the same for the negative.
        min_hard: fewest hard anchors for which there is a loss.
        eps: added to maxima and counts.
        sync: compare with the images of all processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import ErasingRepulsionLoss
        >>> from wsss_modules import GatedPyramidPooling, sample_disjoint_negatives
        >>> _ = torch.manual_seed(0)
        >>> cam, labels = torch.randn(8, 4, 14, 14), torch.eye(4).repeat(2, 1)
        >>> gpp = GatedPyramidPooling(4)(cam).gpp
        >>> terms = ErasingRepulsionLoss()(gpp, cam, labels, *sample_disjoint_negatives(labels))
        >>> terms.total.backward()
    """

    def __init__(
        self,
        *,
        margin: float = 0.5,
        threshold: float = 0.2,
        negative_threshold: float = 1.0,
        min_hard: int = 5,
        eps: float = 1e-5,
        sync: bool = False,
    ) -> None:
        super().__init__()
        _check_hardness(margin, min_hard)
        self.margin, self.threshold, self.negative_threshold = margin, threshold, negative_threshold
        self.min_hard, self.eps, self.sync = min_hard, eps, sync

    def forward(
        self, gpp: Tensor, cam: Tensor, labels: Tensor, negative_index: Tensor, valid: Tensor | None = None
    ) -> ErasingRepulsionTerms:
        """(B, K, H, W) maps twice, (B, K) labels, (B,) negatives and whether they count -> total, distances, count."""
        return erasing_repulsion_loss(
            gpp,
            cam,
            labels,
            negative_index,
            valid,
            margin=self.margin,
            threshold=self.threshold,
            negative_threshold=self.negative_threshold,
            min_hard=self.min_hard,
            eps=self.eps,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        thresholds = f"threshold={self.threshold}, negative_threshold={self.negative_threshold}"
        return f"margin={self.margin}, {thresholds}, min_hard={self.min_hard}, eps={self.eps}, sync={self.sync}"


class AEFTTerms(NamedTuple):
    """What :func:`aeft_loss` returns, all scalars.

    Attributes:
        total: weighted sum.
        classification: unweighted.
        attraction: unweighted.
        repulsion: unweighted.
        hard: the number of hard anchors, without gradient.
    """

    total: Tensor
    classification: Tensor
    attraction: Tensor
    repulsion: Tensor
    hard: Tensor


def aeft_loss(
    logits: Tensor,
    gpp: Tensor,
    gpp_masked: Tensor,
    cam: Tensor,
    labels: Tensor,
    negative_index: Tensor,
    valid: Tensor | None = None,
    *,
    attraction_weight: float = 0.2,
    repulsion_weight: float = 0.15,
    classified: int | None = None,
    margin: float = 0.5,
    threshold: float = 0.2,
    min_hard: int = 5,
    sync: bool = False,
) -> AEFTTerms:
    r"""Objective of AEFT's epochs with triplets.

    .. math:: loss = BCE(logits, l) + 0.2\ attraction(gpp, gpp_{masked}) + 0.15\ repulsion(gpp)

    Args:
        logits: (B, K) image scores.
        gpp: (B, K, H, W) fused pyramids of the class maps, signed.
        gpp_masked: (B, K, h, w) those of the erased images.
        cam: (B, K, H, W) the class maps of the images, signed; they get no gradient.
        labels: (B, K) multi-hot.
        negative_index: (B,) place of each image's negative, see `wsss_modules.sample_disjoint_negatives`.
        valid: (B,) bool, False for anchors to leave out.
        attraction_weight: weight of :func:`erasing_attraction_loss`.
        repulsion_weight: weight of :func:`erasing_repulsion_loss`.
        classified: classify only so many images, the first of the batch (of each process); default: all.
        margin: see :func:`erasing_repulsion_loss`, as are the next two.
        threshold: activation from which on a cell of the anchor is left out.
        min_hard: fewest hard anchors for which there is a repulsion.
        sync: take the images of all processes of a distributed run together.

    Returns:
        Total and terms, in the dtype of ``gpp`` and of ``logits``.

    Raises:
        TypeError: a map is not floating point, or negatives are no integers.
        ValueError: a wrong shape, ``classified`` below 1, or a negative ``margin`` or ``min_hard``.

    Paper:
        Yoon, Kweon, Cho, Kim and Yoon, "Adversarial Erasing Framework via Triplet with Gated Pyramid Pooling Layer for
        Weakly Supervised Semantic Segmentation", ECCV 2022.

    Differences:
        The released code classifies the first 8 of its 32 images, ``classified=8``, as many as a batch had before there
        were triplets.

    Notes:
        Works in ``torch.compile(fullgraph=True)`` without ``sync``.

    Example:
        >>> import torch
        >>> from wsss_losses import aeft_loss
        >>> from wsss_modules import GatedPyramidPooling, sample_disjoint_negatives
        >>> _ = torch.manual_seed(0)
        >>> cam, erased, labels = torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8), torch.eye(3).repeat(2, 1)
        >>> pooling = GatedPyramidPooling(3)
        >>> logits, gpp = pooling(cam)
        >>> negatives = sample_disjoint_negatives(labels)
        >>> terms = aeft_loss(logits, gpp, pooling(erased).gpp, cam, labels, *negatives)
        >>> terms.hard
        tensor(6.)
    """
    check_floating("logits", logits)
    check_shape("logits", logits, (None, None), "(B, K)")
    check_shape("labels", labels, logits.shape, "to match logits")
    _check_classified(classified)
    scores = at_least_float32(logits[:classified])
    costs = F.binary_cross_entropy_with_logits(scores, labels[:classified].to(scores.dtype), reduction="none")
    cost, count = sum_over_processes(torch.stack([costs.sum(), costs.new_tensor(costs.numel())]), sync).unbind()
    classification = (cost / count.clamp(min=1)).to(logits.dtype)
    attraction = erasing_attraction_loss(gpp, gpp_masked, labels, sync=sync)
    repulsion, _, hard = erasing_repulsion_loss(
        gpp, cam, labels, negative_index, valid, margin=margin, threshold=threshold, min_hard=min_hard, sync=sync
    )
    total = classification + attraction_weight * attraction + repulsion_weight * repulsion
    return AEFTTerms(total, classification, attraction, repulsion, hard)


class AEFTLoss(nn.Module):
    """Objective of AEFT's epochs with triplets; see :func:`aeft_loss`.

    Args:
        attraction_weight: weight of the attraction.
        repulsion_weight: weight of the repulsion.
        classified: classify only so many images, the first of the batch.
        margin: squared distance from which on an anchor is not hard.
        threshold: activation in [0, 1] from which on a cell of the anchor is left out.
        min_hard: fewest hard anchors for which there is a repulsion.
        sync: take the images of all processes of a distributed run together.

    Example:
        >>> import torch
        >>> from wsss_losses import AEFTLoss
        >>> from wsss_modules import GatedPyramidPooling, sample_disjoint_negatives
        >>> _ = torch.manual_seed(0)
        >>> cam, labels = torch.randn(4, 3, 8, 8, requires_grad=True), torch.eye(3)[[0, 1, 2, 0]]
        >>> logits, gpp = GatedPyramidPooling(3)(cam)
        >>> negatives = sample_disjoint_negatives(labels)
        >>> AEFTLoss(min_hard=1)(logits, gpp, gpp / 2, cam, labels, *negatives).total.backward()
    """

    def __init__(
        self,
        *,
        attraction_weight: float = 0.2,
        repulsion_weight: float = 0.15,
        classified: int | None = None,
        margin: float = 0.5,
        threshold: float = 0.2,
        min_hard: int = 5,
        sync: bool = False,
    ) -> None:
        super().__init__()
        _check_hardness(margin, min_hard)
        _check_classified(classified)
        self.attraction_weight, self.repulsion_weight, self.classified = attraction_weight, repulsion_weight, classified
        self.margin, self.threshold, self.min_hard, self.sync = margin, threshold, min_hard, sync

    def forward(
        self,
        logits: Tensor,
        gpp: Tensor,
        gpp_masked: Tensor,
        cam: Tensor,
        labels: Tensor,
        negative_index: Tensor,
        valid: Tensor | None = None,
    ) -> AEFTTerms:
        """(B, K) scores, (B, K, H, W) pyramids twice and maps, (B, K) labels, (B,) negatives -> the terms."""
        return aeft_loss(
            logits,
            gpp,
            gpp_masked,
            cam,
            labels,
            negative_index,
            valid,
            attraction_weight=self.attraction_weight,
            repulsion_weight=self.repulsion_weight,
            classified=self.classified,
            margin=self.margin,
            threshold=self.threshold,
            min_hard=self.min_hard,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        weights = f"attraction_weight={self.attraction_weight}, repulsion_weight={self.repulsion_weight}"
        options = f"margin={self.margin}, threshold={self.threshold}, min_hard={self.min_hard}"
        return f"{weights}, classified={self.classified}, {options}, sync={self.sync}"


def _check_triplets(gpp: Tensor, cam: Tensor, labels: Tensor, negative_index: Tensor, valid: Tensor | None) -> None:
    check_floating("gpp", gpp)
    check_ndim("gpp", gpp, 4, "(B, K, H, W)")
    check_floating("cam", cam)
    check_shape("cam", cam, gpp.shape, "to match gpp")
    check_shape("labels", labels, gpp.shape[:2], "to match gpp")
    check_shape("negative_index", negative_index, gpp.shape[:1], "to match gpp")
    check_integer("negative_index", negative_index, "sample_disjoint_negatives gives negatives and valid")
    if valid is None:
        return
    check_shape("valid", valid, gpp.shape[:1], "to match gpp")
    if valid.dtype != torch.bool:
        raise TypeError(f"valid: expected a bool tensor, got {valid.dtype}")


def _check_hardness(margin: float, min_hard: int) -> None:
    if margin < 0:
        raise ValueError(f"margin: expected at least 0, got {margin}")
    if min_hard < 0:
        raise ValueError(f"min_hard: expected at least 0, got {min_hard}")


def _check_classified(classified: int | None) -> None:
    if classified is not None and classified < 1:
        raise ValueError(f"classified: expected at least 1, got {classified}")


def _mean_below(values: Tensor, activation: Tensor, threshold: float, present: Tensor, eps: float) -> Tensor:
    """Mean of ``values`` over the cells whose activation is below the threshold: (B, K), 0 for absent classes."""
    kept = (activation < threshold) & present[:, :, None, None]
    count = kept.sum((2, 3)).to(values.dtype)
    return torch.where(kept, values, 0.0).sum((2, 3)) / (count + eps)
