"""The objective that an image climbs in AdvCAM.

Axes: M climbers, which are (image, present class) pairs; V = 2 views, an image and its mirror image; K foreground
classes, h w cells.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from wsss_losses._reduction import Reduction, check_reduction, reduce
from wsss_modules.climbing.objective import climb_terms


class AntiAdversarialClimbTerms(NamedTuple):
    """``total = others - own + ad_coeff * moved``, scalars or (M,)."""

    total: Tensor
    own: Tensor
    others: Tensor
    moved: Tensor


def anti_adversarial_climb_loss(
    logits: Tensor,
    cam: Tensor,
    initial_cam: Tensor,
    index: Tensor,
    *,
    ad_coeff: float = 7.0,
    threshold: float = 0.5,
    reduction: Reduction = "mean",
) -> AntiAdversarialClimbTerms:
    r"""Objective of AdvCAM, negated so that it is to be minimised: with respect to the image, not to any weight.

    .. math::
        L = \sum_v \Big[ \sum_{k \ne c} y_{vk} - y_{vc} \Big] + \lambda \sum_{hw} m \, |r - r_0|, \qquad
        y_{vk} = \mathrm{mean}_{hw}\, \mathrm{relu}(z_{vk}), \quad m = 1[r > \tau \max r]

    The score of the class rises; those of all other classes, present or not, fall; where the class's map r is high
    already it is to stay what it was at the start, so that the climb goes on elsewhere. The mask m is that of
    :func:`wsss_modules.discriminative_mask` and has no gradient.

    Args:
        logits: z, (M, V, K, h, w) floating point, class scores of each cell, before or after ReLU.
        cam: r, (M, h, w) floating point, at least 0: the map of each climber's class, both views merged.
        initial_cam: r_0, (M, h, w): that of the image before it climbed; taken as a constant.
        index: c, (M,) int64, the channel 0..K-1 of each climber's class.
        ad_coeff: lambda, at least 0.
        threshold: tau, in [0, 1].
        reduction: "mean" over the M climbers, "sum", or "none" for (M,).

    Returns:
        The total, the score of the own class, the sum of the scores of all others, and the moves of the high entries
        before they are weighted; in the dtype of ``logits``. 0 without any climber.

    Raises:
        TypeError: ``logits`` or ``cam`` is not floating point, or ``index`` not integer.
        ValueError: shapes don't match, a negative ``ad_coeff``, a ``threshold`` outside [0, 1], or an unknown
            ``reduction``.

    Paper:
        Lee, Kim and Yoon, "Anti-Adversarially Manipulated Attributions for Weakly and Semi-Supervised Semantic
        Segmentation", CVPR 2021, arXiv:2103.08896, section 3.3.

    Differences:
        In the paper scores are logits, the mean of z; in the released code, and here, ReLU comes before the mean. In
        the released code a map of zeros is divided by its maximum; the mask is the same.

    Notes:
        No statistics over the batch: climbers are independent, and nothing is to be synchronised. Computed in float32
        for half precision. Compiles with ``fullgraph=True``. :class:`wsss_modules.AdvCAM` climbs it.

    Example:
        >>> import torch
        >>> from wsss_losses import anti_adversarial_climb_loss
        >>> logits = torch.tensor([3.0, -1.0, 1.0]).view(1, 1, 3, 1, 1)
        >>> cam, initial = torch.tensor([[[2.0]]]), torch.tensor([[[1.5]]])
        >>> anti_adversarial_climb_loss(logits, cam, initial, torch.tensor([0])).total  # 1 - 3 + 7 * 0.5
        tensor(1.5000)
    """
    _check_options(ad_coeff, threshold, reduction)
    terms = climb_terms(logits, cam, initial_cam, index, threshold)
    costs = -terms.objective(ad_coeff), *terms
    return AntiAdversarialClimbTerms(*(reduce(cost, reduction).to(logits.dtype) for cost in costs))


class AntiAdversarialClimbLoss(nn.Module):
    """Objective of AdvCAM, negated; see :func:`anti_adversarial_climb_loss`.

    Args:
        ad_coeff: lambda, at least 0.
        threshold: tau, in [0, 1].
        reduction: "mean", "sum" or "none".

    Example:
        >>> import torch
        >>> from wsss_losses import AntiAdversarialClimbLoss
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.randn(2, 2, 5, 4, 6, requires_grad=True)
        >>> cam = logits[:, :, 1].relu().sum(1)
        >>> AntiAdversarialClimbLoss(ad_coeff=2.0)(logits, cam, cam, torch.tensor([1, 1])).total.backward()
    """

    def __init__(self, *, ad_coeff: float = 7.0, threshold: float = 0.5, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_options(ad_coeff, threshold, reduction)
        self.ad_coeff = ad_coeff
        self.threshold = threshold
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, cam: Tensor, initial_cam: Tensor, index: Tensor) -> AntiAdversarialClimbTerms:
        """Class scores, map, initial map and class of each climber -> total and terms."""
        return anti_adversarial_climb_loss(
            logits,
            cam,
            initial_cam,
            index,
            ad_coeff=self.ad_coeff,
            threshold=self.threshold,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"ad_coeff={self.ad_coeff}, threshold={self.threshold}, reduction={self.reduction!r}"


def _check_options(ad_coeff: float, threshold: float, reduction: str) -> None:
    check_reduction(reduction)
    if ad_coeff < 0:
        raise ValueError(f"ad_coeff: expected at least 0, got {ad_coeff}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number in [0, 1], got {threshold}")
