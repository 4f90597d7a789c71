"""Equivariance of class maps under a change of scale (SEAM), on which PPC builds.

Axis letters: B batch, K foreground classes, C = 1 + K maps with the background first, H W and h w sizes of two views.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_losses._reduction import Reduction, check_reduction, reduce
from wsss_losses._soft_margin import soft_margin_costs
from wsss_modules import keep_strongest, minmax_cam
from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32


def adaptive_min_pooling_loss(
    cam: Tensor, labels: Tensor, *, fraction: float = 0.25, reduction: Reduction = "mean"
) -> Tensor:
    r"""Push down the pixels where the present classes are weakest, which can't be anything but background.

    .. math:: m = \max_{k\ present} r(a_k), \qquad L = \operatorname{mean}\ \text{of the smallest } \lfloor HW\,
        fraction \rfloor \text{ of } m

    with r = ReLU.

    Args:
        cam: (B, K, H, W) float class maps; in SEAM and PPC the refined ones.
        labels: (B, K) multi-hot; present means greater than 0.
        fraction: share of the pixels of each image, in (0, 1]; at least one is taken.
        reduction: ``"mean"`` over the images, ``"sum"``, or ``"none"``: (B,).

    Returns:
        Scalar or (B,), at least 0, in the dtype of ``cam``. 0 for an image without a label.

    Raises:
        TypeError: if ``cam`` is not floating point.
        ValueError: if a shape does not fit, or an option is out of range.

    Paper:
        Wang et al., "Self-supervised Equivariant Attention Mechanism for Weakly Supervised Semantic Segmentation", CVPR
        2020, arXiv:2004.04581; in the released code, not in the paper.

    Notes:
        The terms of an image don't depend on the others. Works in ``torch.compile(fullgraph=True)``.

    Example:
        >>> import torch
        >>> from wsss_losses import adaptive_min_pooling_loss
        >>> cam = torch.tensor([[[[0.8, 0.2, 0.6, 0.4]], [[0.9, 0.9, 0.9, 0.9]]]])
        >>> adaptive_min_pooling_loss(cam, torch.tensor([[1, 0]]), fraction=0.5)
        tensor(0.3000)
    """
    check_reduction(reduction)
    _check_cam("cam", cam, labels)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: expected a number in (0, 1], got {fraction}")
    strongest = _of_present(F.relu(at_least_float32(cam)), labels).amax(1).flatten(1)  # (B, HW)
    count = max(1, int(strongest.shape[1] * fraction))
    cost = strongest.topk(count, largest=False, sorted=False).values.mean(1)
    return reduce(cost, reduction).to(cam.dtype)


class AdaptiveMinPoolingLoss(nn.Module):
    """Push down the weakest pixels of the present classes; see :func:`adaptive_min_pooling_loss`.

    Args:
        fraction: share of the pixels of each image.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from wsss_losses import AdaptiveMinPoolingLoss
        >>> _ = torch.manual_seed(0)
        >>> refined = torch.rand(2, 3, 7, 7, requires_grad=True)
        >>> AdaptiveMinPoolingLoss()(refined, torch.tensor([[1, 0, 1], [0, 1, 0]])).backward()
    """

    def __init__(self, *, fraction: float = 0.25, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.fraction = fraction
        self.reduction: Reduction = reduction

    def forward(self, cam: Tensor, labels: Tensor) -> Tensor:
        """(B, K, H, W) class maps and labels -> loss."""
        return adaptive_min_pooling_loss(cam, labels, fraction=self.fraction, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"fraction={self.fraction}, reduction={self.reduction!r}"


def equivariant_regularization_loss(
    cam1: Tensor, cam2: Tensor, labels: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    r"""Difference of the class maps of two views of an image, the second a reduced copy of the first (ER).

    .. math:: L = \operatorname{mean} | resize(\hat a^1) - \hat a^2 |

    with :math:`\hat a` the maps of present classes stretched by :func:`wsss_modules.minmax_cam`.

    Args:
        cam1: (B, K, H, W) float class maps of the first view, signed.
        cam2: (B, K, h, w) float, those of the second, to whose size the first ones are resized (bilinear, aligned
            corners).
        labels: (B, K) multi-hot; present means greater than 0.
        reduction: ``"mean"`` over all B·K·h·w entries, of which absent classes are zeros; ``"sum"`` over the images of
            the mean of each; or ``"none"``: (B,).

    Returns:
        Scalar or (B,), in [0, 1], in the dtype of ``cam1``. 0 where no class is present.

    Raises:
        TypeError: if a map is not floating point.
        ValueError: if a shape does not fit or ``reduction`` is unknown.

    Paper:
        Wang et al., CVPR 2020, arXiv:2004.04581, eq. 6.

    Notes:
        Gradients flow through both views, and through the extremes that they are stretched by. The terms of an image
        don't depend on the others. Works in ``torch.compile(fullgraph=True)``.

    Example:
        >>> import torch
        >>> from wsss_losses import equivariant_regularization_loss
        >>> cam = torch.tensor([[[[0.0, 1.0, 2.0]]]])
        >>> equivariant_regularization_loss(cam, cam.flip(3), torch.ones(1, 1))
        tensor(0.6667)
    """
    check_reduction(reduction)
    first, second = _stretched(cam1, cam2, labels)
    return reduce((first - second).abs().mean((1, 2, 3)), reduction).to(cam1.dtype)


class EquivariantRegularizationLoss(nn.Module):
    """Difference of the class maps of two views; see :func:`equivariant_regularization_loss`.

    Args:
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from wsss_losses import EquivariantRegularizationLoss
        >>> _ = torch.manual_seed(0)
        >>> cam1, cam2 = torch.randn(2, 3, 14, 14, requires_grad=True), torch.randn(2, 3, 4, 4)
        >>> EquivariantRegularizationLoss()(cam1, cam2, torch.tensor([[1, 0, 1], [0, 1, 0]])).backward()
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction: Reduction = reduction

    def forward(self, cam1: Tensor, cam2: Tensor, labels: Tensor) -> Tensor:
        """Class maps of both views and labels -> loss."""
        return equivariant_regularization_loss(cam1, cam2, labels, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"reduction={self.reduction!r}"


class CrossRegularizationTerms(NamedTuple):
    """``total = first + second``: the refined maps of the first and of the second view; scalars or (B,)."""

    total: Tensor
    first: Tensor
    second: Tensor


def equivariant_cross_regularization_loss(
    refined1: Tensor,
    refined2: Tensor,
    cam1: Tensor,
    cam2: Tensor,
    labels: Tensor,
    *,
    ratio: float = 0.2,
    legacy_background: bool = False,
    reduction: Reduction = "mean",
) -> CrossRegularizationTerms:
    r"""Difference of the refined maps of each view and the plain maps of the other, where it is largest (ECR).

    .. math:: L = T(|o(\hat a^2) - \hat r^1|) + T(|o(\hat a^1) - \hat r^2|)

    All maps are stretched by :func:`wsss_modules.minmax_cam`, brought to the size of the second view and set to 0 for
    absent classes. :math:`o(\hat a)` has a background :math:`1 - \max_k \hat a_k` and of each pixel only the strongest
    class; it is a constant. T is the mean of the largest :math:`\lfloor ratio\, C h w \rfloor` values of each image.

    Args:
        refined1: (B, 1+K, H, W) float, refined maps of the first view, background first; see
            :class:`wsss_modules.SEAMHead`.
        refined2: (B, 1+K, h, w) float, those of the second.
        cam1: (B, K, H, W) float class maps of the first view, signed. They get no gradient.
        cam2: (B, K, h, w) float, those of the second.
        labels: (B, K) multi-hot; present means greater than 0.
        ratio: share of the entries of an image that count, in (0, 1]; at least one does.
        legacy_background: the released EPS-based PPC has the background last and forgets it here: its first class is
            kept whatever it is, and the background competes with the others. True reproduces this.
        reduction: ``"mean"`` over the images, ``"sum"``, or ``"none"``: (B,).

    Returns:
        The total and both terms, in the dtype of ``refined1``.

    Raises:
        TypeError: if a map is not floating point.
        ValueError: if a shape does not fit or an option is out of range.

    Paper:
        Wang et al., CVPR 2020, arXiv:2004.04581, eq. 7.

    Notes:
        The entries of absent classes are 0, so that for images of up to ``ratio * C - 1`` classes T is the sum over all
        entries, divided by a constant. The mean of the largest values needs no sort: those above a threshold count, and
        equal ones at the threshold share what is left. The terms of an image don't depend on the others. Works in
        ``torch.compile(fullgraph=True)``.

    Example:
        >>> import torch
        >>> from wsss_losses import equivariant_cross_regularization_loss
        >>> _ = torch.manual_seed(0)
        >>> refined, cam, labels = torch.rand(2, 4, 6, 6), torch.randn(2, 3, 6, 6), torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> terms = equivariant_cross_regularization_loss(refined, refined, cam, cam, labels)
        >>> bool(terms.first == terms.second)
        True
    """
    check_reduction(reduction)
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: expected a number in (0, 1], got {ratio}")
    target1, target2 = (_with_strongest(x, legacy_background) for x in _stretched(cam1.detach(), cam2.detach(), labels))
    for name, maps, cam in (("refined1", refined1, cam1), ("refined2", refined2, cam2)):
        check_floating(name, maps)
        check_shape(name, maps, (cam.shape[0], 1 + cam.shape[1], *cam.shape[2:]), "to match its cam")
    everywhere = torch.cat([torch.ones_like(labels[:, :1]), labels], 1)
    maps1, maps2 = _stretched(refined1, refined2, everywhere, ("refined1", "refined2"))
    first, second = (
        reduce(_mean_of_largest((target - maps).abs().flatten(1), ratio), reduction)
        for target, maps in ((target2, maps1), (target1, maps2))
    )
    return CrossRegularizationTerms(*(term.to(refined1.dtype) for term in (first + second, first, second)))


class EquivariantCrossRegularizationLoss(nn.Module):
    """Difference of refined maps and the other view's plain maps; see :func:`equivariant_cross_regularization_loss`.

    Args:
        ratio: share of the entries of an image that count.
        legacy_background: reproduce the released EPS-based PPC.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from wsss_losses import EquivariantCrossRegularizationLoss
        >>> _ = torch.manual_seed(0)
        >>> refined1, refined2 = torch.rand(2, 4, 9, 9, requires_grad=True), torch.rand(2, 4, 4, 4)
        >>> cam1, cam2, labels = torch.randn(2, 3, 9, 9), torch.randn(2, 3, 4, 4), torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> EquivariantCrossRegularizationLoss()(refined1, refined2, cam1, cam2, labels).total.backward()
    """

    def __init__(self, *, ratio: float = 0.2, legacy_background: bool = False, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.ratio, self.legacy_background = ratio, legacy_background
        self.reduction: Reduction = reduction

    def forward(
        self, refined1: Tensor, refined2: Tensor, cam1: Tensor, cam2: Tensor, labels: Tensor
    ) -> CrossRegularizationTerms:
        """Refined and plain maps of both views, and labels -> total and terms."""
        return equivariant_cross_regularization_loss(
            refined1,
            refined2,
            cam1,
            cam2,
            labels,
            ratio=self.ratio,
            legacy_background=self.legacy_background,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"ratio={self.ratio}, legacy_background={self.legacy_background}, reduction={self.reduction!r}"


class SEAMTerms(NamedTuple):
    """Scalars or (B,): ``total``, the sum of the four terms; these have their weights in them."""

    total: Tensor
    classification: Tensor
    min_pooling: Tensor
    er: Tensor
    ecr: Tensor


def seam_loss(
    cam1: Tensor,
    cam2: Tensor,
    refined1: Tensor,
    refined2: Tensor,
    labels: Tensor,
    *,
    er_weight: float = 1.0,
    ecr_weight: float = 1.0,
    fraction: float = 0.25,
    ratio: float = 0.2,
    legacy_background: bool = False,
    reduction: Reduction = "mean",
) -> SEAMTerms:
    """SEAM's objective for two views of an image: classification, background, equivariance of plain and refined maps.

    The multi-label loss of the spatial means of the class maps and :func:`adaptive_min_pooling_loss` of the refined
    ones, both as mean over the views; :func:`equivariant_regularization_loss` and
    :func:`equivariant_cross_regularization_loss`.

    Args:
        cam1: (B, K, H, W) float class maps of the first view, signed.
        cam2: (B, K, h, w) float, those of the second, a reduced copy.
        refined1: (B, 1+K, H, W) float refined maps of the first view, background first.
        refined2: (B, 1+K, h, w) float, those of the second.
        labels: (B, K) multi-hot.
        er_weight: weight of ER.
        ecr_weight: weight of ECR.
        fraction: see :func:`adaptive_min_pooling_loss`.
        ratio: see :func:`equivariant_cross_regularization_loss`.
        legacy_background: see :func:`equivariant_cross_regularization_loss`.
        reduction: ``"mean"`` over the images, ``"sum"`` or ``"none"``.

    Returns:
        The total and its terms, in the dtype of ``cam1``.

    Raises:
        TypeError: if a map is not floating point.
        ValueError: if a shape does not fit or an option is out of range.

    Paper:
        Wang et al., "Self-supervised Equivariant Attention Mechanism for Weakly Supervised Semantic Segmentation", CVPR
        2020, arXiv:2004.04581; as in PPC, Du et al., CVPR 2022, arXiv:2110.07110.

    Notes:
        In the released code all maps are up-sampled to the size of their view before (bilinear, aligned corners), so
        that the spatial means are those of the up-sampled maps. The terms of an image don't depend on the others.

    Example:
        >>> import torch
        >>> from wsss_losses import seam_loss
        >>> _ = torch.manual_seed(0)
        >>> cam1, cam2, labels = torch.randn(2, 3, 9, 9), torch.randn(2, 3, 4, 4), torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> terms = seam_loss(cam1, cam2, torch.rand(2, 4, 9, 9), torch.rand(2, 4, 4, 4), labels)
        >>> bool(torch.isclose(terms.total, sum(terms[1:])))
        True
    """
    ecr = equivariant_cross_regularization_loss(
        refined1,
        refined2,
        cam1,
        cam2,
        labels,
        ratio=ratio,
        legacy_background=legacy_background,
        reduction=reduction,
    ).total
    er = equivariant_regularization_loss(cam1, cam2, labels, reduction=reduction)
    bce, weakest = (
        (first + second) / 2
        for first, second in (
            (_multi_label(cam1, labels, reduction), _multi_label(cam2, labels, reduction)),
            tuple(
                adaptive_min_pooling_loss(maps[:, 1:], labels, fraction=fraction, reduction=reduction)
                for maps in (refined1, refined2)
            ),
        )
    )
    er, ecr = er_weight * er, ecr_weight * ecr
    return SEAMTerms(bce + weakest + er + ecr, bce, weakest, er, ecr)


class SEAMLoss(nn.Module):
    """SEAM's objective for two views of an image; see :func:`seam_loss`.

    Args:
        er_weight: weight of ER.
        ecr_weight: weight of ECR.
        fraction: share of the pixels that are pushed down.
        ratio: share of the entries that count in ECR.
        legacy_background: reproduce the released EPS-based PPC.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from wsss_losses import SEAMLoss
        >>> from wsss_modules import SEAMHead
        >>> _ = torch.manual_seed(0)
        >>> head, images, labels = SEAMHead(8, 3, side_channels=(4, 6)), torch.rand(2, 3, 64, 64), torch.ones(2, 3)
        >>> outs = [head(*(torch.rand(2, d, n, n) for d in (8, 4, 6)), images) for n in (8, 4)]
        >>> cam1, cam2 = (out.scores[:, 1:] for out in outs)
        >>> SEAMLoss()(cam1, cam2, outs[0].refined, outs[1].refined, labels).total.backward()
    """

    def __init__(
        self,
        *,
        er_weight: float = 1.0,
        ecr_weight: float = 1.0,
        fraction: float = 0.25,
        ratio: float = 0.2,
        legacy_background: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self.er_weight, self.ecr_weight, self.fraction, self.ratio = er_weight, ecr_weight, fraction, ratio
        self.legacy_background = legacy_background
        self.reduction: Reduction = reduction

    def forward(self, cam1: Tensor, cam2: Tensor, refined1: Tensor, refined2: Tensor, labels: Tensor) -> SEAMTerms:
        """Plain and refined maps of both views, and labels -> total and terms."""
        return seam_loss(
            cam1,
            cam2,
            refined1,
            refined2,
            labels,
            er_weight=self.er_weight,
            ecr_weight=self.ecr_weight,
            fraction=self.fraction,
            ratio=self.ratio,
            legacy_background=self.legacy_background,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"er_weight={self.er_weight}, ecr_weight={self.ecr_weight}, fraction={self.fraction}, ratio={self.ratio}, "
            f"legacy_background={self.legacy_background}, reduction={self.reduction!r}"
        )


def _multi_label(cam: Tensor, labels: Tensor, reduction: Reduction) -> Tensor:
    costs = soft_margin_costs("cam", at_least_float32(cam).mean((2, 3)), labels)
    return reduce(costs, reduction).to(cam.dtype)


def _check_cam(name: str, cam: Tensor, labels: Tensor) -> None:
    check_ndim(name, cam, 4, "(B, K, H, W)")
    check_floating(name, cam)
    check_shape("labels", labels, cam.shape[:2], f"to match {name}")
    if cam.numel() == 0:
        raise ValueError(f"{name}: expected at least one image, class and pixel, got shape {tuple(cam.shape)}")


def _of_present(maps: Tensor, labels: Tensor) -> Tensor:
    return torch.where((labels > 0)[:, :, None, None], maps, 0.0)


def _stretched(
    first: Tensor, second: Tensor, labels: Tensor, names: tuple[str, str] = ("cam1", "cam2")
) -> tuple[Tensor, Tensor]:
    """Stretched maps of present classes, those of the first view in the size of the second, in float32 at least."""
    _check_cam(names[0], first, labels)
    check_ndim(names[1], second, 4, "(B, K, H, W)")
    check_floating(names[1], second)
    check_shape(names[1], second, (*first.shape[:2], None, None), f"to match {names[0]}")
    with torch.autocast(first.device.type, enabled=False):
        a, b = (minmax_cam(at_least_float32(maps)) for maps in (first, second))
        if a.shape != b.shape:
            a = F.interpolate(a, b.shape[2:], mode="bilinear", align_corners=True)
    return _of_present(a, labels), _of_present(b, labels)


def _with_strongest(cam: Tensor, legacy_background: bool) -> Tensor:
    """(B, K, H, W) in [0, 1] -> (B, 1+K, H, W): a background, and of each pixel the strongest class only."""
    background = 1 - cam.amax(1, keepdim=True)
    if not legacy_background:
        return torch.cat([background, keep_strongest(cam)], 1)
    others = keep_strongest(torch.cat([background, cam[:, 1:]], 1))
    return torch.cat([others[:, :1], cam[:, :1], others[:, 1:]], 1)


def _mean_of_largest(values: Tensor, ratio: float) -> Tensor:
    """Mean of the largest ``int(n * ratio)`` of n values: (B, n) -> (B,)."""
    n = values.shape[1]
    count = max(1, int(n * ratio))
    fixed = values.detach()
    threshold = fixed.kthvalue(n - count + 1, dim=1, keepdim=True).values
    above, equal = fixed > threshold, fixed == threshold
    left = (count - above.sum(1, keepdim=True)) / equal.sum(1, keepdim=True)
    return torch.where(above, values, torch.where(equal, values * left, 0.0)).sum(1) / count
