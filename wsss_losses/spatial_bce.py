"""Adaptive Spatial-BCE (Spatial-BCE): each pixel of a present class is pushed away from a threshold.

How the thresholds are made and when each loss is used: :mod:`wsss_modules.spatial_threshold`.

Axis letters: B batch, K foreground classes, H W map size, h w size of the threshold branch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_losses._reduction import check_reduction, reduce
from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._distributed import sum_over_processes
from wsss_modules._precision import at_least_float32


def spatial_bce_loss(
    logits: Tensor,
    labels: Tensor,
    threshold: Tensor,
    *,
    min_threshold: float = 1e-4,
    eps: float = 1e-8,
    log_floor: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Push the pixels of present classes away from a threshold, and those of absent classes down.

    .. math::
        h(p, t) = \begin{cases}
            1 - (t - p)^2 / t^2 & p \le t \\
            1 - (p - t)^2 / (1 - t)^2 & p > t
        \end{cases}, \qquad
        loss = \frac{1}{BKHW} \sum \begin{cases}
            h(p, t) & \text{class present} \\
            -\log(1 - p) & \text{class absent}
        \end{cases}

    with :math:`p = \sigma(logits)`. h is 0 at p = 0 and p = 1 and 1 at p = t: descent lowers what is below the
    threshold and raises what is above, with a force that grows with the distance from it. The pixels nearest to the
    threshold, the most ambiguous ones, move least.

    Args:
        logits: (B, K, H, W) float.
        labels: (B, K) multi-hot, float or bool; present means greater than 0.
        threshold: (B, K) probability, e.g. :func:`wsss_modules.rank_threshold` of ``logits.sigmoid()``. It gets no
            gradient. Those of absent classes have no effect.
        min_threshold: thresholds are raised to this at least.
        eps: least value of :math:`(1 - t)^2`, the divisor above the threshold.
        log_floor: least :math:`1 - p` under the logarithm; 1e-8 in the released code, None for the exact value.
        reduction: ``"mean"`` over all B·K·H·W terms, ``"sum"``, or ``"none"`` for (B, K, H, W).

    Returns:
        Scalar, or (B, K, H, W), in the dtype of ``logits``.

    Raises:
        TypeError: if ``logits`` or ``threshold`` is not floating point.
        ValueError: if a shape does not fit, ``log_floor`` is not positive or ``reduction`` is unknown.

    Paper:
        Wu, Gao, Huang, Wei, Wei and Liu, "Adaptive Spatial-BCE Loss for Weakly Supervised Semantic Segmentation",
        ECCV 2022.

    Differences:
        Pixels of absent classes: the released code takes the logarithm of ``max(1 - p, 1e-8)``, whose gradient is
        exactly 0 once p rounds to 1 (a logit of 17 in float32), where it is needed most. Here it is softplus of the
        logit, exact and with a live gradient however large it is. ``log_floor=1e-8`` is the released arithmetic.

    Notes:
        A pixel at the threshold belongs to the low side. Above a threshold so near 1 that ``eps`` takes effect, h is
        ``(1 - p)(1 - 2t + p) / eps``, with the same gradient in p as the formula. The terms of an image do not depend
        on the others of the batch. Computed in float32 for half precision. Works in ``torch.compile(fullgraph=True)``.

    Example:
        >>> import torch
        >>> from wsss_losses import spatial_bce_loss
        >>> logits = torch.tensor([[[[-2.0, 0.0, 2.0]]]])
        >>> loss = spatial_bce_loss(logits, torch.ones(1, 1), torch.full((1, 1), 0.5), reduction="none")
        >>> loss  # highest at the threshold
        tensor([[[[0.4200, 1.0000, 0.4200]]]])
    """
    check_reduction(reduction)
    _check_maps(logits, labels)
    check_shape("threshold", threshold, logits.shape[:2], "to match logits")
    check_floating("threshold", threshold)
    if log_floor is not None and not log_floor > 0:
        raise ValueError(f"log_floor: expected a positive number or None, got {log_floor}")
    x = at_least_float32(logits)
    t = at_least_float32(threshold.detach())[:, :, None, None].clamp(min=min_threshold)
    absence = F.softplus(x) if log_floor is None else -torch.log((1 - torch.sigmoid(x)).clamp(min=log_floor))
    cost = torch.where(_present(labels), _distance(x, t, eps)[0], absence)
    return reduce(cost, reduction).to(logits.dtype)


