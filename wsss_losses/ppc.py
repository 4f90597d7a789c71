"""Contrast of pixels with prototypes of the classes, within and across two views (PPC).

Axis letters: B batch, K foreground classes, C = 1 + K classes with the background first, D features, h w common grid of
the views, P = B h w pixels.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules import cam_pseudo_labels, draw_half_of_each_class, estimate_prototypes, rank_in_class
from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._distributed import gather_over_processes
from wsss_modules._precision import at_least_float32
from wsss_modules._unit import unit
from wsss_modules.kernels.backend import Backend, runs_triton

Background = Literal["constant", "low_foreground"]


class PixelToPrototypeTerms(NamedTuple):
    """Scalars: ``total``, the sum of the three terms; these have their weights in them."""

    total: Tensor
    cross_prototype: Tensor
    cross_cam: Tensor
    intra: Tensor


def pixel_to_prototype_contrast_loss(
    features1: Tensor,
    features2: Tensor,
    cam1: Tensor,
    cam2: Tensor,
    labels: Tensor,
    drawn1: Tensor | None = None,
    drawn2: Tensor | None = None,
    prototypes1: Tensor | None = None,
    prototypes2: Tensor | None = None,
    generator: torch.Generator | None = None,
    *,
    temperature: float = 0.1,
    background: float = 0.2,
    confident: float = 1 / 8,
    semi_hard: tuple[int, int] = (3, 13),
    hard_ratio: float = 0.6,
    cross_prototype_weight: float = 0.1,
    cross_cam_weight: float = 0.1,
    intra_weight: float = 0.1,
    mask_by_label: bool = False,
    background_prototype: Background = "constant",
    drop_absent: bool = False,
    grid: tuple[int, int] | None = None,
    sync: bool = False,
    backend: Backend = "auto",
) -> PixelToPrototypeTerms:
    r"""Pull each pixel to the prototype of its class and push it from those of all others, within and across views.

    For views u, v with pseudo labels :math:`y^v` (see :func:`wsss_modules.cam_pseudo_labels`), prototypes :math:`p^v`
    (see :func:`wsss_modules.estimate_prototypes`) and logits
    :math:`z^{uv}_{ic} = \cos(f^u_i, p^v_c) / \tau`, with the cross-entropy CE averaged over all pixels,

    .. math::
        L_{cp} &= \tfrac{1}{2} [ CE(z^{12}, y^1) + CE(z^{21}, y^2) ] \\
        L_{cc} &= \tfrac{1}{2} [ CE(z^{11}, y^2) + CE(z^{22}, y^1) ] \\
        L_{in} &= \tfrac{1}{2} [ I(z^{11}, y^1) + I(z^{22}, y^2) ]

    In :math:`I(z, y)` the cost of a pixel is :math:`\log( e^{z_y} + \sum_{c \in M} e^{z_c} ) - z_y`, where M are the
    prototypes of ranks ``semi_hard[0]`` .. ``semi_hard[1] - 1`` in the order of falling logits: the hardest are left
    out, the easiest too. Of the n pixels of a class the mean is taken over n // 2 drawn at random and the n // 2 hard
    ones that end at rank ``int(hard_ratio * n)`` in the order of rising similarity to their own prototype; pixels that
    are both count twice. The mean over classes is the value of a view.

    Args:
        features1: (B, D, H, W) float, projected features of the first view; see :class:`wsss_modules.SEAMHead`.
        features2: (B, D, h, w) float, those of the second view, a reduced copy of the first.
        cam1: (B, K, H, W) float class maps of the first view, any range, without gradient; PPC: the refined ones.
        cam2: (B, K, h, w) float, those of the second view.
        labels: (B, K) multi-hot; present means greater than 0.
        drawn1: (B, h, w) bool or 0/1, the pixels of the random half of the first view; drawn if not given, see
            :func:`wsss_modules.draw_half_of_each_class`.
        drawn2: the same of the second view.
        prototypes1: (1+K, D) float, prototypes of the first view; estimated if not given. They get no gradient.
        prototypes2: the same of the second view.
        generator: source of the draws, on the device of the features.
        temperature: tau.
        background: score of the background in the pseudo labels; 0.2 in the SEAM-based PPC, 0.1 in the EPS-based.
        confident: pixels a prototype, as share of those of an image on the grid, taken from all images; 1/8 in the
            SEAM-based PPC, 1/16 in the EPS-based.
        semi_hard: first and last rank of the negatives, from 0 and without the last. With fewer than 1 + first classes
            the first is the last class, with fewer classes than last the last is the number of classes; those that
            ``drop_absent`` leaves out don't count as classes.
        hard_ratio: in [0.5, 1]; what is harder than the n // 2 pixels that end there is left out as unsure.
        cross_prototype_weight: weight of the first term.
        cross_cam_weight: weight of the second.
        intra_weight: weight of the third.
        mask_by_label: take the pixels of a prototype only from images that show its class.
        background_prototype: ``"constant"`` (released) or ``"low_foreground"``, see
            :func:`wsss_modules.estimate_prototypes`.
        drop_absent: leave classes that no image of the batch shows out of all denominators, as if there were none.
        grid: (h, w) that both views are resized to (bilinear, aligned corners); by default that of the second.
        sync: take all statistics over the processes of a distributed run.
        backend: ``"torch"``, ``"triton"`` (up to 32 bits and 128 prototypes), or ``"auto"``: Triton on a GPU.

    Returns:
        The total and its terms, at least 0, in the dtype of ``features1``.

    Raises:
        TypeError: if features or maps are not floating point.
        ValueError: if a shape does not fit, or an option is unknown or out of range.

    Paper:
        Du, Fu, Liu and Wang, "Weakly Supervised Semantic Segmentation by Pixel-to-Prototype Contrast", CVPR 2022,
        arXiv:2110.07110.

    Differences:
        The released code takes prototypes of absent classes from pixels that can't show them, and that of the
        background from an arbitrary tie: ``mask_by_label``, ``drop_absent`` and ``background_prototype`` mend this. Its
        positive is not taken out of M, and so counts twice where it has one of these ranks. It draws 10 random
        prototypes for each pixel and never reads them. Its exponentials overflow in half precision and its intra-view
        term has shape (1,).

    Notes:
        Gradients reach the features only. The four tables of similarities (P, C) are computed in two products and all
        terms are gathered from them, in O(P C) memory where the released code holds (P, C, D). No loop over classes and
        no host synchronisation: ranks within classes come from two sorts. Computed in float32 for half precision, also
        under autocast. Compiles with ``fullgraph=True`` where draws are given or ``generator`` is not. With ``sync``
        the views of all processes are gathered on the small grid; gradients are those of one process with all images.

    Example:
        >>> import torch
        >>> from wsss_losses import pixel_to_prototype_contrast_loss
        >>> _ = torch.manual_seed(0)
        >>> features1, features2 = torch.rand(2, 16, 14, 14, requires_grad=True), torch.rand(2, 16, 8, 8)
        >>> cam1, cam2, labels = torch.rand(2, 3, 14, 14), torch.rand(2, 3, 8, 8), torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> terms = pixel_to_prototype_contrast_loss(features1, features2, cam1, cam2, labels)
        >>> terms.total.backward()
        >>> [f"{term.item():.3f}" for term in terms]
        ['0.336', '0.137', '0.139', '0.060']
    """
    _check_options(temperature, confident, semi_hard, hard_ratio)
    for name, maps in (("features1", features1), ("features2", features2), ("cam1", cam1), ("cam2", cam2)):
        check_ndim(name, maps, 4, "(B, K, H, W)" if name.startswith("cam") else "(B, D, H, W)")
        check_floating(name, maps)
    size = tuple(features2.shape[2:]) if grid is None else grid
    batch, classes = cam1.shape[0], 1 + cam1.shape[1]
    check_shape("labels", labels, cam1.shape[:2], "to match cam1")
    check_shape("features1", features1, (batch, None, *cam1.shape[2:]), "to match cam1")
    check_shape("features2", features2, (batch, features1.shape[1], None, None), "to match features1")
    check_shape("cam2", cam2, (batch, classes - 1, *features2.shape[2:]), "to match cam1 and features2")
    for name, drawn in (("drawn1", drawn1), ("drawn2", drawn2)):
        if drawn is not None:
            check_shape(name, drawn, (batch, *size), "for the pixels of the grid")
    for name, given in (("prototypes1", prototypes1), ("prototypes2", prototypes2)):
        if given is not None:
            check_shape(name, given, (classes, features1.shape[1]), "for classes with background, and features1")

    with torch.autocast(features1.device.type, enabled=False):
        labels = gather_over_processes((labels > 0).to(torch.float32), sync)
        views = [
            _View.make(
                gather_over_processes(_on_grid(features, size), sync),
                gather_over_processes(_on_grid(cam.detach(), size), sync),
                labels,
                prototypes,
                background=background,
                k=max(1, int(size[0] * size[1] * confident)),
                mask_by_label=mask_by_label,
                background_prototype=background_prototype,
            )
            for features, cam, prototypes in ((features1, cam1, prototypes1), (features2, cam2, prototypes2))
        ]
        present = F.pad(labels, (1, 0), value=1).any(0)  # (C,)
        known = present if drop_absent else torch.ones_like(present)
        contrast = _Contrast(views, known, temperature, semi_hard, backend)
        (_, y1, _), (_, y2, _) = views
        cross_prototype = contrast.all(0, 1, y1) + contrast.all(1, 0, y2)
        cross_cam = contrast.all(0, 0, y2) + contrast.all(1, 1, y1)
        lots = [_draw(drawn, y, (batch, *size), classes, generator, sync) for drawn, y in ((drawn1, y1), (drawn2, y2))]
        in1, in2 = (
            _intra_view(*contrast.semi_hard(view), y, lots[view], classes, hard_ratio)
            for view, y in enumerate((y1, y2))
        )
        terms = (
            cross_prototype_weight / 2 * cross_prototype,
            cross_cam_weight / 2 * cross_cam,
            intra_weight / 2 * (in1 + in2),
        )
    return PixelToPrototypeTerms(*(term.to(features1.dtype) for term in (terms[0] + terms[1] + terms[2], *terms)))


class PixelToPrototypeContrastLoss(nn.Module):
    """Contrast of pixels with prototypes within and across two views; see :func:`pixel_to_prototype_contrast_loss`.

    Args:
        temperature: divides the cosine similarities.
        background: score of the background in the pseudo labels.
        confident: pixels a prototype, as share of those of an image.
        semi_hard: first and last rank of the negatives within a view.
        hard_ratio: where the hard half of the pixels ends.
        cross_prototype_weight: weight of the contrast with the other view's prototypes.
        cross_cam_weight: weight of the contrast under the other view's pseudo labels.
        intra_weight: weight of the contrast within a view.
        mask_by_label: take the pixels of a prototype only from images that show its class.
        background_prototype: ``"constant"`` or ``"low_foreground"``.
        drop_absent: leave absent classes out of all denominators.
        grid: common grid of the views; by default that of the second.
        sync: take all statistics over the processes of a distributed run.
        backend: see :func:`pixel_to_prototype_contrast_loss`.

    Example:
        >>> import torch
        >>> from wsss_losses import PixelToPrototypeContrastLoss
        >>> from wsss_modules import SEAMHead
        >>> _ = torch.manual_seed(0)
        >>> head, images = SEAMHead(8, 3, side_channels=(4, 6), proj_dim=16), torch.rand(2, 3, 64, 64)
        >>> first, second = (head(*(torch.rand(2, d, n, n) for d in (8, 4, 6)), images) for n in (8, 4))
        >>> cams, labels = [out.refined[:, 1:] for out in (first, second)], torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> PixelToPrototypeContrastLoss()(first.projected, second.projected, *cams, labels).total.backward()
    """

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        background: float = 0.2,
        confident: float = 1 / 8,
        semi_hard: tuple[int, int] = (3, 13),
        hard_ratio: float = 0.6,
        cross_prototype_weight: float = 0.1,
        cross_cam_weight: float = 0.1,
        intra_weight: float = 0.1,
        mask_by_label: bool = False,
        background_prototype: Background = "constant",
        drop_absent: bool = False,
        grid: tuple[int, int] | None = None,
        sync: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _check_options(temperature, confident, semi_hard, hard_ratio)
        self.temperature, self.background, self.confident = temperature, background, confident
        self.semi_hard, self.hard_ratio = semi_hard, hard_ratio
        self.cross_prototype_weight, self.cross_cam_weight = cross_prototype_weight, cross_cam_weight
        self.intra_weight, self.mask_by_label, self.drop_absent = intra_weight, mask_by_label, drop_absent
        self.background_prototype: Background = background_prototype
        self.grid, self.sync = grid, sync
        self.backend: Backend = backend

    def forward(
        self,
        features1: Tensor,
        features2: Tensor,
        cam1: Tensor,
        cam2: Tensor,
        labels: Tensor,
        drawn1: Tensor | None = None,
        drawn2: Tensor | None = None,
        prototypes1: Tensor | None = None,
        prototypes2: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PixelToPrototypeTerms:
        """Features and class maps of both views, and labels -> total and terms."""
        return pixel_to_prototype_contrast_loss(
            features1,
            features2,
            cam1,
            cam2,
            labels,
            drawn1,
            drawn2,
            prototypes1,
            prototypes2,
            generator,
            temperature=self.temperature,
            background=self.background,
            confident=self.confident,
            semi_hard=self.semi_hard,
            hard_ratio=self.hard_ratio,
            cross_prototype_weight=self.cross_prototype_weight,
            cross_cam_weight=self.cross_cam_weight,
            intra_weight=self.intra_weight,
            mask_by_label=self.mask_by_label,
            background_prototype=self.background_prototype,
            drop_absent=self.drop_absent,
            grid=self.grid,
            sync=self.sync,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"temperature={self.temperature}, background={self.background}, confident={self.confident}, "
            f"semi_hard={self.semi_hard}, hard_ratio={self.hard_ratio}, "
            f"cross_prototype_weight={self.cross_prototype_weight}, cross_cam_weight={self.cross_cam_weight}, "
            f"intra_weight={self.intra_weight}, mask_by_label={self.mask_by_label}, "
            f"background_prototype={self.background_prototype!r}, drop_absent={self.drop_absent}, grid={self.grid}, "
            f"sync={self.sync}"
        )


class _View(NamedTuple):
    """``pixels`` (P, D) of length 1, their pseudo ``classes`` (P,) and the ``prototypes`` (C, D)."""

    pixels: Tensor
    classes: Tensor
    prototypes: Tensor

    @classmethod
    def make(
        cls,
        features: Tensor,
        cam: Tensor,
        labels: Tensor,
        prototypes: Tensor | None,
        *,
        background: float,
        k: int,
        mask_by_label: bool,
        background_prototype: Background,
    ) -> _View:
        if prototypes is None:
            known = labels if mask_by_label else None
            prototypes = estimate_prototypes(features, cam, k, labels=known, background=background_prototype).prototypes
        pixels = unit(rearrange(features, "b d h w -> (b h w) d"))
        return cls(pixels, cam_pseudo_labels(cam, labels, background).flatten(), prototypes.detach().to(features.dtype))


class _Contrast:
    """Costs of the pixels of either view against the prototypes of either view, by tables or by kernels."""

    def __init__(
        self, views: list[_View], known: Tensor, temperature: float, semi_hard: tuple[int, int], backend: Backend
    ) -> None:
        self.views, self.known, self.temperature = views, known, temperature
        self.ranks = min(semi_hard[0], len(known) - 1), min(semi_hard[1], len(known))
        inputs = [part for view in views for part in (view.pixels, view.prototypes)]
        fits = backend == "triton" or len(known) <= 128  # prototypes that a block of the kernel holds
        self.triton = fits and runs_triton(backend, *inputs, float64=False)
        self.tables: list[list[Tensor]] = []  # by view of the pixels, then of the prototypes: (P, C)
        if not self.triton:
            both = torch.cat([view.prototypes for view in views]).mT  # (D, 2C)
            for view in views:
                logits = (view.pixels @ both / temperature).unflatten(1, (2, len(known)))
                logits = torch.where(known, logits, torch.finfo(logits.dtype).min / 4)
                self.tables.append(list(logits.unbind(1)))

    def all(self, pixels: int, prototypes: int, classes: Tensor) -> Tensor:
        """Mean cost of a view's pixels against all prototypes of a view: scalar."""
        if self.triton:
            return self._by_kernel(pixels, prototypes, classes, (0, 0))[0].mean()
        return F.cross_entropy(self.tables[pixels][prototypes], classes)

    def semi_hard(self, view: int) -> tuple[Tensor, Tensor]:
        """Costs (P,) against the view's own and its semi-hard prototypes, and the logits of their own (P,)."""
        if self.triton:
            return self._by_kernel(view, view, self.views[view].classes, self.ranks)
        return _semi_hard_costs(self.tables[view][view], self.views[view].classes, self.ranks, self.known.sum())

    def _by_kernel(
        self, pixels: int, prototypes: int, classes: Tensor, ranks: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        from wsss_modules.kernels.prototype_contrast import prototype_contrast

        read, against = self.views[pixels].pixels, self.views[prototypes].prototypes
        costs, own, _ = prototype_contrast(read, against, classes, self.known, self.temperature, *ranks)
        return costs, own


def _intra_view(
    cost: Tensor, positive: Tensor, classes: Tensor, drawn: Tensor, known: int, hard_ratio: float
) -> Tensor:
    """I of the costs (P,) and own logits (P,) of pixels, their pseudo labels (P,) and those drawn (P,): scalar."""
    rank, count = rank_in_class(classes, positive.detach(), known)
    half, end = count // 2, (count.double() * hard_ratio).long()  # in float64, as int(n * hard_ratio) is
    hard = (rank >= end - half) & (rank < end)
    weight = torch.where(half > 0, drawn.to(cost.dtype) + hard.to(cost.dtype), 0.0)
    member = (classes[:, None] == torch.arange(known, device=classes.device)).to(cost.dtype)  # (P, C)
    sums, weights = torch.stack([cost * weight, weight]) @ member  # (C,) each
    values = torch.where(weights > 0, sums / torch.where(weights > 0, weights, 1.0), 0.0)
    return values.sum() / member.any(0).sum()


def _semi_hard_costs(logits: Tensor, classes: Tensor, ranks: tuple[int, int], known: Tensor) -> tuple[Tensor, Tensor]:
    """Costs (P,) of the pixels against the prototypes of these ranks, and the logits of their own (P,).

    ``known`` prototypes count; the others have the last ranks.
    """
    positive = logits.gather(1, classes[:, None])[:, 0]
    ranked = logits.topk(ranks[1], dim=1).values
    rank = torch.arange(ranks[1], device=logits.device)
    chosen = (rank >= (known - 1).clamp(max=ranks[0])) & (rank < known)
    negative = torch.where(chosen, ranked, -torch.inf).logsumexp(1)
    return torch.logaddexp(positive, negative) - positive, positive


def _draw(
    drawn: Tensor | None,
    classes: Tensor,
    shape: tuple[int, ...],
    num_classes: int,
    generator: torch.Generator | None,
    sync: bool,
) -> Tensor:
    """The pixels of the random half of all processes (P,); ``shape`` (B, h, w) is of this one's images."""
    if drawn is not None:
        return gather_over_processes(drawn.to(torch.float32), sync).flatten()
    lots = gather_over_processes(torch.rand(shape, generator=generator, device=classes.device), sync)
    return draw_half_of_each_class(classes.view(lots.shape), num_classes, lots=lots).flatten()


def _on_grid(x: Tensor, size: tuple[int, ...]) -> Tensor:
    x = at_least_float32(x)
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=True)


def _check_options(temperature: float, confident: float, semi_hard: tuple[int, int], hard_ratio: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if not 0 < confident <= 1:
        raise ValueError(f"confident: expected a number in (0, 1], got {confident}")
    if not 0 <= semi_hard[0] < semi_hard[1]:
        raise ValueError(f"semi_hard: expected ranks 0 <= first < last, got {semi_hard}")
    if not 0.5 <= hard_ratio <= 1:
        raise ValueError(f"hard_ratio: expected a number in [0.5, 1], got {hard_ratio}")
