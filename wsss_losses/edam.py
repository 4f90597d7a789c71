"""Binary cross-entropy of the sampled classes of groups of images (EDAM).

Axes: B = G n images in G groups of n, K foreground classes, S of them sampled.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_losses._reduction import Reduction, check_reduction, reduce
from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape


def edam_loss(logits: Tensor, labels: Tensor, keys: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Binary cross-entropy of the logits of sampled classes with the labels of these classes.

    .. math:: L_b = \frac{1}{S} \sum_s \mathrm{bce}(\mathrm{logits}_{bs}, y_{b, k_s})

    It is the only loss of EDAM. The mask of a class learns from it where the class is, since the logit is read through
    it, and, from images without the class, where it is not.

    Args:
        logits: (B, S) floating point, see :class:`wsss_modules.EDAMHead`.
        labels: (B, K) multi-hot, or soft labels in [0, 1].
        keys: (S,) int64 classes 1..K of the logits, the same for all images, or (G, S), a row for each group of B / G
            images that follow each other; see :func:`wsss_modules.sample_class_keys`.
        reduction: "mean" over the B images, "sum", or "none" for (B,).

    Returns:
        A scalar or (B,), in the dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point, or ``keys`` does not hold integers.
        ValueError: shapes don't match, or an unknown ``reduction``.

    Paper:
        Wu, Huang, Gao, Wei, Wei, Zhang and Shen, "Embedded Discriminative Attention Mechanism for Weakly Supervised
        Semantic Segmentation", CVPR 2021.

    Differences:
        The released code takes one pair of images and flattens logits and labels image by image; the mean is the same.

    Notes:
        No statistics over the batch. Computed in float32 for half precision. Compiles with ``fullgraph=True``.

    Example:
        >>> import torch
        >>> from wsss_losses import edam_loss
        >>> labels = torch.tensor([[1.0, 0, 0], [1, 0, 1]])
        >>> edam_loss(torch.tensor([[2.0, -1.0], [3.0, 0.0]]), labels, torch.tensor([1, 3]))
        tensor(0.2955)
    """
    check_ndim("logits", logits, 2, "(B, S)")
    check_floating("logits", logits)
    check_shape("labels", labels, (len(logits), None), "to match logits")
    check_integer("keys", keys, "expected classes 1..K")
    groups = keys if keys.ndim == 2 else keys[None]
    check_shape("keys", groups, (None, logits.shape[1]), "to match logits")
    check_reduction(reduction)
    if len(groups) == 0 or len(logits) % len(groups):
        raise ValueError(f"keys: expected a number of groups that divides the {len(logits)} images, got {len(groups)}")
    rows = groups.repeat_interleave(len(logits) // len(groups), 0)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    with torch.autocast(logits.device.type, enabled=False):
        targets = labels.to(dtype).gather(1, rows - 1)
        costs = F.binary_cross_entropy_with_logits(logits.to(dtype), targets, reduction="none")
    return reduce(costs.sum(1) / max(1, costs.shape[1]), reduction).to(logits.dtype)


class EDAMLoss(nn.Module):
    """Binary cross-entropy of the sampled classes; see :func:`edam_loss`.

    Args:
        reduction: "mean", "sum" or "none".

    Example:
        >>> import torch
        >>> from wsss_losses import EDAMLoss
        >>> from wsss_modules import EDAMHead, sample_class_keys
        >>> _ = torch.manual_seed(0)
        >>> labels = torch.tensor([[1, 0, 1], [1, 0, 0]])  # a pair that shares class 1
        >>> keys = sample_class_keys(labels[None], 2)
        >>> out = EDAMHead(16, num_classes=3, width=8)(torch.randn(2, 16, 5, 7), keys)
        >>> EDAMLoss()(out.logits, labels, keys).backward()
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        """Logits of the sampled classes, labels of all and which were sampled -> loss."""
        return edam_loss(logits, labels, keys, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"reduction={self.reduction!r}"
