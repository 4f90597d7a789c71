"""Noise-aware loss: two pseudo labels agree on some pixels, and one is trusted by degrees on the others (BANA).

Axes: B images, C classes with the background first, h w and H W sizes of scores and labels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules import label_confidence
from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules._distributed import sum_over_processes
from wsss_modules._precision import at_least_float32


class NoiseAwareTerms(NamedTuple):
    """``total = trusted + lam * noisy``, scalars."""

    total: Tensor
    trusted: Tensor
    noisy: Tensor


def noise_aware_loss(
    cosine: Tensor,
    y_fused: Tensor,
    y_crf: Tensor,
    *,
    temperature: float = 20.0,
    gamma: float = 7.0,
    lam: float = 0.1,
    detach_confidence: bool = False,
    ignore_index: int = 255,
    sync: bool = False,
) -> NoiseAwareTerms:
    r"""Cross-entropy where two labels agree, and a weighted one where they don't.

    .. math::
        L = \frac{1}{|S|} \sum_{p \in S} ce_p(y_p) + \lambda \frac{\sum_{p \in U} \sigma_p \, ce_p(y^{crf}_p)}{\sum_{p
        \in U} \sigma_p}, \qquad \sigma_p = \Big( \frac{D_{y^{crf}}}{\max_c D_c} \Big)^\gamma, \quad D_c = 1 + l_c

    with ce the cross-entropy of :math:`\tau l`, S the pixels of ``y_fused`` that have a label, and U those that have
    none there but one in ``y_crf``. A pixel whose feature is as near to the class of ``y_crf`` as to any counts fully:
    sigma is :func:`wsss_modules.label_confidence`.

    Args:
        cosine: l, (B, C, h, w) floating point in [-1, 1]; resized to the labels, bilinear with aligned corners. See
            :class:`wsss_modules.CosineClassifier`.
        y_fused: (B, H, W) integers, 0 background, 1..C-1, or ``ignore_index``; see :func:`wsss_modules.fuse_labels`.
        y_crf: (B, H, W) integers, the label to fall back on.
        temperature: tau, above 0.
        gamma: exponent, at least 0; 0 makes the second term a plain mean.
        lam: lambda, weight of the second term, at least 0.
        detach_confidence: keep the gradient from the weights. As released they are trained too, through numerator,
            denominator and the maximum.
        ignore_index: value of pixels without a label.
        sync: take sums and counts over all processes of a distributed run.

    Returns:
        The total and both terms, in the dtype of ``cosine``. A term without pixels, or without
        confidence, is 0.

    Raises:
        TypeError: ``cosine`` is not floating point, or labels are not of integers.
        ValueError: shapes don't match, or an option is out of range.

    Paper:
        Oh, Kim and Ham, Background-Aware Pooling and Noise-Aware Loss for Weakly-Supervised Semantic Segmentation, CVPR
        2021, arXiv:2104.00905, section 3.3.

    Differences:
        The released code gives NaN where no pixel is unreliable, or none is trusted; its gradients are finite, and
        these are the same.

    Notes:
        Pixels are weighted, not picked, so shapes don't depend on the data: compiles with ``fullgraph=True``. Computed
        in float32 for half precision. Both means are over the batch, see ``sync``.

    Example:
        >>> import torch
        >>> from wsss_losses import noise_aware_loss
        >>> cosine = torch.tensor([0.5, 0.2]).view(1, 2, 1, 1).expand(1, 2, 1, 2)
        >>> terms = noise_aware_loss(cosine, torch.tensor([[[0, 255]]]), torch.tensor([[[0, 1]]]), temperature=1.0)
        >>> terms.trusted, terms.noisy
        (tensor(0.5544), tensor(0.8544))
    """
    _check_options(temperature, gamma, lam)
    check_ndim("cosine", cosine, 4, "(B, C, h, w)")
    check_floating("cosine", cosine)
    for name, mask in (("y_fused", y_fused), ("y_crf", y_crf)):
        check_shape(name, mask, (len(cosine), None, None), "to match cosine")
        check_integer(name, mask, "did you pass scores?")
    check_shape("y_crf", y_crf, y_fused.shape, "to match y_fused")
    with torch.autocast(cosine.device.type, enabled=False):
        scores = at_least_float32(cosine)
        if scores.shape[2:] != y_fused.shape[1:]:
            scores = F.interpolate(scores, y_fused.shape[1:], mode="bilinear", align_corners=True)
        trusted = y_fused != ignore_index
        unsure = ~trusted & (y_crf != ignore_index)
        known = trusted | unsure
        label = torch.where(known, torch.where(trusted, y_fused, y_crf), 0).long()
        cost = F.cross_entropy(temperature * scores, label, reduction="none")
        sigma = label_confidence(
            scores, torch.where(unsure, y_crf, ignore_index), gamma=gamma, ignore_index=ignore_index
        )
        if detach_confidence:
            sigma = sigma.detach()
        sums = torch.stack([torch.where(trusted, cost, 0.0).sum(), (sigma * cost).sum(), sigma.sum()])
        trusted_sum, noisy_sum, mass = sum_over_processes(sums, sync).unbind()
        count = sum_over_processes(trusted.sum().to(scores.dtype), sync)
        first = trusted_sum / count.clamp(min=1)
        enough = mass > 1e-30  # the slope of what is divided by less overflows
        noisy = torch.where(enough, noisy_sum, 0.0) / torch.where(enough, mass, 1.0)
        terms = first + lam * noisy, first, noisy
    return NoiseAwareTerms(*(term.to(cosine.dtype) for term in terms))


class NoiseAwareLoss(nn.Module):
    """Cross-entropy of trusted pixels, and by degrees of the others; see :func:`noise_aware_loss`.

    Args:
        temperature: factor of the cosines, above 0.
        gamma: exponent of the confidence, at least 0.
        lam: weight of the second term, at least 0.
        detach_confidence: keep the gradient from the weights.
        ignore_index: value of pixels without a label.
        sync: take sums and counts over all processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import NoiseAwareLoss
        >>> from wsss_modules import CosineClassifier, fuse_labels
        >>> _ = torch.manual_seed(0)
        >>> cosine = CosineClassifier(8, 3)(torch.rand(1, 8, 5, 5))
        >>> y_crf, y_ret = torch.randint(0, 3, (2, 1, 9, 9))
        >>> NoiseAwareLoss()(cosine, fuse_labels(y_crf, y_ret), y_crf).total.backward()
    """

    def __init__(
        self,
        *,
        temperature: float = 20.0,
        gamma: float = 7.0,
        lam: float = 0.1,
        detach_confidence: bool = False,
        ignore_index: int = 255,
        sync: bool = False,
    ) -> None:
        super().__init__()
        _check_options(temperature, gamma, lam)
        self.temperature, self.gamma, self.lam = temperature, gamma, lam
        self.detach_confidence, self.ignore_index, self.sync = detach_confidence, ignore_index, sync

    def forward(self, cosine: Tensor, y_fused: Tensor, y_crf: Tensor) -> NoiseAwareTerms:
        """Cosines and both labels -> total and terms."""
        return noise_aware_loss(
            cosine,
            y_fused,
            y_crf,
            temperature=self.temperature,
            gamma=self.gamma,
            lam=self.lam,
            detach_confidence=self.detach_confidence,
            ignore_index=self.ignore_index,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"temperature={self.temperature}, gamma={self.gamma}, lam={self.lam}, "
            f"detach_confidence={self.detach_confidence}, ignore_index={self.ignore_index}, sync={self.sync}"
        )


def _check_options(temperature: float, gamma: float, lam: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature: expected above 0, got {temperature}")
    for name, value in (("gamma", gamma), ("lam", lam)):
        if value < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}")
