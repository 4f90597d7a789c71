"""Bounding-box attribution maps: the smallest part of an image on which a detector still says the same (BBAM).

Axes: B images or objects, n objects, P proposals, C classes with the background first, h w cells of a mask, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules.attribution._objective import detection_change, total_variation
from wsss_modules.boxes.geometry import check_boxes

__all__ = [
    "AttributionStep",
    "BoundingBoxAttributionMap",
    "PerturbImage",
    "adaptive_mask_stride",
    "init_attribution_mask",
    "perturb_image",
]

Detector = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def perturb_image(image: Tensor, mask: Tensor, background: Tensor | None = None) -> Tensor:
    r"""Hide what a coarse mask does not keep.

    .. math:: I_M = I \cdot u + G \cdot (1 - u)

    with u the mask at the size of the image, bilinear with aligned corners, and G the background.

    Args:
        image: (3, H, W), or (B, 3, H, W), floating point, normalised. A single image serves a batch of masks.
        mask: (1, h, w), or (B, 1, h, w), in [0, 1]; 1 keeps a pixel.
        background: What hidden pixels show, of a shape that fits ``image``; None is 0, the mean colour of a normalised
            image.

    Returns:
        (3, H, W), or (B, 3, H, W), in the dtype of ``image``.

    Raises:
        TypeError: ``image`` or ``mask`` is not floating point.
        ValueError: a wrong shape.

    Paper:
        Lee, Yi, Shin and Yoon, BBAM: Bounding Box Attribution Map for Weakly Supervised Semantic and Instance
        Segmentation, CVPR 2021, arXiv:2103.08907, section 3.1.

    Notes:
        Linear in the mask. Compiles with ``fullgraph=True``.

    Example:
        >>> perturb_image(torch.ones(3, 1, 3), torch.tensor([[[1.0, 0.0]]]))[0]
        tensor([[1.0000, 0.5000, 0.0000]])
    """
    check_floating("image", image)
    check_floating("mask", mask)
    if image.ndim not in (3, 4) or image.shape[-3] != 3:
        raise ValueError(f"image: expected shape (3, H, W) or (B, 3, H, W), got {tuple(image.shape)}")
    if mask.ndim not in (3, 4) or mask.shape[-3] != 1:
        raise ValueError(f"mask: expected shape (1, h, w) or (B, 1, h, w), got {tuple(mask.shape)}")
    kept = mask if mask.ndim == 4 else mask[None]
    kept = F.interpolate(kept, image.shape[-2:], mode="bilinear", align_corners=True)
    kept = (kept if mask.ndim == 4 else kept[0]).to(image.dtype)
    return image * kept if background is None else image * kept + background * (1 - kept)


class PerturbImage(nn.Module):
    """Hide what a mask does not keep; see :func:`perturb_image`.

    Args:
        background: A tensor of what hidden pixels show, or "mean" for 0, the mean colour of a normalised image.

    Example:
        >>> PerturbImage()(torch.ones(3, 4, 4), torch.zeros(1, 2, 2)).any()
        tensor(False)
    """

    background: Tensor | None

    def __init__(self, background: str | Tensor = "mean") -> None:
        super().__init__()
        if isinstance(background, str) and background != "mean":
            raise ValueError(f'background: expected "mean" or a tensor, got {background!r}')
        self.register_buffer("background", None if isinstance(background, str) else background, persistent=False)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Image and mask -> image in which only what the mask keeps is to be seen."""
        return perturb_image(image, mask, self.background)


def adaptive_mask_stride(
    area: Tensor | float, size: tuple[int, int], *, smallest: float = 16.0, growth: float = 48.0
) -> Tensor:
    r"""Pixels a side of a mask's cells, which grow with the object: :math:`s = 16 + 48 \sqrt{A / (H W)}`.

    Args:
        area: Area of a box in pixels, any shape, at least 0.
        size: (H, W) of the image that the detector sees, in pixels; published constants are for a short side of 800.
        smallest: Stride of an object without area.
        growth: How much larger that of an object as large as the image is.

    Returns:
        float64 of the shape of ``area``, in [smallest, smallest + growth] for boxes inside the image.

    Raises:
        ValueError: an image without a pixel, or a stride that may be 0.

    Example:
        >>> adaptive_mask_stride(120_000.0, (600, 800))
        tensor(40., dtype=torch.float64)
    """
    if min(size) < 1:
        raise ValueError(f"size: expected at least one pixel, got {size}")
    if smallest <= 0 or growth < 0:
        raise ValueError(f"smallest, growth: expected above 0 and at least 0, got {smallest}, {growth}")
    share = torch.as_tensor(area).double() / (size[0] * size[1])
    return smallest + growth * share.clamp(min=0).sqrt()


