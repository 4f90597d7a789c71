"""IRN's losses: a boundary map and a displacement field learnt from pairs of near pixels.

Axis letters: B batch, H W map size, P offsets, n sources.

The three functions take maps and never build a (B, P, n) tensor. With more memory the same values come from
``affinity_loss(edge_to_affinity(edge, radius), affinity_labels(mask, radius, order="path"))`` and
``pair_displacement``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from wsss_losses._irn_pairs import boundary_costs, displacement_costs, hide_ignored, pair_counts
from wsss_losses.psa import AffinityTerms, balanced_terms
from wsss_modules._checks import check_floating, check_integer, check_shape
from wsss_modules._distributed import sum_over_processes
from wsss_modules._precision import at_least_float32
from wsss_modules.affinity.offsets import Border, is_full
from wsss_modules.kernels.backend import Backend, runs_triton


class DisplacementTerms(NamedTuple):
    """Scalars: ``total = (fg + bg) / 2``, and the mean error per component in same-class and background pairs."""

    total: Tensor
    fg: Tensor
    bg: Tensor


class InterPixelRelationTerms(NamedTuple):
    """Scalars: ``total = (positive + negative)/2 + (displacement_fg + displacement_bg)/2``, and these four terms."""

    total: Tensor
    positive: Tensor
    negative: Tensor
    displacement_fg: Tensor
    displacement_bg: Tensor


def boundary_affinity_loss(
    edge_logits: Tensor,
    mask: Tensor,
    *,
    radius: int = 10,
    border: Border = "released",
    ignore_index: int = 255,
    num_classes: int | None = None,
    eps: float = 1e-5,
    sync: bool = False,
    backend: Backend = "auto",
) -> AffinityTerms:
    r"""Learn boundaries from pairs: no boundary between pixels of one class, one somewhere between different classes.

    With ``a_ij = 1 - max sigmoid(edge_logits)`` over the path from i to j, this is
    :func:`affinity_loss`: ``total = ((bg + fg) / 2 + neg) / 2``.

    Args:
        edge_logits: (B, 1, H, W) float, logits of the boundary probability.
        mask: (B, H, W) integers: 0 background, 1..K classes, ``ignore_index`` unknown.
        radius: radius of the pairs in pixels of this map.
        border: ``"released"``: only pairs whose upper pixel keeps ``radius - 1`` pixels from the left, right and lower
            border; ``"full"``: all pairs.
        ignore_index: label of pixels that say nothing.
        num_classes: if given, labels >= ``num_classes`` are ignored too; 21 is the released rule.
        eps: keeps logarithms and empty groups finite.
        sync: sum counts and costs over the processes of a distributed run, see :func:`affinity_loss`.
        backend: of the boundary costs: ``"torch"``, ``"triton"`` (up to 32 bits), or ``"auto"``: Triton on a GPU,
            where gradients are then added in no fixed order.

    Returns:
        The total and the terms ``bg``, ``fg``, ``neg``, scalars, in the dtype of ``edge_logits``. A group without a
        pair costs 0, as does a map too small to hold a pair.

    Raises:
        TypeError: if ``edge_logits`` is not floating point, or ``mask`` not integer.
        ValueError: if the shapes do not match.

    Paper:
        Ahn, Cho and Kwak, "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations", CVPR 2019,
        arXiv:1904.05044, eq. 4.

    Differences:
        The paper's boundary loss is twice this total. The released code ignores labels >= 21 by a fixed number; here
        that is the option ``num_classes=21``.

    Notes:
        Memory is O(P·H·W) for a group of images at a time, independent of the batch: below 100 MB at radius 10 and
        128 x 128, where the released form takes 6 GB for a batch of 32. Saturated logits keep their gradient. Computed
        in float32 for half precision. Works in ``torch.compile(fullgraph=True)`` without ``sync``.

    Example:
        >>> import torch
        >>> from wsss_losses import boundary_affinity_loss
        >>> mask = torch.tensor([[[0, 0, 255, 1, 1]]])
        >>> good = torch.tensor([-9.0, -9.0, 9.0, -9.0, -9.0]).view(1, 1, 1, 5)
        >>> boundary_affinity_loss(good, mask, radius=4, border="full").total
        tensor(0.0001)
        >>> boundary_affinity_loss(-good, mask, radius=4, border="full").total > 1
        tensor(True)
    """
    _check_pair_inputs("edge_logits", edge_logits, 1, mask)
    known = hide_ignored(mask, ignore_index, num_classes)
    costs, counts = _boundary_sums(edge_logits, known, radius, border, eps, backend)
    return balanced_terms(torch.stack([costs, counts], dim=1), eps=eps, sync=sync, dtype=edge_logits.dtype)


class BoundaryAffinityLoss(nn.Module):
    """IRN's loss of the boundary branch; see :func:`boundary_affinity_loss` for the options.

    Example:
        >>> import torch
        >>> from wsss_losses import BoundaryAffinityLoss
        >>> logits = torch.zeros(1, 1, 6, 12, requires_grad=True)
        >>> BoundaryAffinityLoss(radius=5)(logits, torch.zeros(1, 6, 12, dtype=torch.int64)).total.backward()
    """

    def __init__(
        self,
        *,
        radius: int = 10,
        border: Border = "released",
        ignore_index: int = 255,
        num_classes: int | None = None,
        eps: float = 1e-5,
        sync: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.radius, self.border, self.ignore_index = radius, border, ignore_index
        self.num_classes, self.eps, self.sync = num_classes, eps, sync
        self.backend: Backend = backend

    def forward(self, edge_logits: Tensor, mask: Tensor) -> AffinityTerms:
        """(B, 1, H, W) logits and (B, H, W) mask -> total and terms."""
        return boundary_affinity_loss(
            edge_logits,
            mask,
            radius=self.radius,
            border=self.border,
            ignore_index=self.ignore_index,
            num_classes=self.num_classes,
            eps=self.eps,
            sync=self.sync,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return _options(self)


def displacement_loss(
    displacement: Tensor,
    mask: Tensor,
    *,
    radius: int = 10,
    border: Border = "released",
    ignore_index: int = 255,
    num_classes: int | None = None,
    eps: float = 1e-5,
    sync: bool = False,
) -> DisplacementTerms:
    r"""Learn vectors to a common centroid from pairs of one class.

    With ``delta = D(i) - D(j)`` and ``t = j - i`` in pixels: ``fg`` is the mean of ``|delta - t|`` over pairs of one
    foreground class, ``bg`` that of ``|delta|`` over background pairs, both per component, ``total = (fg + bg) / 2``.

    Args:
        displacement: (B, 2, H, W) float, the vector (dy, dx) of each pixel, in pixels of this map.
        mask: (B, H, W) integers: 0 background, 1..K classes, ``ignore_index`` unknown.
        radius: radius of the pairs in pixels of this map.
        border: as in :func:`boundary_affinity_loss`.
        ignore_index: label of pixels that say nothing.
        num_classes: if given, labels >= ``num_classes`` are ignored too; 21 is the released rule.
        eps: keeps empty groups finite.
        sync: sum counts and costs over the processes of a distributed run, see :func:`affinity_loss`.

    Returns:
        The total and the terms ``fg``, ``bg``, scalars, in the dtype of ``displacement``; 0 where there is no pair.

    Raises:
        TypeError: if ``displacement`` is not floating point, or ``mask`` not integer.
        ValueError: if the shapes do not match.

    Paper:
        Ahn, Cho and Kwak, CVPR 2019, arXiv:1904.05044, eq. 7-8.

    Differences:
        The paper takes the L1 norm of the vector, twice the mean over components, and twice this total: in all a
        factor of four, which the learning rate of the displacement branch absorbs.

    Notes:
        Adding a constant to ``displacement`` changes nothing. Memory O(B·H·W). Computed in float32 for half precision;
        one operation for ``torch.compile(fullgraph=True)`` without ``sync``.

    Example:
        >>> import torch
        >>> from wsss_losses import displacement_loss
        >>> row = torch.arange(5.0).view(1, 1, 5, 1).expand(1, 1, 5, 9)
        >>> column = torch.arange(9.0).view(1, 1, 1, 9).expand(1, 1, 5, 9)
        >>> to_centre = torch.cat([2 - row, 4 - column], dim=1)
        >>> displacement_loss(to_centre, torch.ones(1, 5, 9, dtype=torch.int64), radius=5).fg
        tensor(0.)
    """
    _check_pair_inputs("displacement", displacement, 2, mask)
    known = hide_ignored(mask, ignore_index, num_classes)
    costs = _displacement_costs(displacement, known, radius, border)
    counts = pair_counts(known, radius, is_full(border)).to(costs.dtype)
    return _displacement_terms(costs, counts, eps=eps, sync=sync, dtype=displacement.dtype)


class DisplacementLoss(nn.Module):
    """IRN's loss of the displacement branch; see :func:`displacement_loss` for the options.

    Example:
        >>> import torch
        >>> from wsss_losses import DisplacementLoss
        >>> field = torch.zeros(1, 2, 6, 12, requires_grad=True)
        >>> DisplacementLoss(radius=5)(field, torch.ones(1, 6, 12, dtype=torch.int64)).total.backward()
    """

    def __init__(
        self,
        *,
        radius: int = 10,
        border: Border = "released",
        ignore_index: int = 255,
        num_classes: int | None = None,
        eps: float = 1e-5,
        sync: bool = False,
    ) -> None:
        super().__init__()
        self.radius, self.border, self.ignore_index = radius, border, ignore_index
        self.num_classes, self.eps, self.sync = num_classes, eps, sync

    def forward(self, displacement: Tensor, mask: Tensor) -> DisplacementTerms:
        """(B, 2, H, W) vectors and (B, H, W) mask -> total and terms."""
        return displacement_loss(
            displacement,
            mask,
            radius=self.radius,
            border=self.border,
            ignore_index=self.ignore_index,
            num_classes=self.num_classes,
            eps=self.eps,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return _options(self)


def inter_pixel_relation_loss(
    edge_logits: Tensor,
    displacement: Tensor,
    mask: Tensor,
    *,
    radius: int = 10,
    border: Border = "released",
    ignore_index: int = 255,
    num_classes: int | None = None,
    eps: float = 1e-5,
    sync: bool = False,
    backend: Backend = "auto",
) -> InterPixelRelationTerms:
    r"""IRN's training objective: :func:`boundary_affinity_loss` plus :func:`displacement_loss`.

    .. math::
        total = \frac{positive + negative}{2} + \frac{displacement_{fg} + displacement_{bg}}{2}, \qquad
        positive = \frac{bg + fg}{2}

    Args:
        edge_logits: (B, 1, H, W) float, logits of the boundary probability.
        displacement: (B, 2, H, W) float, the vector (dy, dx) of each pixel, in pixels of this map.
        mask: (B, H, W) integers: 0 background, 1..K classes, ``ignore_index`` unknown.
        radius: radius of the pairs in pixels of this map.
        border: as in :func:`boundary_affinity_loss`.
        ignore_index: label of pixels that say nothing.
        num_classes: if given, labels >= ``num_classes`` are ignored too; 21 is the released rule.
        eps: keeps logarithms and empty groups finite.
        sync: sum counts and costs over the processes of a distributed run, see :func:`affinity_loss`.
        backend: of the boundary costs: ``"torch"``, ``"triton"`` (up to 32 bits), or ``"auto"``: Triton on a GPU,
            where gradients are then added in no fixed order.

    Returns:
        The total and its four terms, scalars; the total in the wider dtype of the two maps.

    Raises:
        TypeError: if a map is not floating point, or ``mask`` not integer.
        ValueError: if the shapes do not match.

    Paper:
        Ahn, Cho and Kwak, CVPR 2019, arXiv:1904.05044, section 4.

    Differences:
        The paper's total is ``2·boundary + 4·displacement`` of these. The two branches share no trained layer, so only
        the ratio of their learning rates changes.

    Notes:
        See the two losses; counts are made once.

    Example:
        >>> import torch
        >>> from wsss_losses import inter_pixel_relation_loss
        >>> _ = torch.manual_seed(0)
        >>> edge_logits = torch.randn(2, 1, 12, 20, requires_grad=True)
        >>> displacement = torch.randn(2, 2, 12, 20, requires_grad=True)
        >>> mask = torch.randint(0, 3, (2, 12, 20))
        >>> terms = inter_pixel_relation_loss(edge_logits, displacement, mask)
        >>> terms.total.backward()
        >>> [f"{term.item():.2f}" for term in terms]
        ['4.04', '2.16', '0.16', '4.57', '1.19']
    """
    _check_pair_inputs("edge_logits", edge_logits, 1, mask)
    _check_pair_inputs("displacement", displacement, 2, mask)
    known = hide_ignored(mask, ignore_index, num_classes)
    dtype = torch.promote_types(edge_logits.dtype, displacement.dtype)
    edge_costs, counts = _boundary_sums(edge_logits, known, radius, border, eps, backend)
    vector_costs = _displacement_costs(displacement, known, radius, border)
    counts = counts.to(torch.promote_types(dtype, torch.float32))
    edge_sums = torch.stack([edge_costs.to(counts.dtype), counts], dim=1)
    boundary = balanced_terms(edge_sums, eps=eps, sync=sync, dtype=counts.dtype)
    vectors = _displacement_terms(vector_costs.to(counts.dtype), counts, eps=eps, sync=sync, dtype=counts.dtype)
    positive = (boundary.bg + boundary.fg) / 2
    terms = (boundary.total + vectors.total, positive, boundary.neg, vectors.fg, vectors.bg)
    return InterPixelRelationTerms(*(term.to(dtype) for term in terms))


class InterPixelRelationLoss(nn.Module):
    """IRN's training objective; see :func:`inter_pixel_relation_loss` for the options.

    Example:
        >>> import torch
        >>> from wsss_losses import InterPixelRelationLoss
        >>> criterion = InterPixelRelationLoss(radius=5)
        >>> mask = torch.full((1, 6, 12), 255)
        >>> criterion(torch.zeros(1, 1, 6, 12), torch.zeros(1, 2, 6, 12), mask).total
        tensor(0.)
    """

    def __init__(
        self,
        *,
        radius: int = 10,
        border: Border = "released",
        ignore_index: int = 255,
        num_classes: int | None = None,
        eps: float = 1e-5,
        sync: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.radius, self.border, self.ignore_index = radius, border, ignore_index
        self.num_classes, self.eps, self.sync = num_classes, eps, sync
        self.backend: Backend = backend

    def forward(self, edge_logits: Tensor, displacement: Tensor, mask: Tensor) -> InterPixelRelationTerms:
        """(B, 1, H, W) logits, (B, 2, H, W) vectors and (B, H, W) mask -> total and terms."""
        return inter_pixel_relation_loss(
            edge_logits,
            displacement,
            mask,
            radius=self.radius,
            border=self.border,
            ignore_index=self.ignore_index,
            num_classes=self.num_classes,
            eps=self.eps,
            sync=self.sync,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return _options(self)


def _check_pair_inputs(name: str, x: Tensor, channels: int, mask: Tensor) -> None:
    check_shape(name, x, (None, channels, None, None), f"(B, {channels}, H, W)")
    check_floating(name, x)
    check_integer("mask", mask, "did you pass scores?")
    check_shape("mask", mask, (x.shape[0], *x.shape[2:]), f"(B, H, W) to match {name}")


def _boundary_sums(
    edge_logits: Tensor, known: Tensor, radius: int, border: Border, eps: float, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Costs and counts of the groups bg, fg, neg: (3,) each."""
    logits = edge_logits[:, 0].to(torch.promote_types(edge_logits.dtype, torch.float32))
    if runs_triton(backend, logits, known, float64=False):
        from wsss_modules.kernels.boundary_costs import boundary_pair_costs

        costs, counts = boundary_pair_costs(logits, known, radius, is_full(border), eps)
    else:
        costs = boundary_costs(logits, known, radius, is_full(border), eps)
        counts = pair_counts(known, radius, is_full(border))
    return costs, counts.to(costs.dtype)


def _displacement_costs(displacement: Tensor, known: Tensor, radius: int, border: Border) -> Tensor:
    vectors = at_least_float32(displacement)
    return displacement_costs(vectors, known, radius, is_full(border))


def _displacement_terms(
    costs: Tensor, counts: Tensor, *, eps: float, sync: bool, dtype: torch.dtype
) -> DisplacementTerms:
    """Terms from the costs of bg and fg and the counts of bg, fg and neg."""
    cost, count = sum_over_processes(torch.stack([costs, counts[:2]]), sync)
    bg, fg = (cost / (2 * count + eps)).unbind()
    return DisplacementTerms(*(term.to(dtype) for term in ((fg + bg) / 2, fg, bg)))


def _options(module: nn.Module) -> str:
    names = ("radius", "border", "ignore_index", "num_classes", "eps", "sync")
    return ", ".join(f"{name}={getattr(module, name)!r}" for name in names)
