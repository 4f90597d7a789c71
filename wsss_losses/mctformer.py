"""Losses of MCTformer: tags of class and of patch tokens, and the contrast between class tokens of MCTformer+.

Axes: B images, K foreground classes, D channels, L blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from wsss_losses._reduction import Reduction, check_reduction, reduce
from wsss_losses._soft_margin import soft_margin_costs
from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32

__all__ = [
    "ClassTokenContrastiveLoss",
    "MCTformerLoss",
    "MCTformerTerms",
    "class_token_contrastive_loss",
    "mctformer_loss",
]


def class_token_contrastive_loss(
    class_tokens: Tensor, labels: Tensor, *, num_layers: int = 12, eps: float = 1e-8, reduction: Reduction = "mean"
) -> Tensor:
    r"""Cross-entropy that tells the token of each present class from those of all other classes.

    .. math::
        L_b = \frac{1}{|P_b| + \epsilon} \, \frac{1}{L} \sum_l \sum_{k \in P_b}
        \Big[ \log \sum_{j=1}^{K} e^{z_{lj} \cdot z_{lk}} - z_{lk} \cdot z_{lk} \Big]

    with z the tokens over their length and :math:`P_b` the present classes of image b. Absent classes are negatives,
    never anchors.

    Args:
        class_tokens: (L, B, K, D) floating point, after each block; the last ``num_layers`` are taken.
        labels: (B, K) multi-hot.
        num_layers: How many blocks from the last one; more than there are means all.
        eps: Added to the number of present classes.
        reduction: "mean" over the images, "sum", or "none" for (B,).

    Returns:
        A scalar or (B,), at least 0, in the dtype of ``class_tokens``; 0 for an image without a label. With all tokens
        of an image alike it is log K.

    Raises:
        TypeError: ``class_tokens`` is not floating point.
        ValueError: shapes don't match, or an unknown option.

    Paper:
        Xu et al., MCTformer+: Multi-Class Token Transformer for Weakly Supervised Semantic Segmentation, 2023,
        arXiv:2308.03005.

    Differences:
        A token of length 0 has no direction: it takes part as zeros, without the gradient of 1e12 that the released
        code gives it.

    Notes:
        Half precision is computed in float32. Compiles with ``fullgraph=True``.

    Example:
        >>> tokens = torch.eye(3).expand(2, 1, 3, 3)  # two blocks, one image, three classes at right angles
        >>> class_token_contrastive_loss(tokens, torch.tensor([[1, 0, 1]]))
        tensor(0.5514)
    """
    check_ndim("class_tokens", class_tokens, 4, "(L, B, K, D)")
    check_floating("class_tokens", class_tokens)
    check_shape("labels", labels, class_tokens.shape[1:3], "to match class_tokens")
    _check_options(num_layers, reduction)
    if len(class_tokens) == 0:
        raise ValueError("class_tokens: expected at least one block, got none")
    with torch.autocast(class_tokens.device.type, enabled=False):
        tokens = at_least_float32(class_tokens[-num_layers:])
        length = torch.linalg.vector_norm(tokens, dim=3, keepdim=True)
        long = length > 1e-12
        directions = torch.where(long, tokens, 0) / torch.where(long, length, 1)
        similarity = directions @ directions.mT  # (L, B, K, K)
        costs = similarity.logsumexp(2) - similarity.diagonal(dim1=2, dim2=3)  # (L, B, K)
        present = (labels > 0).to(costs.dtype)
        per_image = (costs.mean(0) * present).sum(1) / (present.sum(1) + eps)
    return reduce(per_image, reduction).to(class_tokens.dtype)


class ClassTokenContrastiveLoss(nn.Module):
    """Contrast between class tokens; see :func:`class_token_contrastive_loss`.

    Args:
        num_layers: how many blocks from the last one.
        eps: added to the number of present classes.
        reduction: "mean", "sum" or "none".

    Example:
        >>> ClassTokenContrastiveLoss()(torch.ones(12, 2, 4, 8), torch.ones(2, 4))  # log 4
        tensor(1.3863)
    """

    def __init__(self, *, num_layers: int = 12, eps: float = 1e-8, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_options(num_layers, reduction)
        self.num_layers, self.eps, self.reduction = num_layers, eps, reduction

    def forward(self, class_tokens: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss, see the function."""
        return class_token_contrastive_loss(
            class_tokens, labels, num_layers=self.num_layers, eps=self.eps, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"num_layers={self.num_layers}, eps={self.eps}, reduction={self.reduction!r}"


class MCTformerTerms(NamedTuple):
    """``total``, and its terms: tags of class tokens, tags of patch tokens, contrast; 0 where a term is left out."""

    total: Tensor
    class_tags: Tensor
    patch_tags: Tensor
    contrast: Tensor


def mctformer_loss(
    class_logits: Tensor,
    patch_logits: Tensor | None,
    class_tokens: Tensor | None,
    labels: Tensor,
    *,
    contrast_weight: float = 1.0,
    num_layers: int = 12,
    reduction: Reduction = "mean",
) -> MCTformerTerms:
    r"""The loss of MCTformer: multi-label soft margin of both kinds of scores, and the contrast of MCTformer+.

    .. math::
        L = M(z^{class}, y) + M(z^{patch}, y) + w \, L_{contrast}, \qquad
        M(z, y) = -\frac{1}{K} \sum_k y_k \log \sigma(z_k) + (1 - y_k) \log \sigma(-z_k)

    V1 has the first term, V2 the first two, MCTformer+ all three. `MultiClassTokenViT` gives the arguments.

    Args:
        class_logits: (B, K) floating point, of the class tokens.
        patch_logits: (B, K), of the patch tokens; None leaves the term out.
        class_tokens: (L, B, K, D) after each block; None leaves the contrast out.
        labels: (B, K) multi-hot, without background. An image without a class teaches the absence of all.
        contrast_weight: w, the weight of the contrast.
        num_layers: See `class_token_contrastive_loss`.
        reduction: "mean" over the images, "sum", or "none" for (B,).

    Returns:
        ``total``, ``class_tags``, ``patch_tags`` and ``contrast``, unweighted, in the dtype of ``class_logits``.

    Raises:
        TypeError: scores or tokens are not floating point.
        ValueError: shapes don't match, or an unknown option.

    Paper:
        Xu et al., Multi-class Token Transformer for Weakly Supervised Semantic Segmentation, CVPR 2022,
        arXiv:2203.02891, eq. 1; MCTformer+, 2023, arXiv:2308.03005.

    Notes:
        Computed in float32 for half precision. Compiles with ``fullgraph=True``. Batches of a distributed run are
        averaged as DDP does.

    Example:
        >>> terms = mctformer_loss(torch.zeros(2, 3), torch.zeros(2, 3), None, torch.tensor([[1, 0, 1], [0, 0, 0]]))
        >>> terms.total, terms.class_tags
        (tensor(1.3863), tensor(0.6931))
    """
    _check_options(num_layers, reduction)
    check_ndim("class_logits", class_logits, 2, "(B, K)")
    check_shape("labels", labels, class_logits.shape, "to match class_logits")
    dtype = class_logits.dtype
    of_class = soft_margin_costs("class_logits", class_logits, labels)  # (B,)
    of_patch, contrast = torch.zeros_like(of_class), torch.zeros_like(of_class)
    if patch_logits is not None:
        check_shape("patch_logits", patch_logits, class_logits.shape, "to match class_logits")
        of_patch = soft_margin_costs("patch_logits", patch_logits, labels)
    if class_tokens is not None:
        check_shape("class_tokens", class_tokens, (None, *class_logits.shape, None), "to match class_logits")
        tokens = at_least_float32(class_tokens)
        contrast = class_token_contrastive_loss(tokens, labels, num_layers=num_layers, reduction="none")
    total = of_class + of_patch + contrast_weight * contrast
    return MCTformerTerms(*(reduce(x, reduction).to(dtype) for x in (total, of_class, of_patch, contrast)))


class MCTformerLoss(nn.Module):
    """The loss of MCTformer; see :func:`mctformer_loss`.

    Args:
        contrast_weight: weight of the contrast.
        num_layers: how many blocks from the last one are contrasted.
        reduction: "mean", "sum" or "none".

    Example:
        >>> MCTformerLoss()(torch.zeros(1, 4), None, torch.ones(12, 1, 4, 8), torch.ones(1, 4)).total
        tensor(2.0794)
    """

    def __init__(self, *, contrast_weight: float = 1.0, num_layers: int = 12, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_options(num_layers, reduction)
        self.contrast_weight, self.num_layers, self.reduction = contrast_weight, num_layers, reduction

    def forward(
        self, class_logits: Tensor, patch_logits: Tensor | None, class_tokens: Tensor | None, labels: Tensor
    ) -> MCTformerTerms:
        """Compute the loss, see the function."""
        return mctformer_loss(
            class_logits,
            patch_logits,
            class_tokens,
            labels,
            contrast_weight=self.contrast_weight,
            num_layers=self.num_layers,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"contrast_weight={self.contrast_weight}, num_layers={self.num_layers}, reduction={self.reduction!r}"


def _check_options(num_layers: int, reduction: str) -> None:
    check_reduction(reduction)
    if num_layers < 1:
        raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
