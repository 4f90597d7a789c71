"""Prototypes of one image's classes and background, found in the image itself (SIPE).

Axes: B images, K foreground classes, C = 1 + K channels with the background first, D feature channels, S channels of
the feature that prototypes are taken from, H W cells, N = H*W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32
from wsss_modules.prototypes.structure import normalize_cam_with_background, structure_aware_seeds

__all__ = [
    "Exploration",
    "HierarchicalFeatureHead",
    "ImageSpecificPrototypeExploration",
    "explore_prototypes",
    "image_specific_prototypes",
    "prototype_cam",
]

_PAPER = (256, 512, 1024, 2048), (128, 128, 256, 256)


def image_specific_prototypes(seeds: Tensor, features: Tensor, *, average: Literal["map", "seeds"] = "map") -> Tensor:
    r"""Mean feature of the seeds of each class of each image.

    .. math:: p_{bc} = \frac{1}{HW} \sum_i s_{bci} x_{bi}

    or, with ``average="seeds"``, divided by :math:`\max(\sum_i s_{bci}, 1)`.

    Args:
        seeds: (B, C, h, w) floating point, 0 or 1, see `structure_aware_seeds`; resized (nearest) to the features'
            grid where that is another.
        features: (B, S, H, W) floating point.
        average: "map" divides by the size of the map, as released; "seeds" by the number of seeds. The direction, all
            that `prototype_cam` reads, is the same; "seeds" keeps small classes in the range of float16.

    Returns:
        (B, C, S) in the dtype of ``features``; zeros for a class without a seed.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: a wrong shape or an unknown ``average``.

    Paper:
        Chen et al., CVPR 2022, arXiv:2203.02909.

    Notes:
        One matrix product over the cells, where the released code holds a (B, C, S, H, W) tensor. Half precision is
        summed in float32. Gradients flow to both. Compiles with ``fullgraph=True``.

    Example:
        >>> seeds = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 0.0]]]])
        >>> features = torch.tensor([[[[2.0, 4.0, 8.0, 9.0]]]])
        >>> image_specific_prototypes(seeds, features), image_specific_prototypes(seeds, features, average="seeds")
        (tensor([[[1.5000],
                 [2.0000]]]), tensor([[[3.],
                 [8.]]]))
    """
    check_ndim("features", features, 4, "(B, S, H, W)")
    check_floating("features", features)
    check_shape("seeds", seeds, (len(features), None, None, None), "to match features")
    check_floating("seeds", seeds)
    if average not in ("map", "seeds"):
        raise ValueError(f'average: expected "map" or "seeds", got {average!r}')
    if seeds.shape[2:] != features.shape[2:]:
        seeds = F.interpolate(seeds, features.shape[2:], mode="nearest")
    dtype = torch.promote_types(torch.promote_types(features.dtype, seeds.dtype), torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        marks, x = seeds.to(dtype).flatten(2), features.to(dtype).flatten(2)
        size = max(1, x.shape[2]) if average == "map" else marks.sum(2, keepdim=True).clamp(min=1)
        return (marks @ x.mT / size).to(features.dtype)


def prototype_cam(prototypes: Tensor, features: Tensor, *, eps: float = 1e-8) -> Tensor:
    r"""Rectified cosine of every cell's feature with every prototype of its image (IS-CAM).

    .. math::
        m_{bci} = \mathrm{relu}\left(
        \frac{p_{bc} \cdot x_{bi}}{\max(\|p_{bc}\|, \epsilon) \max(\|x_{bi}\|, \epsilon)} \right)

    Args:
        prototypes: (B, C, S) floating point, see `image_specific_prototypes`.
        features: (B, S, H, W) floating point.
        eps: Least length.

    Returns:
        (B, C, H, W) in [0, 1], in the dtype of ``features``; 0 for a prototype or feature of zeros, without gradient.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: a wrong shape.

    Paper:
        Chen et al., CVPR 2022, arXiv:2203.02909.

    Notes:
        One matrix product, where the released code holds (B, C, S, H, W) tensors. Gradients flow to both, so that a
        feature takes part as a cell and through its prototype. Half precision is computed in float32. Compiles with
        ``fullgraph=True``.

    Example:
        >>> features = torch.tensor([[[[3.0, 0.0, -1.0]], [[0.0, 2.0, 1.0]]]])
        >>> prototype_cam(torch.tensor([[[1.0, 0.0], [0.0, 5.0]]]), features)[0, :, 0]
        tensor([[1.0000, 0.0000, 0.0000],
                [0.0000, 1.0000, 0.7071]])
    """
    check_ndim("features", features, 4, "(B, S, H, W)")
    check_floating("features", features)
    check_shape("prototypes", prototypes, (len(features), None, features.shape[1]), "to match features")
    check_floating("prototypes", prototypes)
    dtype = torch.promote_types(torch.promote_types(features.dtype, prototypes.dtype), torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        p, x = prototypes.to(dtype), features.to(dtype).flatten(2)  # (B, C, S), (B, S, N)
        p = p / p.norm(dim=2, keepdim=True).clamp(min=eps)
        cosine = p @ x / x.norm(dim=1, keepdim=True).clamp(min=eps)
        maps = F.relu(cosine).clamp(max=1)  # rounding may step over 1
    return maps.unflatten(2, features.shape[2:]).to(features.dtype)


class Exploration(NamedTuple):
    """What `explore_prototypes` returns; the background is channel 0 throughout.

    Attributes:
        scores: (B, 1+K, H, W) normalised class maps with background: the ordinary CAM, with its gradient.
        is_cam: (B, 1+K, H, W) image-specific CAM in [0, 1], not divided by its maximum.
        seeds: (B, 1+K, H, W) of `structure_aware_seeds`, without gradient.
        probs: (B, 1+K, H, W) of `structure_aware_seeds`, without gradient.
        prototypes: (B, 1+K, S).
        valid: (B, 1+K, H, W) where each class may be: labels times the inside of the crop.
    """

    scores: Tensor
    is_cam: Tensor
    seeds: Tensor
    probs: Tensor
    prototypes: Tensor
    valid: Tensor


def explore_prototypes(
    class_maps: Tensor,
    features: Tensor,
    labels: Tensor,
    seed_features: Tensor | None = None,
    *,
    inside: Tensor | None = None,
    mask_scores: bool = True,
    bg_weight: float = 0.5,
    bg_from: Literal["all", "present"] = "all",
    eps: float = 1e-5,
) -> Exploration:
    """Find seeds of every class in the image itself, take their mean features, and compare all cells with these.

    `normalize_cam_with_background`, `structure_aware_seeds`, `image_specific_prototypes` and `prototype_cam`, one after
    the other.

    Args:
        class_maps: (B, K, h, w) floating point, signed scores of each class at each cell, as a classifier gives them
            before its pooling (`CAMHead.class_maps`).
        features: (B, S, H, W) floating point, what prototypes are taken from (`HierarchicalFeatureHead`). Other maps
            are resized to this grid.
        labels: (B, K) multi-hot.
        seed_features: (B, D, h', w') floating point, what seeds are found by; default: ``features``. Released: the last
            feature map of the backbone in training, ``features`` at test time.
        inside: (B, 1, ., .) bool or numbers at any size, 0 in the padding of the crops; default: all inside.
        mask_scores: Set the scores to 0 where ``valid`` is 0, as in training. At test time the released code does not,
            so that a cell that an absent class wins is no seed.
        bg_weight: See `structure_aware_seeds`.
        bg_from: See `normalize_cam_with_background`.
        eps: Added to maxima and lengths.

    Returns:
        `Exploration`. The gradient of ``scores`` reaches ``class_maps``; that of ``is_cam`` reaches ``features``.

    Raises:
        TypeError: a tensor of maps or features is not floating point.
        ValueError: a wrong shape or option.

    Paper:
        Chen, Yang, Lai and Xie, Self-supervised Image-specific Prototype Exploration for Weakly Supervised Semantic
        Segmentation, CVPR 2022, arXiv:2203.02909.

    Differences:
        See the four steps. The released code has 21 channels built into its mask.

    Notes:
        Half precision is computed in float32. Grids need not be square. Compiles with ``fullgraph=True``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> labels = torch.tensor([[1, 0, 1]])
        >>> found = explore_prototypes(torch.randn(1, 3, 6, 9), torch.randn(1, 8, 6, 9), labels)
        >>> found.is_cam.shape, found.seeds.sum(1).max().item(), found.seeds[:, 2].any().item()
        (torch.Size([1, 4, 6, 9]), 1.0, False)
    """
    check_ndim("features", features, 4, "(B, S, H, W)")
    check_shape("class_maps", class_maps, (len(features), None, None, None), "to match features")
    check_shape("labels", labels, class_maps.shape[:2], "to match class_maps")
    size = features.shape[2:]
    present = F.pad((labels > 0).to(at_least_float32(features).dtype), (1, 0), value=1.0)  # the background always
    valid = present[:, :, None, None].expand(-1, -1, *size)
    if inside is not None:
        check_shape("inside", inside, (len(features), 1, None, None), "to match features")
        valid = valid * F.interpolate((inside > 0).to(valid.dtype), size, mode="nearest")
    scores = _resize(normalize_cam_with_background(class_maps, labels, bg_from=bg_from, eps=eps), size, True)
    if mask_scores:
        scores = scores * valid.to(scores.dtype)
    by = features if seed_features is None else seed_features
    seeds, probs = structure_aware_seeds(scores, valid, _resize(by, size, False), bg_weight=bg_weight, eps=eps)
    prototypes = image_specific_prototypes(seeds, at_least_float32(features))
    is_cam = prototype_cam(prototypes, features)
    return Exploration(scores, is_cam, seeds, probs, prototypes.to(features.dtype), valid.to(scores.dtype))


class HierarchicalFeatureHead(nn.Module):
    r"""Project the maps of several stages, make every cell of each a unit vector, and join them on one grid.

    .. math:: x = \mathrm{concat}_i\ \mathrm{resize}\left( \frac{w_i f_i}{\|w_i f_i\|_2 + \epsilon} \right)

    Vectors are normalised before the resize and not after it.

    Args:
        in_channels: Channels of the stages, fine to coarse.
        out_channels: Channels that each is projected to (1 x 1, without bias).
        grid: Index of the stage whose grid the maps are resized to (bilinear, ``align_corners=False``).
        detach: Train the projections only, as published, so that no gradient reaches the backbone from here.
        eps: Added to the lengths.

    Shapes:
        one (B, in_channels[i], H_i, W_i) map a stage -> (B, sum of out_channels, H, W).

    Raises:
        ValueError: numbers of channels that don't match, a ``grid`` that is no stage, or maps of other channels.

    Paper:
        Chen et al., CVPR 2022, arXiv:2203.02909.

    Notes:
        Weights start from torch's default. Lengths are taken in float32 at least. Compiles with ``fullgraph=True``.

    Example:
        >>> head = HierarchicalFeatureHead((16, 24, 40), (4, 4, 8), grid=1)
        >>> head([torch.rand(2, 16, 20, 24), torch.rand(2, 24, 10, 12), torch.rand(2, 40, 5, 6)]).shape
        torch.Size([2, 16, 10, 12])
    """

    def __init__(
        self,
        in_channels: Sequence[int] = _PAPER[0],
        out_channels: Sequence[int] = _PAPER[1],
        *,
        grid: int = -2,
        detach: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if len(in_channels) != len(out_channels):
            raise ValueError(f"out_channels: expected {len(in_channels)}, one a stage, got {len(out_channels)}")
        if not -len(in_channels) <= grid < len(in_channels):
            raise ValueError(f"grid: expected the index of one of the {len(in_channels)} stages, got {grid}")
        self.grid, self.detach, self.eps = grid, detach, eps
        self.in_channels, self.out_channels = tuple(in_channels), sum(out_channels)
        pairs = zip(in_channels, out_channels, strict=True)
        self.sides = nn.ModuleList(nn.Conv2d(channels, width, 1, bias=False) for channels, width in pairs)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Join the maps of all stages, see the class."""
        if len(levels) != len(self.sides):
            raise ValueError(f"levels: expected {len(self.sides)} maps, got {len(levels)}")
        for i, (level, channels) in enumerate(zip(levels, self.in_channels, strict=True)):
            check_shape(f"levels[{i}]", level, (None, channels, None, None), "for this head")
        size = levels[self.grid].shape[2:]
        joined = []
        for level, side in zip(levels, self.sides, strict=True):
            projected = at_least_float32(side(level.detach() if self.detach else level))
            unit = projected / (projected.norm(dim=1, keepdim=True) + self.eps)
            joined.append(_resize(unit, size, False).to(level.dtype))
        return torch.cat(joined, 1)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"grid={self.grid}, detach={self.detach}, eps={self.eps}"