def init_attribution_mask(
    boxes: Tensor,
    size: tuple[int, int],
    stride: Tensor | float,
    *,
    legacy_pixels: Tensor | None = None,
    wrap_negative: bool = False,
) -> Tensor:
    """The mask that the descent starts from: 1 on the cells of the boxes that the detector gave.

    Args:
        boxes: (P, 4) x1, y1, x2, y2 of the decoded boxes in pixels; corners are divided by the stride and cut to
            integers.
        size: (H, W) of the image in pixels.
        stride: Pixels a side of a cell, see `adaptive_mask_stride`.
        legacy_pixels: (P, 4) boxes whose pixel numbers the released demo also takes for cells.
        wrap_negative: Count corners left of or above the image from the other end, as the released code's slices do,
            in place of cutting them off.

    Returns:
        (1, h, w) float32 of zeros and ones, h = floor(H / stride), at least 1 a side.

    Raises:
        ValueError: a wrong shape or stride.

    Example:
        >>> init_attribution_mask(torch.tensor([[10.0, 0.0, 35.0, 22.0]]), (40, 40), 10.0).int()
        tensor([[[0, 1, 1, 0],
                 [0, 1, 1, 0],
                 [0, 0, 0, 0],
                 [0, 0, 0, 0]]], dtype=torch.int32)
    """
    check_shape("boxes", boxes, (None, 4), "of x1, y1, x2, y2")
    step = float(stride)
    if not step > 0:
        raise ValueError(f"stride: expected above 0, got {step:g}")
    mask = torch.zeros(1, *(max(1, int(side / step)) for side in size), device=boxes.device)
    cells = [[int(corner / step) for corner in box] for box in boxes.tolist()]
    cells += [] if legacy_pixels is None else [[int(corner) for corner in box] for box in legacy_pixels.tolist()]
    for x1, y1, x2, y2 in cells:
        if not wrap_negative:
            x1, y1, x2, y2 = (max(0, corner) for corner in (x1, y1, x2, y2))
        mask[0, y1:y2, x1:x2] = 1
    return mask


class AttributionStep(NamedTuple):
    """One step of the descent, as `BoundingBoxAttributionMap.iterate` yields it.

    Attributes:
        step: Number of steps taken, from 1.
        loss: (n,) objective of each object before the step.
        change: Largest change of any cell in the step.
        masks: n masks (1, h, w) after it; the optimiser goes on writing into them.
    """

    step: int
    loss: Tensor
    change: Tensor
    masks: tuple[Tensor, ...]


