"""AdvCAM: class maps summed over an image that climbs towards its class.

Axes: B images, K foreground classes, M climbers, which are (image, present class) pairs; each climbs as a pair of an
image and its mirror image; H W pixels, h w cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._frozen import frozen
from wsss_modules._precision import at_least_float32
from wsss_modules.cam import PresentCAM, merge_flip, multi_scale_cam
from wsss_modules.climbing.objective import climb_terms
from wsss_modules.climbing.regions import ClassRegions, GradCAM, _check_threshold, linear_head_regions
from wsss_modules.climbing.step import anti_adversarial_step

__all__ = ["AdvCAM", "ClimbStep"]

HALF = 0.5  # the scale that the released code climbs with fewer steps


class ClimbStep(NamedTuple):
    """Where the climbers stand. Nothing has a graph.

    Attributes:
        step: counted from 0, where the images are clean.
        pairs: (M, 2, 3, H, W) the images of this step.
        region: (M, h, w) map of each climber's class, mirror image turned back and added.
        objective: (M,) what is being raised.
        gradient: (M, 2, 3, H, W) of the objective with respect to ``pairs``; None at the last step, where none is
            needed.
    """

    step: int
    pairs: Tensor
    region: Tensor
    objective: Tensor
    gradient: Tensor | None


class AdvCAM(nn.Module):
    r"""Maps of the present classes, summed over images that climb towards them.

    From a trained classifier and without training: each step moves the pixels so that the class's score rises (see
    `anti_adversarial_step`) while those of all other classes fall and the entries of the map that are high already stay
    (see :func:`wsss_losses.anti_adversarial_climb_loss`). Parts of an object that spoke for the class only weakly join
    in, and stay in the sum of the maps over all steps. Each scale climbs by itself:

    .. math:: a_c = \sum_s w_s \sum_{t=0}^{T_s - 1} r_c(x_{st})

    up-sampled to a common grid and divided by its maximum, as in `multi_scale_cam`. One step is the plain CAM.

    Args:
        model: From images (N, 3, H, W) to class maps (N, K, h, w), before or after ReLU, or to an output with these as
            its field ``cam``; or a `GradCAM` for heads that are no 1 x 1 convolution.
        head: The 1 x 1 convolution (or linear layer) without bias whose output the class maps are. With it, maps have
            the scale of the released Grad-CAM, see `linear_head_regions`. None: maps are taken as they are, as in the
            paper; they are then larger by about twice the number of positive weights of the class, and so is the
            effect of ``ad_coeff``.
        steps: T, at least 1: T maps and T - 1 moves.
        step_size: See `anti_adversarial_step`, in units of the normalised pixels.
        ad_coeff: Weight of the moves of high entries.
        threshold: Share of a map's maximum above which an entry is high.
        normalize_grad: See `anti_adversarial_step`.
        clamp: Keep to the range of the pixels of a "pair", of each of its channels ("channel"), or of nothing ("none").
        legacy_scale_weight: Weigh the scales as released. The half scale there takes fewer steps, whose number is meant
            to be made up for by a factor of 2, but the factor stays on for the scales after it. By default each scale
            weighs as if it had taken T steps.
        chunk: At most so many climbers at a time go through the network, which bounds its memory.

    Raises:
        ValueError: an option out of its range, or a ``head`` with a bias.

    Paper:
        Lee, Kim and Yoon, Anti-Adversarially Manipulated Attributions for Weakly and Semi-Supervised Semantic
        Segmentation, CVPR 2021, arXiv:2103.08896.

    Differences:
        The released code normalises the gradient, clamps, and takes Grad-CAM for the map; the paper does none of these
        (``normalize_grad=False``, ``clamp="none"``, ``head=None``). Its backward passes also form the gradients of all
        weights, and it takes a second one for Grad-CAM. An image without a class crashes it; here it has no map. Its
        scale weights: ``legacy_scale_weight=True``.

    Notes:
        One forward pass and one backward pass to the pixels for each step, for all climbers of all images together;
        the last step needs no backward pass. The network is put in eval mode and its weights are frozen during each
        step and given back as they were; a plain function is called as it is. Works inside ``torch.no_grad()``. Under
        autocast the network runs in low precision; images, gradients and maps stay in float32. Climbers are
        independent of each other; there is nothing to synchronise between processes. No graph of ``torch.compile``
        spans a step, since it holds a backward pass of its own; compile ``model`` instead.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> backbone, head = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()), nn.Conv2d(8, 5, 1, bias=False)
        >>> advcam = AdvCAM(nn.Sequential(backbone, head), head, steps=4)
        >>> image = torch.rand(1, 3, 32, 48)
        >>> pair = torch.stack([image, image.flip(-1)], 1)
        >>> out = advcam({1.0: pair, 0.5: pair[..., ::2, ::2]}, torch.tensor([[0, 1, 0, 0, 1]]), (32, 48))
        >>> out.cam.shape, out.high_res.shape, out.keys
        (torch.Size([2, 8, 12]), torch.Size([2, 32, 48]), tensor([2, 5]))
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        head: nn.Module | None = None,
        *,
        steps: int = 27,
        step_size: float = 0.08,
        ad_coeff: float = 7.0,
        threshold: float = 0.5,
        normalize_grad: bool = True,
        clamp: Literal["pair", "channel", "none"] = "pair",
        legacy_scale_weight: bool = False,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, which is the plain CAM, got {steps}")
        if step_size < 0 or ad_coeff < 0:
            raise ValueError(f"step_size, ad_coeff: expected at least 0, got {step_size} and {ad_coeff}")
        _check_threshold(threshold)
        if clamp not in ("pair", "channel", "none"):
            raise ValueError(f'clamp: expected "pair", "channel" or "none", got {clamp!r}')
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk: expected at least 1 or None, got {chunk}")
        if head is not None and isinstance(model, GradCAM):
            raise ValueError("head: expected None with a GradCAM, which has its own")
        if getattr(head, "bias", None) is not None:
            raise ValueError("head: expected a 1 x 1 convolution without bias; wrap backbone and head in a GradCAM")
        self.model, self.head = model, head
        self.steps, self.step_size, self.ad_coeff, self.threshold = steps, step_size, ad_coeff, threshold
        self.normalize_grad, self.clamp, self.chunk = normalize_grad, clamp, chunk
        self.legacy_scale_weight = legacy_scale_weight

    def steps_at(self, scale: float) -> int:
        """T_s, the number of maps at a scale: half as many at 0.5 if they are more than 10, 5 for 6 to 10."""
        if scale != HALF or self.steps < 6:
            return self.steps
        return self.steps // 2 if self.steps > 10 else 5

    def weight_at(self, scale: float, scales: Mapping[float, object]) -> float:
        """w_s, which each map of a scale counts with, among ``scales``."""
        if self.legacy_scale_weight:
            return 2.0 if HALF in scales and self.steps > 10 else 1.0
        return self.steps / self.steps_at(scale)

    def climb(self, pairs: Tensor, labels: Tensor, *, steps: int | None = None) -> Iterator[ClimbStep]:
        """Climb at one scale, step by step; stop whenever you like.

        Args:
            pairs: (B, 2, 3, H, W) floating point, images and their mirror images, normalised.
            labels: (B, K) multi-hot; each present class of each image is a climber, ordered by image, then class.
            steps: T; default: that of the module.

        Returns:
            T times a `ClimbStep`; none at all if no class is present.

        Raises:
            TypeError: ``pairs`` is not floating point.
            ValueError: a wrong shape, or ``steps`` less than 1; a model whose maps don't depend on the images, or are
                not of as many classes as ``labels``.
        """
        check_ndim("pairs", pairs, 5, "(B, 2, 3, H, W)")
        check_shape("pairs", pairs, (None, 2, None, None, None), "for an image and its mirror image")
        check_floating("pairs", pairs)
        check_shape("labels", labels, (len(pairs), None), "to match pairs")
        steps = self.steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        image, index = (labels > 0).nonzero(as_tuple=True)
        return self._climb(at_least_float32(pairs.detach())[image], index, labels.shape[1], steps, pairs.dtype)

    def accumulate(
        self,
        pairs: Mapping[float, Tensor],
        labels: Tensor,
        callback: Callable[[float, ClimbStep], bool | None] | None = None,
    ) -> dict[float, Tensor]:
        """The weighted sum of the maps at each scale, (M, h, w), from the smallest scale to the largest.

        See :meth:`forward` for the arguments.
        """
        total: dict[float, Tensor] = {}
        for scale in sorted(pairs):
            for step in self.climb(pairs[scale], labels, steps=self.steps_at(scale)):
                total[scale] = step.region if step.step == 0 else total[scale] + step.region
                if callback is not None and callback(scale, step):
                    break
            if scale in total:
                total[scale] = total[scale] * self.weight_at(scale, pairs)
        return total

    def forward(
        self,
        pairs: Mapping[float, Tensor],
        labels: Tensor,
        size: tuple[int, int],
        *,
        stride: int = 4,
        round_to: int = 16,
        callback: Callable[[float, ClimbStep], bool | None] | None = None,
    ) -> PresentCAM:
        """Maps of the present classes of a batch of images of one size.

        Args:
            pairs: For each scale (B, 2, 3, h_s, w_s), images and their mirror images, normalised.
            labels: (B, K) multi-hot.
            size: (H, W) of the images in pixels.
            stride: See `multi_scale_cam`.
            round_to: See `multi_scale_cam`.
            callback: Called with the scale and each `ClimbStep`, for a progress bar, say; if it returns something true
                that scale climbs no further.

        Returns:
            `PresentCAM`: maps in [0, 1), one for each present (image, class) pair.

        Raises:
            TypeError: pairs are not floating point.
            ValueError: no scale, or a wrong shape.
        """
        if not pairs:
            raise ValueError("pairs: expected at least one scale, got none")
        check_ndim("labels", labels, 2, "(B, K)")
        image, index = (labels > 0).nonzero(as_tuple=True)
        total = self.accumulate(pairs, labels, callback)
        if not total:  # no class: the size of a map is not known, and does not matter
            device = next(iter(pairs.values())).device
            total = {scale: torch.zeros(0, 1, 1, device=device) for scale in pairs}
        everyone = torch.ones(1, len(image), device=image.device)
        maps = [value[None] for value in total.values()]
        merged = multi_scale_cam(maps, everyone, size, stride=stride, round_to=round_to)
        return PresentCAM(merged.cam, merged.high_res, index + 1, image)

    def _climb(self, x: Tensor, index: Tensor, classes: int, steps: int, dtype: torch.dtype) -> Iterator[ClimbStep]:
        initial: Tensor | None = None
        clamp: Literal["scope", "channel", "none"] = "scope" if self.clamp == "pair" else self.clamp
        for step in range(steps if len(x) else 0):
            region, objective, gradient = self._look(x, index, classes, initial, dtype, moves=step + 1 < steps)
            initial = region if initial is None else initial
            yield ClimbStep(step, x, region, objective, gradient)
            if gradient is not None:
                x = anti_adversarial_step(
                    x, gradient, self.step_size, scope="image", clamp=clamp, normalize_grad=self.normalize_grad
                )

    def _look(
        self, x: Tensor, index: Tensor, classes: int, initial: Tensor | None, dtype: torch.dtype, *, moves: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Map and objective of each climber and, if it ``moves`` on, the gradient of its objective."""
        parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
        size = self.chunk or len(x)
        for first in range(0, len(x), size):
            mine = slice(first, first + size)
            with frozen(self.model), torch.set_grad_enabled(moves):
                leaf = x[mine].detach().requires_grad_(moves)
                scores, views = self._regions(leaf.to(dtype), index[mine], classes)
                region = merge_flip(views[:, 0], views[:, 1])
                clean = region if initial is None else initial[mine]
                objective = climb_terms(scores, region, clean, index[mine], self.threshold).objective(self.ad_coeff)
                if moves and not objective.requires_grad:
                    raise ValueError(
                        "model: expected maps with a gradient to the images; does it detach or use no_grad?"
                    )
                gradient = torch.autograd.grad(objective.sum(), leaf)[0] if moves else None
            parts.append((region.detach(), objective.detach(), gradient))
        regions, objectives, gradients = zip(*parts, strict=True)
        return torch.cat(regions), torch.cat(objectives), torch.cat(gradients) if moves else None

    def _regions(self, pairs: Tensor, index: Tensor, classes: int) -> ClassRegions:
        if isinstance(self.model, GradCAM):
            found: ClassRegions = self.model(pairs, index)
            check_shape("model(images)", found.scores, (*pairs.shape[:2], classes, None, None), "to match labels")
            return found
        out = self.model(pairs.flatten(0, 1))
        scores = out if isinstance(out, Tensor) else out.cam
        check_shape("model(images)", scores, (pairs.shape[:2].numel(), classes, None, None), "to match labels")
        scores = scores.unflatten(0, pairs.shape[:2])
        return ClassRegions(scores, linear_head_regions(scores, index, getattr(self.head, "weight", None)))

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"steps={self.steps}, step_size={self.step_size}, ad_coeff={self.ad_coeff}, threshold={self.threshold}, "
            f"normalize_grad={self.normalize_grad}, clamp={self.clamp!r}, "
            f"legacy_scale_weight={self.legacy_scale_weight}, chunk={self.chunk}"
        )
