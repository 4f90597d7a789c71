"""Matching of what a class map shows, and of what it leaves, with the text of the class (CLIMS).

Axes: n pairs of an image and a class that it shows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsss_losses._reduction import Reduction, check_reduction
from wsss_losses.clims._reduction import reduce_over_processes
from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32

Clamp = tuple[float, float]

CLAMP: Clamp = (1e-4, 0.9999)
LEAST = 1e-6  # the smallest number that a logarithm gets to see


def object_text_matching_loss(
    similarity: Tensor,
    weight: Tensor | None = None,
    *,
    clamp: Clamp | None = CLAMP,
    leak: float = 0.0,
    positive: bool = False,
    margin: float = 0.0,
    reduction: Reduction = "mean",
    sync: bool = False,
) -> Tensor:
    r"""What the map of a class shows should match the text of the class.

    .. math:: L_{OTM} = -\frac{1}{n} \sum_i w_i \log (c(s_i) + m)

    with the clamp c and the margin m.

    Args:
        similarity: s, (n,) floating point in [-1, 1], cosine of image and text of each pair.
        weight: w, (n,) at least 0, by default 1. The mean divides by n all the same.
        clamp: least and largest similarity, beyond which there is no gradient, as released; None for none, as in the
            camera-ready version.
        leak: slope with which the loss goes on beyond the clamp (0: constant), so that a pair whose similarity is
            negative still learns.
        positive: take (s + 1) / 2, which is never negative, in place of s.
        margin: m, added to the logarithm's argument.
        reduction: "mean" over the pairs, "sum", or "none" for (n,).
        sync: count the pairs of all processes of a distributed run.

    Returns:
        A scalar or (n,), in the dtype of ``similarity``; 0 without a pair.

    Raises:
        TypeError: ``similarity`` is not floating point.
        ValueError: a wrong shape, a clamp that is no range, a negative ``leak`` or an unknown ``reduction``.

    Paper:
        Xie, Hou, Ye and Shen, "CLIMS: Cross Language Image Matching for Weakly Supervised Semantic Segmentation", CVPR
        2022, arXiv:2203.02668: object region and text label matching.

    Differences:
        The released code divides by the number of pairs in the batch, as this does. The camera-ready code has no clamp
        and is NaN for a similarity of 0 or less; here the logarithm gets at least 1e-6.

    Notes:
        Under DDP the number of pairs differs from process to process: ``sync=True`` gives value and (after DDP's
        averaging) gradient of one process with the whole batch, and needs no equal numbers. Computed in float32 for
        half precision. Compiles with ``fullgraph=True`` without ``sync``.

    Example:
        >>> import torch
        >>> from wsss_losses import object_text_matching_loss
        >>> object_text_matching_loss(torch.tensor([0.5, 0.25]))
        tensor(1.0397)
    """
    _check_matching(similarity, weight, clamp, leak, reduction)
    s = _mapped(similarity, positive)
    raw, bounded = s + margin, (s if clamp is None else s.clamp(*clamp)) + margin
    return reduce_over_processes(_costs(raw, bounded, leak), weight, reduction, sync).to(similarity.dtype)


class ObjectTextMatchingLoss(nn.Module):
    """What the map shows against the text of the class; see :func:`object_text_matching_loss`.

    Args:
        clamp: least and largest similarity, or None.
        leak: slope of the loss beyond the clamp.
        positive: take (s + 1) / 2 in place of s.
        margin: added in the logarithm.
        reduction: "mean", "sum" or "none".
        sync: count the pairs of all processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import ObjectTextMatchingLoss
        >>> similarity = torch.tensor([0.2, -0.1], requires_grad=True)
        >>> ObjectTextMatchingLoss(leak=1.0)(similarity).backward()
        >>> similarity.grad
        tensor([-2.5000, -0.5000])
    """

    def __init__(
        self,
        *,
        clamp: Clamp | None = CLAMP,
        leak: float = 0.0,
        positive: bool = False,
        margin: float = 0.0,
        reduction: Reduction = "mean",
        sync: bool = False,
    ) -> None:
        super().__init__()
        check_matching_options(clamp, leak, reduction)
        self.clamp, self.leak, self.positive, self.margin = clamp, leak, positive, margin
        self.reduction: Reduction = reduction
        self.sync = sync

    def forward(self, similarity: Tensor, weight: Tensor | None = None) -> Tensor:
        """Similarities (n,) and their weights -> loss."""
        return object_text_matching_loss(
            similarity,
            weight,
            clamp=self.clamp,
            leak=self.leak,
            positive=self.positive,
            margin=self.margin,
            reduction=self.reduction,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return _matching_options(self)


def background_text_matching_loss(
    similarity: Tensor,
    weight: Tensor | None = None,
    *,
    clamp: Clamp | None = CLAMP,
    leak: float = 0.0,
    positive: bool = False,
    margin: float = 0.0,
    reduction: Reduction = "mean",
    sync: bool = False,
) -> Tensor:
    r"""What the map of a class leaves of the image should not match the text of the class.

    .. math:: L_{BTM} = -\frac{1}{n} \sum_i w_i \log (1 - c(s_i) + m)

    Args:
        similarity: s, (n,) floating point in [-1, 1], cosine of what the map leaves with the text of the class.
        weight: w, (n,) at least 0, by default 1. The mean divides by n all the same.
        clamp: least and largest similarity, beyond which there is no gradient; None for none.
        leak: slope of the loss beyond the clamp; 0: constant.
        positive: take (s + 1) / 2 in place of s.
        margin: m, added to the logarithm's argument.
        reduction: "mean" over the pairs, "sum", or "none" for (n,).
        sync: count the pairs of all processes of a distributed run.

    Returns:
        A scalar or (n,), in the dtype of ``similarity``; 0 without a pair.

    Raises:
        TypeError: ``similarity`` is not floating point.
        ValueError: a wrong shape, a clamp that is no range, a negative ``leak`` or an unknown ``reduction``.

    Paper:
        Xie et al., CVPR 2022, arXiv:2203.02668: background region and text label matching.

    Differences:
        Without a clamp the released loss is infinite for a similarity of 1; here the logarithm gets at least 1e-6.

    Notes:
        As :func:`object_text_matching_loss`.

    Example:
        >>> import torch
        >>> from wsss_losses import background_text_matching_loss
        >>> background_text_matching_loss(torch.tensor([0.5, 0.25]))
        tensor(0.4904)
    """
    _check_matching(similarity, weight, clamp, leak, reduction)
    s = _mapped(similarity, positive)
    raw, bounded = margin - s, margin - (s if clamp is None else s.clamp(*clamp))
    return reduce_over_processes(_costs(raw, bounded, leak, offset=1.0), weight, reduction, sync).to(similarity.dtype)


class BackgroundTextMatchingLoss(nn.Module):
    """What the map leaves against the text of the class; see :func:`background_text_matching_loss`.

    Args:
        clamp: least and largest similarity, or None.
        leak: slope of the loss beyond the clamp.
        positive: take (s + 1) / 2 in place of s.
        margin: added in the logarithm.
        reduction: "mean", "sum" or "none".
        sync: count the pairs of all processes of a distributed run.

    Example:
        >>> import torch
        >>> from wsss_losses import BackgroundTextMatchingLoss
        >>> similarity = torch.tensor([0.2, -0.1], requires_grad=True)
        >>> BackgroundTextMatchingLoss()(similarity).backward()
        >>> similarity.grad
        tensor([0.6250, 0.0000])
    """

    def __init__(
        self,
        *,
        clamp: Clamp | None = CLAMP,
        leak: float = 0.0,
        positive: bool = False,
        margin: float = 0.0,
        reduction: Reduction = "mean",
        sync: bool = False,
    ) -> None:
        super().__init__()
        check_matching_options(clamp, leak, reduction)
        self.clamp, self.leak, self.positive, self.margin = clamp, leak, positive, margin
        self.reduction: Reduction = reduction
        self.sync = sync

    def forward(self, similarity: Tensor, weight: Tensor | None = None) -> Tensor:
        """Similarities (n,) and their weights -> loss."""
        return background_text_matching_loss(
            similarity,
            weight,
            clamp=self.clamp,
            leak=self.leak,
            positive=self.positive,
            margin=self.margin,
            reduction=self.reduction,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return _matching_options(self)


def _mapped(similarity: Tensor, positive: bool) -> Tensor:
    s = at_least_float32(similarity)
    return (s + 1) / 2 if positive else s


def _costs(raw: Tensor, bounded: Tensor, leak: float, offset: float = 0.0) -> Tensor:
    """-log(offset + bounded), and beyond the bounds a line."""
    argument = bounded.clamp(min=LEAST - offset)
    costs = -torch.log1p(argument) if offset == 1 else -torch.log(argument)  # 1 - s would lose a small s
    return costs + leak * (argument - raw) if leak > 0 else costs


def check_matching_options(clamp: Clamp | None, leak: float, reduction: str) -> None:
    """Raise ``ValueError`` for a clamp that is no range, a negative ``leak`` or an unknown ``reduction``."""
    check_reduction(reduction)
    if clamp is not None and not clamp[0] < clamp[1]:
        raise ValueError(f"clamp: expected least < largest or None, got {clamp}")
    if leak < 0:
        raise ValueError(f"leak: expected at least 0, got {leak}")


def _check_matching(
    similarity: Tensor, weight: Tensor | None, clamp: Clamp | None, leak: float, reduction: str
) -> None:
    check_ndim("similarity", similarity, 1, "(n,)")
    check_floating("similarity", similarity)
    if weight is not None:
        check_shape("weight", weight, similarity.shape, "to match similarity")
    check_matching_options(clamp, leak, reduction)


def _matching_options(loss: ObjectTextMatchingLoss | BackgroundTextMatchingLoss) -> str:
    return (
        f"clamp={loss.clamp}, leak={loss.leak}, positive={loss.positive}, margin={loss.margin}, "
        f"reduction={loss.reduction!r}, sync={loss.sync}"
    )