class BoundingBoxAttributionMap(nn.Module):
    r"""Find, for each object, the smallest part of the image on which the detector still says the same.

    .. math:: M^* = \mathrm{argmin}_{M \in [0, 1]} \ \lambda \sum |M| + \mu \, TV(M) + E(M)

    by Adam, with a clamp after every step; E is the mean change of the class probability and of the box deltas over the
    proposals of the object, see :func:`wsss_losses.box_attribution_loss`. All objects of a call are descended together:
    their terms are independent, so the sum of the objectives has the gradients of each, and one pass of the detector
    serves them all.

    Does the "argmin" of the paper limit the size of the mask? Not by itself; the area term does. The minimiser M*
    costs at most what hiding everything costs, E0: :math:`\lambda \sum M^* + E(M^*) \le E_0`, hence :math:`\sum M^*
    \le E_0 / \lambda` cells. A detection that loses .95 of its probability and moves its deltas by .5 on average
    has :math:`E_0 = .475 + .25 = .725`: at most 103 cells at lambda = .007, and 10 at .07. Cell by cell, one stays
    if hiding it costs more than lambda. With lambda = 0 nothing would ever have to go.

    The cost is for a cell, not for a pixel, and cells grow with the object. On an image of 800 x 1066 all cells of
    a box of 1, 25 or 100 % of it cost .14, .93 or 1.46 at lambda = .007: a small object can afford its whole box, a
    large one must shrink until it costs less than E0. Adam moves a cell by about the learning rate in each step
    whatever lambda is, so lambda decides where cells stop, not how fast: from 1 to 0 takes about 50 steps.

    Args:
        detector_fn: From images (n, 3, H, W) and proposals (P, 5) (image index, x1, y1, x2, y2 in pixels) to logits
            (P, C), the background being class 0, and deltas (P, 4 C), four a class. Any two-stage detector whose second
            stage takes given proposals.
        steps: Number of steps.
        lr: Learning rate of Adam, which is about how far a cell moves in a step.
        area: lambda; .007 for training images, .07 for the released demo.
        tv: mu; 1e-4, and 1e-3 in the demo. The paper has no such term: 0 leaves it out.
        tv_beta: Exponent of the differences in TV.
        classification_weight: Weight of the change of the probability.
        box_weight: Weight of the mean change of the four deltas.
        background: What hidden pixels show; see `perturb_image`.
        tolerance: Stop when no cell of any object changes by this much in a step; 0 takes all steps.

    Raises:
        ValueError: an option is out of range.

    Paper:
        Lee, Yi, Shin and Yoon, BBAM: Bounding Box Attribution Map for Weakly Supervised Semantic and Instance
        Segmentation, CVPR 2021, arXiv:2103.08907.

    Differences:
        As released, the last mask is the result, not the best, and the loss is from before the step.

    Notes:
        Only the gradient of the masks is computed: weights are neither changed nor given gradients, whether they are
        frozen or not. The detector runs in the mode that it is in; put it into eval mode. The clean detections are
        computed once. Memory is that of n images; give objects in parts where it does not fit. No graph of
        ``torch.compile`` spans a step, but ``detector_fn`` may be compiled.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> weight = torch.randn(3, 48), torch.randn(12, 48)
        >>> def detector_fn(images, proposals):
        ...     v = F.adaptive_avg_pool2d(images, 4).flatten(1)[proposals[:, 0].long()]
        ...     return v @ weight[0].T, v @ weight[1].T
        >>> explain = BoundingBoxAttributionMap(detector_fn, steps=5)
        >>> proposals = torch.tensor([[0.0, 0, 0, 8, 8], [1.0, 4, 4, 9, 9]])
        >>> masks = explain(torch.rand(3, 16, 16), proposals, torch.tensor([1, 2]), [torch.ones(1, 4, 4)] * 2)
        >>> [tuple(mask.shape) for mask in masks]
        [(1, 4, 4), (1, 4, 4)]
    """

    def __init__(
        self,
        detector_fn: Detector,
        *,
        steps: int = 300,
        lr: float = 0.02,
        area: float = 0.007,
        tv: float = 1e-4,
        tv_beta: float = 3.0,
        classification_weight: float = 0.5,
        box_weight: float = 0.5,
        background: str | Tensor = "mean",
        tolerance: float = 0.0,
    ) -> None:
        super().__init__()
        if tv_beta <= 0:
            raise ValueError(f"tv_beta: expected above 0, got {tv_beta}")
        options = {"steps": steps, "lr": lr, "area": area, "tv": tv, "tolerance": tolerance}
        weights = {"classification_weight": classification_weight, "box_weight": box_weight}
        for name, value in (options | weights).items():
            if value < 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")
        self.detector_fn = detector_fn
        self.perturb = PerturbImage(background)
        self.steps, self.lr, self.area, self.tv, self.tv_beta = steps, lr, area, tv, tv_beta
        self.classification_weight, self.box_weight, self.tolerance = classification_weight, box_weight, tolerance

    def forward(
        self,
        image: Tensor,
        proposals: Tensor,
        classes: Tensor,
        masks: Sequence[Tensor],
        callback: Callable[[AttributionStep], object] | None = None,
    ) -> list[Tensor]:
        """Explain n objects.

        Args:
            image: (3, H, W), one for all objects, or (n, 3, H, W), one for each; floating point, normalised.
            proposals: (P, 5) index of the object, x1, y1, x2, y2 in pixels. An object without any only loses area.
            classes: (n,) integers 1..C-1.
            masks: n starting masks (1, h, w), of any sizes; see `init_attribution_mask`.
            callback: Called with each `AttributionStep`, for progress; True stops.

        Returns:
            n masks (1, h, w) in [0, 1], detached, in the dtype of ``image``, at least float32.

        Raises:
            TypeError: ``image`` is not floating point, ``classes`` not of integers.
            ValueError: shapes don't match, or a class that the detector does not have.
        """
        last: Sequence[Tensor] = masks
        for state in self.iterate(image, proposals, classes, masks):
            last = state.masks
            if callback is not None and callback(state) is True:
                break
        return [mask.detach().clone() for mask in last]

    def iterate(
        self, image: Tensor, proposals: Tensor, classes: Tensor, masks: Sequence[Tensor]
    ) -> Iterator[AttributionStep]:
        """The descent as a generator, with the arguments of `forward`; stop it whenever you like."""
        check_floating("image", image)
        check_integer("classes", classes)
        check_ndim("classes", classes, 1, "(n,)")
        if len(masks) != len(classes):
            raise ValueError(f"masks: expected {len(classes)}, one for each of classes, got {len(masks)}")
        for mask in masks:
            check_shape("masks", mask, (1, None, None), "of one object")
        check_boxes(proposals, len(classes))
        if len(masks) == 0:
            return
        images = image if image.ndim == 4 else image[None]
        check_shape("image", images, (len(masks) if image.ndim == 4 else 1, 3, None, None), "for the objects")
        owner = proposals[:, 0].long()
        of_proposal = classes[owner]
        clean = self._clean(images, proposals, owner, len(masks))
        check_shape("detector_fn", clean[0], (len(proposals), None), "as logits of the proposals")
        check_shape(
            "detector_fn", clean[1], (len(proposals), 4 * clean[0].shape[1]), "as deltas of the logits' classes"
        )
        if not (classes.min() >= 0 and classes.max() < clean[0].shape[1]):
            raise ValueError(f"classes: expected 0..{clean[0].shape[1] - 1}, got {classes.tolist()}")
        dtype = torch.promote_types(images.dtype, torch.float32)  # steps of Adam are lost in half precision
        leaves = [mask.detach().to(images.device, dtype).clone().requires_grad_() for mask in masks]
        optimizer = torch.optim.Adam(leaves, lr=self.lr)
        for step in range(1, self.steps + 1):
            with torch.enable_grad():
                loss = self._objective(images, leaves, proposals, clean, of_proposal, owner)
                gradients = torch.autograd.grad(loss.sum(), leaves)
            with torch.no_grad():
                before = [leaf.clone() for leaf in leaves]
                for leaf, gradient in zip(leaves, gradients, strict=True):
                    leaf.grad = gradient
                optimizer.step()
                for leaf in leaves:
                    leaf.clamp_(0, 1)
                change = torch.stack([(a - b).abs().max() for a, b in zip(before, leaves, strict=True)]).max()
            yield AttributionStep(step, loss.detach(), change, tuple(leaf.detach() for leaf in leaves))
            if self.tolerance > 0 and bool(change < self.tolerance):
                return

    @torch.no_grad()
    def _clean(self, images: Tensor, proposals: Tensor, owner: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Logits and deltas without a mask; an image that all objects share is seen once."""
        if len(images) == count:
            return self.detector_fn(images, proposals)
        return self.detector_fn(images, torch.cat([torch.zeros_like(proposals[:, :1]), proposals[:, 1:]], 1))

    def _objective(
        self,
        images: Tensor,
        masks: Sequence[Tensor],
        proposals: Tensor,
        clean: tuple[Tensor, Tensor],
        classes: Tensor,
        owner: Tensor,
    ) -> Tensor:
        """(n,) objective of each object."""
        size = (images.shape[2], images.shape[3])
        full = [F.interpolate(mask[None], size, mode="bilinear", align_corners=True) for mask in masks]
        hidden = self.perturb(images, torch.cat(full))
        change = detection_change(
            *self.detector_fn(hidden, proposals),
            *clean,
            classes,
            owner,
            len(masks),
            self.classification_weight,
            self.box_weight,
        )
        sizes = torch.stack([mask.abs().sum() for mask in masks])
        cost = self.area * sizes + change
        if self.tv > 0:
            cost = cost + self.tv * torch.stack([total_variation(m, self.tv_beta, True, "sum") for m in masks])
        return cost

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"steps={self.steps}, lr={self.lr}, area={self.area}, tv={self.tv}, tv_beta={self.tv_beta}, "
            f"classification_weight={self.classification_weight}, box_weight={self.box_weight}, "
            f"tolerance={self.tolerance}"
        )
