"""Losses of bounding-box attribution maps: smoothness, objective, and the mask head that grows seeds (BBAM).

Axes: P proposals, C classes with the background first, h w cells of a mask, n regions, m side of a region's mask.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_losses._reduction import check_reduction
from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules._distributed import sum_over_processes
from wsss_modules._precision import at_least_float32
from wsss_modules.attribution._objective import detection_change, total_variation

VariationReduction = Literal["sum", "mean"]


def mask_total_variation(
    mask: Tensor, *, beta: float = 3.0, diagonal: bool = True, reduction: VariationReduction = "sum"
) -> Tensor:
    r"""Roughness of a mask: powers of the differences of neighbouring cells.

    .. math:: TV(M) = \sum_{(i, j) \in \mathcal{N}} | M_i - M_j |^\beta

    over horizontal and vertical neighbours once, and over diagonal ones twice.

    Args:
        mask: (1, h, w) floating point, or (..., h, w), whose maps are added up.
        beta: exponent, above 0.
        diagonal: take diagonal neighbours in, each pair twice, as released.
        reduction: "sum", or "mean": the mean of each direction by itself, then their sum.

    Returns:
        Scalar, at least 0, in the dtype of ``mask``; 0 for a single cell.

    Raises:
        TypeError: ``mask`` is not floating point.
        ValueError: a wrong shape or option.

    Paper:
        In the released code of Lee, Yi, Shin and Yoon, BBAM: Bounding Box Attribution Map for Weakly Supervised
        Semantic and Instance Segmentation, CVPR 2021, arXiv:2103.08907; not in the paper.

    Notes:
        Unchanged by mirroring, transposing and adding a constant; ``a * mask`` has abs(a)^beta times the value.
        Compiles with ``fullgraph=True``.

    Example:
        >>> import torch
        >>> from wsss_losses import mask_total_variation
        >>> mask_total_variation(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]))
        tensor(4.)
    """
    _check_variation(beta, reduction)
    check_floating("mask", mask)
    if mask.ndim < 2:
        raise ValueError(f"mask: expected shape (..., h, w), got {tuple(mask.shape)}")
    return total_variation(mask, beta, diagonal, reduction).to(mask.dtype)


class MaskTotalVariation(nn.Module):
    """Roughness of a mask; see :func:`mask_total_variation`.

    Args:
        beta: exponent, above 0.
        diagonal: take diagonal neighbours in.
        reduction: "sum", or "mean" of each direction.

    Example:
        >>> import torch
        >>> from wsss_losses import MaskTotalVariation
        >>> MaskTotalVariation()(torch.full((1, 4, 4), 0.3))
        tensor(0.)
    """

    def __init__(self, *, beta: float = 3.0, diagonal: bool = True, reduction: VariationReduction = "sum") -> None:
        super().__init__()
        _check_variation(beta, reduction)
        self.beta, self.diagonal = beta, diagonal
        self.reduction: VariationReduction = reduction

    def forward(self, mask: Tensor) -> Tensor:
        """(1, h, w) mask -> roughness."""
        return mask_total_variation(mask, beta=self.beta, diagonal=self.diagonal, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"beta={self.beta}, diagonal={self.diagonal}, reduction={self.reduction!r}"


class BoxAttributionTerms(NamedTuple):
    """``total = area * size + tv * variation + change``, scalars."""

    total: Tensor
    size: Tensor
    variation: Tensor
    change: Tensor


def box_attribution_loss(
    logits: Tensor,
    deltas: Tensor,
    mask: Tensor,
    clean_logits: Tensor,
    clean_deltas: Tensor,
    classes: Tensor,
    *,
    area: float = 0.007,
    tv: float = 1e-4,
    tv_beta: float = 3.0,
    classification_weight: float = 0.5,
    box_weight: float = 0.5,
) -> BoxAttributionTerms:
    r"""What a mask costs: its size, its roughness, and how it changes what the detector says of an object.

    .. math::
        J(M) = \lambda \sum |M| + \mu \, TV(M) + \frac{1}{P} \sum_p \Big[ \tfrac12 | p_c - \hat p_c | + \tfrac12 \cdot
        \tfrac14 \sum_{d=1}^4 | t_{c,d} - \hat t_{c,d} | \Big]

    with :math:`p_c` the softmax probability of the object's class and :math:`t_c` its four regression deltas, of the
    masked image with a hat. Sums go over cells, so that lambda is the price of a cell. Nothing else limits the size
    of a mask: its minimiser has at most E0 / lambda cells, with E0 the change when all is hidden; see
    :class:`wsss_modules.BoundingBoxAttributionMap`, which descends this objective for many objects at once.

    Args:
        logits: (P, C) floating point, of the proposals on the masked image.
        deltas: (P, 4 C), four a class, as the detector gives them (not decoded).
        mask: (1, h, w) floating point, in [0, 1].
        clean_logits: (P, C) on the whole image; taken as constant.
        clean_deltas: (P, 4 C) on the whole image; taken as constant.
        classes: (P,) integers, or a single one: the class of the object.
        area: lambda; .007 for training images, .07 in the released demo.
        tv: mu; 1e-4, and 1e-3 in the demo. The paper has no such term.
        tv_beta: exponent of TV.
        classification_weight: weight of the change of the probability.
        box_weight: weight of the mean change of the four deltas.

    Returns:
        The total and its terms, in the dtype of ``logits``; the change is 0 without a proposal.

    Raises:
        TypeError: predictions or ``mask`` are not floating point, or ``classes`` not of integers.
        ValueError: shapes don't match, or an option is negative.

    Paper:
        Lee, Yi, Shin and Yoon, BBAM: Bounding Box Attribution Map for Weakly Supervised Semantic and Instance
        Segmentation, CVPR 2021, arXiv:2103.08907, eq. 2 to 4.

    Differences:
        The smoothness is the released code's. As there, a probability that rises is penalised like one that falls.

    Notes:
        One indexed expression over the proposals. Computed in float32 for half precision. Compiles with
        ``fullgraph=True``.

    Example:
        >>> import torch
        >>> from wsss_losses import box_attribution_loss
        >>> logits, deltas = torch.zeros(2, 3), torch.zeros(2, 12)
        >>> terms = box_attribution_loss(logits, deltas, torch.ones(1, 5, 4), logits, deltas + 1, torch.tensor(2))
        >>> terms.total, terms.size, terms.change
        (tensor(0.6400), tensor(20.), tensor(0.5000))
    """
    options = {
        "area": area,
        "tv": tv,
        "classification_weight": classification_weight,
        "box_weight": box_weight,
    }
    _check_weights(tv_beta, **options)
    check_ndim("logits", logits, 2, "(P, C)")
    check_shape("deltas", deltas, (len(logits), 4 * logits.shape[1]), "to match logits")
    check_shape("clean_logits", clean_logits, logits.shape, "to match logits")
    check_shape("clean_deltas", clean_deltas, deltas.shape, "to match deltas")
    for name, x in (("logits", logits), ("deltas", deltas), ("mask", mask)):
        check_floating(name, x)
    check_shape("mask", mask, (1, None, None), "of one object")
    check_integer("classes", classes)
    classes = classes.expand(len(logits)) if classes.ndim == 0 else classes
    check_shape("classes", classes, (len(logits),), "to match logits")
    owner = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    with torch.autocast(logits.device.type, enabled=False):
        change = detection_change(
            logits, deltas, clean_logits, clean_deltas, classes.long(), owner, 1, classification_weight, box_weight
        )[0]
        size = at_least_float32(mask).abs().sum()
        variation = total_variation(mask, tv_beta, True, "sum")
        terms = area * size + tv * variation + change, size, variation, change
    return BoxAttributionTerms(*(term.to(logits.dtype) for term in terms))


class BoxAttributionLoss(nn.Module):
    """What a mask costs; see :func:`box_attribution_loss`.

    Args:
        area: lambda, the price of a cell.
        tv: weight of the roughness.
        tv_beta: exponent of the roughness.
        classification_weight: weight of the change of the probability.
        box_weight: weight of the mean change of the four deltas.

    Example:
        >>> import torch
        >>> from wsss_losses import BoxAttributionLoss
        >>> logits, deltas = torch.zeros(2, 3), torch.zeros(2, 12)
        >>> BoxAttributionLoss(tv=0)(logits, deltas, torch.ones(1, 5, 4), logits, deltas, torch.tensor(2)).total
        tensor(0.1400)
    """

    def __init__(
        self,
        *,
        area: float = 0.007,
        tv: float = 1e-4,
        tv_beta: float = 3.0,
        classification_weight: float = 0.5,
        box_weight: float = 0.5,
    ) -> None:
        super().__init__()
        _check_weights(tv_beta, area=area, tv=tv, classification_weight=classification_weight, box_weight=box_weight)
        self.area, self.tv, self.tv_beta = area, tv, tv_beta
        self.classification_weight, self.box_weight = classification_weight, box_weight

    def forward(
        self,
        logits: Tensor,
        deltas: Tensor,
        mask: Tensor,
        clean_logits: Tensor,
        clean_deltas: Tensor,
        classes: Tensor,
    ) -> BoxAttributionTerms:
        """Detections on the masked image, mask, detections on the whole image, class -> total and terms."""
        return box_attribution_loss(
            logits,
            deltas,
            mask,
            clean_logits,
            clean_deltas,
            classes,
            area=self.area,
            tv=self.tv,
            tv_beta=self.tv_beta,
            classification_weight=self.classification_weight,
            box_weight=self.box_weight,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"area={self.area}, tv={self.tv}, tv_beta={self.tv_beta}, "
            f"classification_weight={self.classification_weight}, box_weight={self.box_weight}"
        )


def seed_growing_mask_loss(
    logits: Tensor,
    labels: Tensor,
    strict: Tensor,
    loose: Tensor | None = None,
    *,
    threshold: float = 0.9,
    sync: bool = False,
) -> Tensor:
    r"""Binary cross-entropy of a mask head on seeds that its own confident predictions extend.

    .. math::
        F = \{ S = 1 \lor q > t \} \setminus \{ L = 0 \}, \quad G = \{ L = 0 \lor q < 1 - t \} \setminus \{ S = 1 \},
        \qquad L = \tfrac12 \Big( \frac{1}{|F|} \sum_F -\log q + \frac{1}{|G|} \sum_G -\log (1 - q) \Big)

    with q the probability of the region's class. Pixels of F or G without one of their kind among their 8 neighbours
    are left out. What is neither strict nor outside the loose mask is open. The loss is 0 where F or G is empty.

    Args:
        logits: (n, C, m, m) floating point, a mask for each class of each region.
        labels: (n,) integers, the class of each region; 0, the background, takes no part.
        strict: S, (n, m, m), 1 on what surely belongs to the object.
        loose: L, (n, m, m), 0 on what surely doesn't; None: what is not strict is background, and nothing grows.
        threshold: t, above which a prediction is a seed; 1 keeps the seeds as they are.
        sync: take sums and counts over all processes of a distributed run.

    Returns:
        Scalar in the dtype of ``logits``. Without ``loose`` a half that has no pixel is 0, and the other counts.

    Raises:
        TypeError: ``logits`` is not floating point, or ``labels`` not of integers.
        ValueError: shapes don't match, or ``threshold`` outside [0, 1].

    Paper:
        In the released code of Lee, Yi, Shin and Yoon, BBAM, CVPR 2021, arXiv:2103.08907.

    Differences:
        Without ``loose`` the released code is NaN where either side has no pixel. Its targets are given for regions
        with an object only; here for all, so that shapes don't depend on the labels.

    Notes:
        The choice of pixels has no gradient. Pixels are weighted, not picked: compiles with ``fullgraph=True``. Means
        are over all regions of a batch, see ``sync``. Computed in float32 for half precision.

    Example:
        >>> import torch
        >>> from wsss_losses import seed_growing_mask_loss
        >>> strict = torch.zeros(1, 4, 4)
        >>> strict[0, :2] = 1
        >>> seed_growing_mask_loss(torch.zeros(1, 3, 4, 4), torch.tensor([2]), strict, strict)
        tensor(0.6931)
    """
    _check_threshold(threshold)
    check_ndim("logits", logits, 4, "(n, C, m, m)")
    check_floating("logits", logits)
    check_shape("labels", labels, (len(logits),), "to match logits")
    check_integer("labels", labels)
    shape = (len(logits), *logits.shape[2:])
    check_shape("strict", strict, shape, "to match logits")
    if loose is not None:
        check_shape("loose", loose, shape, "to match logits")
    index = labels.long()[:, None, None, None].expand(-1, 1, *shape[1:])
    scores = at_least_float32(logits.gather(1, index)[:, 0])  # (n, m, m)
    sure = strict == 1
    if loose is None:
        front, back = sure, ~sure
    else:
        q, never = scores.detach().sigmoid(), loose == 0
        front = _not_alone((sure | (q > threshold)) & ~never)
        back = _not_alone((never | (q < 1 - threshold)) & ~sure)
        front = front & ~back
    object_ = (labels > 0)[:, None, None]
    front, back = front & object_, back & object_
    costs = torch.where(front, F.softplus(-scores), 0.0).sum(), torch.where(back, F.softplus(scores), 0.0).sum()
    counts = front.sum().to(scores.dtype), back.sum().to(scores.dtype)
    total = sum_over_processes(torch.stack(costs), sync)
    count = sum_over_processes(torch.stack(counts), sync)
    if loose is not None:  # one side alone teaches nothing, as released
        total = torch.where((count > 0).all(), total, 0.0)
    return (total / count.clamp(min=1)).mean().to(logits.dtype)


class SeedGrowingMaskLoss(nn.Module):
    """Cross-entropy on seeds that confident predictions extend; see :func:`seed_growing_mask_loss`.

    Args:
        threshold: above which a prediction is a seed.
        sync: take sums and counts over all processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import SeedGrowingMaskLoss
        >>> _ = torch.manual_seed(0)
        >>> strict, loose = torch.zeros(2, 2, 8, 8)
        >>> strict[:, 3:6, 3:6], loose[:, 1:7, 1:7] = 1, 1
        >>> logits = torch.randn(2, 4, 8, 8, requires_grad=True)
        >>> SeedGrowingMaskLoss()(logits, torch.tensor([3, 1]), strict, loose).backward()
    """

    def __init__(self, *, threshold: float = 0.9, sync: bool = False) -> None:
        super().__init__()
        _check_threshold(threshold)
        self.threshold, self.sync = threshold, sync

    def forward(self, logits: Tensor, labels: Tensor, strict: Tensor, loose: Tensor | None = None) -> Tensor:
        """(n, C, m, m) masks, classes, and both seeds -> loss."""
        return seed_growing_mask_loss(logits, labels, strict, loose, threshold=self.threshold, sync=self.sync)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"threshold={self.threshold}, sync={self.sync}"


def _not_alone(chosen: Tensor) -> Tensor:
    """Those of ``chosen`` (n, m, m) with another one among their 8 neighbours."""
    around = F.avg_pool2d(F.pad(chosen[:, None].float(), (1, 1, 1, 1)), 3, stride=1, divisor_override=1)[:, 0]
    return chosen & (around > 1.5)


def _check_variation(beta: float, reduction: str) -> None:
    check_reduction(reduction, ("sum", "mean"))
    if beta <= 0:
        raise ValueError(f"beta: expected above 0, got {beta}")


def _check_weights(tv_beta: float, **weights: float) -> None:
    if tv_beta <= 0:
        raise ValueError(f"tv_beta: expected above 0, got {tv_beta}")
    for name, value in weights.items():
        if value < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}")


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number in [0, 1], got {threshold}")
