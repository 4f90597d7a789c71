"""Suppression of backgrounds in what a class map shows, and the area of the maps (CLIMS).

Axes: n pairs of an image and a class that it shows, L background texts, R texts related to some class, B images, K
classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsss_losses._reduction import Reduction, check_reduction
from wsss_losses.clims._reduction import reduce_over_processes
from wsss_losses.clims.matching import LEAST
from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32


def background_suppression_loss(
    similarity: Tensor, *, threshold: float = 0.26, reduction: Reduction = "sum", sync: bool = False
) -> Tensor:
    r"""What the map of a class shows should match no text of a background that it already matches too well.

    .. math:: L_{CBS} = -\sum_i \sum_l [s_{il} > \tau] \log (1 - s_{il})

    No gradient passes through the comparison.

    Args:
        similarity: s, (n, L) floating point in [-1, 1], of what the maps show with each background text, see
            :func:`wsss_modules.pairwise_cosine_similarity` with ``clamp=None``.
        threshold: tau; 0.26 for VOC and 0.285 for COCO with CLIP's ViT-B/32. Another image-text model has another
            range of similarities.
        reduction: "sum" over the pairs, as released; "mean" over them, which does not depend on how many classes a
            batch shows; "none" for (n,). Texts are always summed.
        sync: with "mean" count the pairs of all processes of a distributed run, with "sum" add them up.

    Returns:
        A scalar or (n,), at least 0, in the dtype of ``similarity``; 0 where nothing exceeds the threshold.

    Raises:
        TypeError: ``similarity`` is not floating point.
        ValueError: a wrong shape or an unknown ``reduction``.

    Paper:
        Xie et al., CVPR 2022, arXiv:2203.02668: co-occurring background suppression, in the version of the released
        code.

    Differences:
        The paper's version has no threshold but backgrounds for some classes only:
        :func:`class_background_suppression_loss`. For a similarity of 1 the released loss is infinite; here the
        logarithm gets at least 1e-6.

    Notes:
        Computed in float32 for half precision. Compiles with ``fullgraph=True`` without ``sync``.

    Example:
        >>> import torch
        >>> from wsss_losses import background_suppression_loss
        >>> background_suppression_loss(torch.tensor([[0.5, 0.2], [0.1, -0.3]]))
        tensor(0.6931)
    """
    _check_suppression(similarity, reduction)
    s = at_least_float32(similarity)
    above = s > threshold
    costs = torch.where(above, -torch.log1p((-torch.where(above, s, 0.0)).clamp(min=LEAST - 1)), 0.0).sum(1)
    return reduce_over_processes(costs, None, reduction, sync).to(similarity.dtype)


class BackgroundSuppressionLoss(nn.Module):
    """What the map shows against texts of backgrounds; see :func:`background_suppression_loss`.

    Args:
        threshold: similarity from which a background is suppressed.
        reduction: "sum", "mean" or "none" over the pairs.
        sync: reduce over the processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import BackgroundSuppressionLoss
        >>> from wsss_modules import pairwise_cosine_similarity
        >>> _ = torch.manual_seed(0)
        >>> images, texts = torch.rand(3, 8, requires_grad=True), torch.rand(5, 8)
        >>> BackgroundSuppressionLoss()(pairwise_cosine_similarity(images, texts, clamp=None)).backward()
    """

    def __init__(self, *, threshold: float = 0.26, reduction: Reduction = "sum", sync: bool = False) -> None:
        super().__init__()
        check_reduction(reduction)
        self.threshold, self.sync = threshold, sync
        self.reduction: Reduction = reduction

    def forward(self, similarity: Tensor) -> Tensor:
        """Similarities (n, L) -> loss."""
        return background_suppression_loss(
            similarity, threshold=self.threshold, reduction=self.reduction, sync=self.sync
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"threshold={self.threshold}, reduction={self.reduction!r}, sync={self.sync}"


def class_background_suppression_loss(
    similarity: Tensor, related: Tensor, *, reduction: Reduction = "sum", sync: bool = False
) -> Tensor:
    r"""What the map of a class shows should match no text of the backgrounds that this class is seen with.

    .. math:: L_{CBS} = -\sum_i \frac{1}{|R_i|} \sum_{r \in R_i} \log (1 - s_{ir})

    where :math:`R_i` are the texts related to the class of pair i; a class without any costs nothing.

    Args:
        similarity: s, (n, R) floating point in [-1, 1], of what the maps show with the texts of all classes.
        related: (n, R) bool, which texts are related to the class of the pair:
            ``bank.related[pairs.class_index]`` of :class:`wsss_modules.TextPromptBank`.
        reduction: "sum" over the pairs, as released, "mean" over them, or "none" for (n,).
        sync: with "mean" count the pairs of all processes of a distributed run, with "sum" add them up.

    Returns:
        A scalar or (n,), in the dtype of ``similarity``.

    Raises:
        TypeError: ``similarity`` is not floating point, or ``related`` not bool.
        ValueError: shapes don't match or an unknown ``reduction``.

    Paper:
        Xie et al., CVPR 2022, arXiv:2203.02668: co-occurring background suppression.

    Differences:
        The released code keeps a table of texts for each class and loops over the pairs; the arithmetic is the same.
        For a similarity of 1 its loss is infinite; here the logarithm gets at least 1e-6.

    Notes:
        Computed in float32 for half precision. Compiles with ``fullgraph=True`` without ``sync``.

    Example:
        >>> import torch
        >>> from wsss_losses import class_background_suppression_loss
        >>> related = torch.tensor([[True, False], [False, False]])
        >>> class_background_suppression_loss(torch.tensor([[0.5, 0.9], [0.9, 0.9]]), related)
        tensor(0.6931)
    """
    _check_suppression(similarity, reduction)
    check_shape("related", related, similarity.shape, "to match similarity")
    if related.dtype != torch.bool:
        raise TypeError(f"related: expected bool, got {related.dtype}")
    s = torch.where(related, at_least_float32(similarity), 0.0)
    costs = torch.where(related, -torch.log1p((-s).clamp(min=LEAST - 1)), 0.0).sum(1) / related.sum(1).clamp(min=1)
    return reduce_over_processes(costs, None, reduction, sync).to(similarity.dtype)


class ClassBackgroundSuppressionLoss(nn.Module):
    """What the map shows against texts related to the class; see :func:`class_background_suppression_loss`.

    Args:
        reduction: "sum", "mean" or "none" over the pairs.
        sync: reduce over the processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import ClassBackgroundSuppressionLoss
        >>> similarity = torch.full((2, 3), 0.2, requires_grad=True)
        >>> ClassBackgroundSuppressionLoss()(similarity, torch.ones(2, 3, dtype=torch.bool)).backward()
    """

    def __init__(self, *, reduction: Reduction = "sum", sync: bool = False) -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction: Reduction = reduction
        self.sync = sync

    def forward(self, similarity: Tensor, related: Tensor) -> Tensor:
        """Similarities and relations (n, R) -> loss."""
        return class_background_suppression_loss(similarity, related, reduction=self.reduction, sync=self.sync)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"reduction={self.reduction!r}, sync={self.sync}"


def area_regularization_loss(activation: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Mean activation of all classes, absent ones too: maps should be no larger than the other terms ask for.

    .. math:: L_{REG} = \frac{1}{B K h w} \sum_{b k p} P_{b k p}

    Args:
        activation: P, (B, K, h, w) floating point in [0, 1].
        reduction: "mean" over the images, "sum", or "none" for (B,).

    Returns:
        A scalar or (B,), in the dtype of ``activation``.

    Raises:
        TypeError: ``activation`` is not floating point.
        ValueError: a wrong shape or an unknown ``reduction``.

    Paper:
        Xie et al., CVPR 2022, arXiv:2203.02668: area regularisation.

    Notes:
        The only term that reaches the maps of absent classes. Computed in float32 for half precision. Compiles with
        ``fullgraph=True``; exact under DDP without synchronisation.

    Example:
        >>> import torch
        >>> from wsss_losses import area_regularization_loss
        >>> area_regularization_loss(torch.tensor([[[[0.5, 1.0]], [[0.0, 0.1]]]]))
        tensor(0.4000)
    """
    check_reduction(reduction)
    return reduce_over_processes(image_areas(activation), None, reduction, sync=False).to(activation.dtype)


class AreaRegularizationLoss(nn.Module):
    """Mean activation of all classes; see :func:`area_regularization_loss`.

    Args:
        reduction: "mean", "sum" or "none" over the images.

    Example:
        >>> import torch
        >>> from wsss_losses import AreaRegularizationLoss
        >>> AreaRegularizationLoss(reduction="none")(torch.full((2, 3, 4, 4), 0.25))
        tensor([0.2500, 0.2500])
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction: Reduction = reduction

    def forward(self, activation: Tensor) -> Tensor:
        """Activations (B, K, h, w) -> loss."""
        return area_regularization_loss(activation, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"reduction={self.reduction!r}"


def image_areas(activation: Tensor) -> Tensor:
    """Mean activation of each image (B,)."""
    check_ndim("activation", activation, 4, "(B, K, h, w)")
    check_floating("activation", activation)
    return at_least_float32(activation).mean((1, 2, 3))


def _check_suppression(similarity: Tensor, reduction: str) -> None:
    check_ndim("similarity", similarity, 2, "(n, L)")
    check_floating("similarity", similarity)
    check_reduction(reduction)