class ImageSpecificPrototypeExploration(nn.Module):
    """What SIPE adds to a classifier: the feature that joins all stages, and the CAM of prototypes found in the image.

    Options are those of :func:`explore_prototypes`, which does the work.

    Args:
        in_channels: Channels of the stages of the backbone, fine to coarse.
        out_channels: Channels that each is projected to.
        grid: Index of the stage whose grid all maps take.
        seed_feature: What seeds are found by in ``forward``: the last stage ("semantic", as released in training), or
            the joined feature ("hierarchical", as released at test time).
        bg_weight: Weight of the background's overlap.
        bg_from: Which classes the background makes way for: "all" or "present".
        eps: Added to maxima and lengths.

    Raises:
        ValueError: an unknown option, or numbers that don't match, see `HierarchicalFeatureHead`.

    Paper:
        Chen, Yang, Lai and Xie, Self-supervised Image-specific Prototype Exploration for Weakly Supervised Semantic
        Segmentation, CVPR 2022, arXiv:2203.02909.

    Differences:
        The released code finds seeds by the last stage in training and by the joined feature at test time; ``forward``
        and ``read`` do the same by default.

    Notes:
        Only the projections are trained from the image-specific CAM; the classifier and the stages it trains are
        reached through the scores it is compared with, see `wsss_losses.general_specific_consistency_loss`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> explore = ImageSpecificPrototypeExploration((8, 16), (4, 4))
        >>> levels = [torch.rand(2, 8, 12, 10), torch.rand(2, 16, 6, 5)]
        >>> found = explore(torch.randn(2, 3, 6, 5), levels, torch.tensor([[1, 0, 1], [0, 1, 0]]))
        >>> found.scores.shape, found.is_cam.shape
        (torch.Size([2, 4, 12, 10]), torch.Size([2, 4, 12, 10]))
    """

    def __init__(
        self,
        in_channels: Sequence[int] = _PAPER[0],
        out_channels: Sequence[int] = _PAPER[1],
        *,
        grid: int = -2,
        seed_feature: Literal["semantic", "hierarchical"] = "semantic",
        bg_weight: float = 0.5,
        bg_from: Literal["all", "present"] = "all",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if seed_feature not in ("semantic", "hierarchical"):
            raise ValueError(f'seed_feature: expected "semantic" or "hierarchical", got {seed_feature!r}')
        if bg_from not in ("all", "present"):
            raise ValueError(f'bg_from: expected "all" or "present", got {bg_from!r}')
        if bg_weight < 0:
            raise ValueError(f"bg_weight: expected at least 0, got {bg_weight}")
        self.seed_feature, self.bg_weight, self.eps = seed_feature, bg_weight, eps
        self.bg_from: Literal["all", "present"] = bg_from
        self.hierarchy = HierarchicalFeatureHead(in_channels, out_channels, grid=grid, eps=eps)

    def forward(
        self, class_maps: Tensor, levels: Sequence[Tensor], labels: Tensor, inside: Tensor | None = None
    ) -> Exploration:
        """Explore crops in training.

        Args:
            class_maps: (B, K, h, w) signed class scores of each cell.
            levels: The maps of the stages.
            labels: (B, K) multi-hot.
            inside: (B, 1, ., .) 0 in the padding of the crops.

        Returns:
            `Exploration`, with scores masked by the labels.
        """
        return explore_prototypes(
            class_maps,
            self.hierarchy(levels),
            labels,
            levels[-1] if self.seed_feature == "semantic" else None,
            inside=inside,
            bg_weight=self.bg_weight,
            bg_from=self.bg_from,
            eps=self.eps,
        )

    def read(self, class_maps: Tensor, features: Tensor, labels: Tensor) -> Exploration:
        """Explore images at test time, scores unmasked and seeds by the joined feature.

        Args:
            class_maps: (B, K, h, w) signed class scores, e.g. of an image and of its mirror image by `merge_flip`.
            features: (B, S, H, W) of ``hierarchy``, merged likewise.
            labels: (B, K) multi-hot.

        Returns:
            `Exploration`; its ``is_cam`` is what the masks come from, by argmax with the background at index 0.
        """
        return explore_prototypes(
            class_maps,
            features,
            labels,
            mask_scores=False,
            bg_weight=self.bg_weight,
            bg_from=self.bg_from,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"seed_feature={self.seed_feature!r}, bg_weight={self.bg_weight}, bg_from={self.bg_from!r}"


def _resize(maps: Tensor, size: torch.Size, align_corners: bool) -> Tensor:
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=align_corners)