class SpatialBCELoss(nn.Module):
    """The network step of Spatial-BCE; see :func:`spatial_bce_loss`.

    Args:
        min_threshold: thresholds are raised to this at least.
        eps: least divisor above the threshold.
        log_floor: least :math:`1 - p` under the logarithm of absent classes; 1e-8 in the released code.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from wsss_losses import SpatialBCELoss
        >>> from wsss_modules import rank_threshold
        >>> _ = torch.manual_seed(0)
        >>> logits, labels = torch.randn(2, 3, 8, 8, requires_grad=True), torch.tensor([[1, 0, 0], [1, 0, 1]])
        >>> t = rank_threshold(logits.sigmoid(), 0.3 * labels)  # 30 % foreground
        >>> SpatialBCELoss()(logits, labels, t).backward()
        >>> raised = logits.grad < 0
        >>> torch.equal(raised, (logits.sigmoid() > t[:, :, None, None]) & (labels > 0)[:, :, None, None])
        True
    """

    def __init__(
        self,
        *,
        min_threshold: float = 1e-4,
        eps: float = 1e-8,
        log_floor: float | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.min_threshold, self.eps, self.log_floor, self.reduction = min_threshold, eps, log_floor, reduction

    def forward(self, logits: Tensor, labels: Tensor, threshold: Tensor) -> Tensor:
        """(B, K, H, W) logits, tags and thresholds -> loss."""
        return spatial_bce_loss(
            logits,
            labels,
            threshold,
            min_threshold=self.min_threshold,
            eps=self.eps,
            log_floor=self.log_floor,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        options = f"min_threshold={self.min_threshold}, eps={self.eps}, log_floor={self.log_floor}"
        return f"{options}, reduction={self.reduction!r}"


def spatial_bce_threshold_loss(
    threshold_logits: Tensor,
    labels: Tensor,
    logits: Tensor,
    *,
    min_threshold: float = 1e-4,
    eps: float = 1e-8,
    sync: bool = False,
) -> Tensor:
    r"""Fit the threshold branch to predictions that stand still: the mean cost below plus the mean cost above.

    .. math::
        t = \sigma(\mathrm{mean}_{hw}(threshold\_logits)), \qquad
        loss = \frac{\sum_{p \le t} h(p, t)}{|\{p \le t\}|} + \frac{\sum_{p > t} h(p, t)}{|\{p > t\}|}

    with h of :func:`spatial_bce_loss`. Both sums run over the pixels of present classes of the whole batch. A higher t
    lowers the cost of each pixel below it, a lower t that of each pixel above: t settles where the two balance.

    Args:
        threshold_logits: (B, K, h, w) float of the threshold branch, the prediction that learns here.
        labels: (B, K) multi-hot, float or bool; present means greater than 0.
        logits: (B, K, H, W) float class scores of the pixels. They get no gradient.
        min_threshold: thresholds are raised to this at least.
        eps: least value of :math:`(1 - t)^2`, the divisor above the threshold.
        sync: sum costs and counts over the processes of a distributed run.

    Returns:
        Scalar in the dtype of ``threshold_logits``. A side without a pixel costs 0.

    Raises:
        TypeError: if ``threshold_logits`` or ``logits`` is not floating point.
        ValueError: if a shape does not fit.

    Paper:
        Wu, Gao, Huang, Wei, Wei and Liu, ECCV 2022.

    Differences:
        The released code gives NaN where all pixels lie on one side and where no class is present.

    Notes:
        A threshold with all pixels of its map on one side moves away from them. One below ``min_threshold`` gets no
        gradient, as in the released code. Absent classes take no part. The counts are those of the batch, so the loss
        of a batch is not the mean of the losses of its images; ``sync=True`` gives value and (after DDP's averaging)
        gradient of one process with the whole batch. Computed in float32 for half precision. Works in
        ``torch.compile(fullgraph=True)`` without ``sync``.

    Example:
        >>> import torch
        >>> from wsss_losses import spatial_bce_threshold_loss
        >>> logits = torch.tensor([[[[-3.0, -2.0, 1.0, 2.0]]]])
        >>> branch = torch.zeros(1, 1, 1, 1, requires_grad=True)
        >>> for _ in range(20):
        ...     (grad,) = torch.autograd.grad(spatial_bce_threshold_loss(branch, torch.ones(1, 1), logits), branch)
        ...     branch.data -= 2 * grad
        >>> round(branch.sigmoid().item(), 2)  # between the two groups of pixels: 0.05, 0.12 and 0.73, 0.88
        0.42
    """
    check_ndim("threshold_logits", threshold_logits, 4, "(B, K, h, w)")
    check_floating("threshold_logits", threshold_logits)
    _check_maps(logits, labels)
    check_shape("threshold_logits", threshold_logits, (*logits.shape[:2], None, None), "to match logits")
    t = torch.sigmoid(at_least_float32(threshold_logits).mean((2, 3), keepdim=True)).clamp(min=min_threshold)
    cost, low = _distance(at_least_float32(logits.detach()), t, eps)
    present = _present(labels)
    sides = torch.stack([low & present, ~low & present])  # (2, B, K, H, W)
    sums = torch.where(sides, cost, 0.0).flatten(1).sum(1)
    counts = sides.flatten(1).sum(1)
    sums, counts = sum_over_processes(torch.stack([sums, counts.to(sums.dtype)]), sync).unbind()
    return (sums / counts.clamp(min=1)).sum().to(threshold_logits.dtype)


class SpatialBCEThresholdLoss(nn.Module):
    """The threshold step of Spatial-BCE; see :func:`spatial_bce_threshold_loss`.

    Args:
        min_threshold: thresholds are raised to this at least.
        eps: least divisor above the threshold.
        sync: sum costs and counts over the processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import SpatialBCEThresholdLoss
        >>> from wsss_modules import SpatialBCEHead
        >>> _ = torch.manual_seed(0)
        >>> head = SpatialBCEHead(16, num_classes=3)
        >>> out = head(torch.randn(2, 16, 6, 6))
        >>> SpatialBCEThresholdLoss()(out.threshold_logits, torch.tensor([[1, 0, 0], [1, 0, 1]]), out.logits).backward()
        >>> head.classifier.weight.grad is None, head.threshold.weight.grad.any().item()
        (True, True)
    """

    def __init__(self, *, min_threshold: float = 1e-4, eps: float = 1e-8, sync: bool = False) -> None:
        super().__init__()
        self.min_threshold, self.eps, self.sync = min_threshold, eps, sync

    def forward(self, threshold_logits: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
        """(B, K, h, w) threshold logits, tags and (B, K, H, W) logits -> loss."""
        return spatial_bce_threshold_loss(
            threshold_logits, labels, logits, min_threshold=self.min_threshold, eps=self.eps, sync=self.sync
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"min_threshold={self.min_threshold}, eps={self.eps}, sync={self.sync}"


def foreground_ratio_kl_loss(
    logits: Tensor,
    labels: Tensor,
    foreground_ratio: Tensor,
    *,
    eps: float = 1e-10,
    min_ratio: float = 1e-8,
    reduction: str = "mean",
    sync: bool = False,
) -> Tensor:
    r"""Hold the mean prediction of each present class to a prior of its share of the image.

    .. math::
        m = \mathrm{mean}_{hw}\, \sigma(logits), \qquad
        kl = m \log \frac{m}{q + \epsilon} + (1 - m) \log \frac{1 - m}{1 - q + \epsilon}

    Args:
        logits: (B, K, H, W) float.
        labels: (B, K) multi-hot, float or bool; present means greater than 0.
        foreground_ratio: (B, K) prior q in [0, 1].
        eps: keeps the divisors above 0.
        min_ratio: the quotients under the logarithms are raised to this at least.
        reduction: ``"mean"`` over the present (image, class) pairs, ``"sum"``, or ``"none"`` for (B, K) with 0 where a
            class is absent.
        sync: with ``reduction="mean"``, sum costs and counts over the processes of a distributed run.

    Returns:
        Scalar, or (B, K), in the dtype of ``logits``; at least 0 up to ``eps``, and 0 without a present class.

    Raises:
        TypeError: if ``logits`` or ``foreground_ratio`` is not floating point.
        ValueError: if a shape does not fit or ``reduction`` is unknown.

    Paper:
        Wu, Gao, Huang, Wei, Wei and Liu, ECCV 2022.

    Differences:
        The released code gives NaN for a batch without a present class. Here 1 - m is the mean of the probabilities of
        the negated logits: the same number, but not 0 once all probabilities round to 1.

    Notes:
        The direction is KL(prediction || prior). A present class with q = 0 is allowed: the cost is then finite, but up
        to 23 m with the default ``eps``, a strong push towards an empty map. ``"mean"`` divides by the count of the
        batch, see ``sync``. Computed in float32 for half precision. Works in ``torch.compile(fullgraph=True)`` without
        ``sync``.

    Example:
        >>> import torch
        >>> from wsss_losses import foreground_ratio_kl_loss
        >>> logits, labels = torch.zeros(1, 3, 4, 4), torch.tensor([[1, 1, 0]])
        >>> foreground_ratio_kl_loss(logits, labels, torch.tensor([[0.5, 0.1, 0.0]]), reduction="none")
        tensor([[0.0000, 0.5108, 0.0000]])
    """
    check_reduction(reduction)
    _check_maps(logits, labels)
    check_shape("foreground_ratio", foreground_ratio, logits.shape[:2], "to match logits")
    check_floating("foreground_ratio", foreground_ratio)
    x, q = at_least_float32(logits), at_least_float32(foreground_ratio)
    foreground, background = torch.sigmoid(x).mean((2, 3)), torch.sigmoid(-x).mean((2, 3))  # (B, K)
    kl = foreground * torch.log((foreground / (q + eps)).clamp(min=min_ratio))
    kl = kl + background * torch.log((background / (1 - q + eps)).clamp(min=min_ratio))
    present = labels > 0
    kl = torch.where(present, kl, 0.0)
    if reduction != "mean":
        return reduce(kl, reduction).to(logits.dtype)
    total, count = sum_over_processes(torch.stack([kl.sum(), present.sum().to(kl.dtype)]), sync).unbind()
    return (total / count.clamp(min=1)).to(logits.dtype)


class ForegroundRatioKLLoss(nn.Module):
    """Divergence of the mean prediction from a prior of the foreground ratio; see :func:`foreground_ratio_kl_loss`.

    Args:
        eps: keeps the divisors above 0.
        min_ratio: least quotient under the logarithms.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        sync: with ``reduction="mean"``, sum costs and counts over the processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import ForegroundRatioKLLoss
        >>> logits = torch.zeros(1, 1, 4, 4, requires_grad=True)
        >>> ForegroundRatioKLLoss()(logits, torch.ones(1, 1), torch.full((1, 1), 0.2)).backward()
        >>> (logits.grad > 0).all()  # half of the image is predicted, a fifth expected
        tensor(True)
    """

    def __init__(
        self, *, eps: float = 1e-10, min_ratio: float = 1e-8, reduction: str = "mean", sync: bool = False
    ) -> None:
        super().__init__()
        self.eps, self.min_ratio, self.reduction, self.sync = eps, min_ratio, reduction, sync

    def forward(self, logits: Tensor, labels: Tensor, foreground_ratio: Tensor) -> Tensor:
        """(B, K, H, W) logits, tags and priors -> loss."""
        return foreground_ratio_kl_loss(
            logits,
            labels,
            foreground_ratio,
            eps=self.eps,
            min_ratio=self.min_ratio,
            reduction=self.reduction,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"eps={self.eps}, min_ratio={self.min_ratio}, reduction={self.reduction!r}, sync={self.sync}"


def _distance(x: Tensor, t: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``h(sigmoid(x), t)`` (B, K, H, W) for thresholds (B, K, 1, 1), and where the low side is.

    Both sides are ``s (2 room - s) / room^2``, with the share s and the room t below the threshold, and 1 - p and 1 - t
    above. 1 - p is a sigmoid of its own, so that it has a gradient also where p rounds to 1.
    """
    p = torch.sigmoid(x)
    low = p <= t
    share = torch.where(low, p, torch.sigmoid(-x))
    room = torch.where(low, t, 1 - t)
    divisor = torch.where(low, t.square(), (1 - t).square().clamp(min=eps))
    return share * (2 * room - share) / divisor, low


def _present(labels: Tensor) -> Tensor:
    return (labels > 0)[:, :, None, None]


def _check_maps(logits: Tensor, labels: Tensor) -> None:
    check_ndim("logits", logits, 4, "(B, K, H, W)")
    check_floating("logits", logits)
    check_shape("labels", labels, logits.shape[:2], "to match logits")
