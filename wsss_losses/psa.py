"""AffinityNet's loss over pixel pairs (PSA).

Axis letters: B batch, P offsets, n sources of pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from wsss_modules._checks import check_floating, check_shape
from wsss_modules._distributed import sum_over_processes
from wsss_modules._precision import at_least_float32
from wsss_modules.affinity import AffinityLabels


class AffinityTerms(NamedTuple):
    """Scalars: ``total = bg/4 + fg/4 + neg/2``, and the mean cost of the pairs of each group."""

    total: Tensor
    bg: Tensor
    fg: Tensor
    neg: Tensor


def affinity_loss(affinity: Tensor, labels: AffinityLabels, *, eps: float = 1e-5, sync: bool = False) -> AffinityTerms:
    r"""Balanced cross-entropy of pair affinities: high within background and within a class, low between classes.

    .. math::
        bg = \frac{\sum -l^{bg} \log(a + \epsilon)}{\sum l^{bg} + \epsilon}, \qquad
        neg = \frac{\sum -l^{neg} \log(1 + \epsilon - a)}{\sum l^{neg} + \epsilon}, \qquad
        total = \frac{bg}{4} + \frac{fg}{4} + \frac{neg}{2}

    and ``fg`` like ``bg``. Sums run over the whole batch.

    Args:
        affinity: (B, P, n) float in [0, 1], e.g. of :class:`wsss_modules.AffinityHead` or
            :func:`wsss_modules.edge_to_affinity`.
        labels: three (B, P, n) tensors, bool or weights >= 0; see :func:`wsss_modules.affinity_labels`.
        eps: keeps logarithms and empty groups finite.
        sync: sum counts and costs over the processes of a distributed run.

    Returns:
        The total and the three terms, scalars, in the dtype of ``affinity``. A group without a pair costs 0.

    Raises:
        TypeError: if ``affinity`` is not floating point.
        ValueError: if a label tensor has another shape.

    Paper:
        Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly Supervised
        Semantic Segmentation", CVPR 2018, arXiv:1803.10464, eq. 5-7.

    Differences:
        The paper's ``bg + fg + 2 neg`` is exactly four times this, which is what the released code minimises.
        The paper has no ``eps``.

    Notes:
        The counts are those of the batch, so the loss of a batch is not the mean of the losses of its images. Under DDP
        each process normalises by its own counts; ``sync=True`` gives value and (after DDP's averaging) gradient of one
        process with the whole batch. Computed in float32 for half precision. Works in
        ``torch.compile(fullgraph=True)`` without ``sync``.

    Example:
        >>> import torch
        >>> from wsss_losses import affinity_loss
        >>> from wsss_modules import affinity_labels
        >>> labels = affinity_labels(torch.tensor([[[0, 0, 1, 1]]]), radius=2, border="full")
        >>> terms = affinity_loss(torch.full((1, 4, 4), 0.5), labels)
        >>> torch.stack(terms)
        tensor([0.6931, 0.6931, 0.6931, 0.6931])
    """
    check_floating("affinity", affinity)
    for name, label in zip(AffinityLabels._fields, labels, strict=True):
        check_shape(f"labels.{name}", label, affinity.shape, "to match affinity")
    a = at_least_float32(affinity)
    sums = [
        _weighted_sums(-torch.log(torch.where(labels.bg_pos > 0, a, 1) + eps), labels.bg_pos),
        _weighted_sums(-torch.log(torch.where(labels.fg_pos > 0, a, 1) + eps), labels.fg_pos),
        _weighted_sums(-torch.log(1 + eps - torch.where(labels.neg > 0, a, 0)), labels.neg),
    ]
    return balanced_terms(torch.stack(sums), eps=eps, sync=sync, dtype=affinity.dtype)


class AffinityLoss(nn.Module):
    """Balanced cross-entropy of pair affinities; see :func:`affinity_loss`.

    Args:
        eps: keeps logarithms and empty groups finite.
        sync: sum counts and costs over the processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import AffinityLoss
        >>> from wsss_modules import AffinityHead, affinity_labels
        >>> _ = torch.manual_seed(0)
        >>> head = AffinityHead((8, 8, 8), widths=(8, 16, 32))
        >>> maps = [torch.randn(2, 8, 12, 12) for _ in range(3)]
        >>> mask = torch.randint(0, 3, (2, 12, 12))
        >>> terms = AffinityLoss()(head(*maps), affinity_labels(mask, radius=5))
        >>> terms.total.backward()
    """

    def __init__(self, *, eps: float = 1e-5, sync: bool = False) -> None:
        super().__init__()
        self.eps, self.sync = eps, sync

    def forward(self, affinity: Tensor, labels: AffinityLabels) -> AffinityTerms:
        """(B, P, n) affinities and their labels -> total and terms."""
        return affinity_loss(affinity, labels, eps=self.eps, sync=self.sync)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"eps={self.eps}, sync={self.sync}"


def balanced_terms(sums: Tensor, *, eps: float, sync: bool, dtype: torch.dtype) -> AffinityTerms:
    """Terms from ``sums`` (3, 2): cost and count of the groups bg, fg, neg."""
    cost, count = sum_over_processes(sums, sync).unbind(1)
    bg, fg, neg = (cost / (count + eps)).unbind()
    return AffinityTerms(*(term.to(dtype) for term in ((bg + fg) / 4 + neg / 2, bg, fg, neg)))


def _weighted_sums(cost: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of ``cost``, and the sum of the weights: (2,)."""
    weight = weight.to(cost.dtype)
    return torch.stack([(cost * weight).sum(), weight.sum()])
