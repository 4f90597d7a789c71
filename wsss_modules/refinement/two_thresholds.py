"""Labels that a strong and a weak background agree on, with pixel-adaptive refinement (AFA).

Axes: B images, K foreground classes, M present classes (the most of any image), H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules._precision import at_least_float32
from wsss_modules._regions import check_regions, inside_regions
from wsss_modules.online_labels import present_softmax
from wsss_modules.refinement.pixel_adaptive import PixelAdaptiveRefinement


def fuse_thresholds(strict: Tensor, lenient: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Join the mask of a strong background with that of a weak one: unsure where only the strong one says background.

    Args:
        strict: (B, H, W) integers, the mask under the high background score: 0 background, 1..K.
        lenient: (B, H, W) integers, the mask under the low background score.
        ignore_index: label of unsure pixels.

    Returns:
        mask (B, H, W) int64: the class of ``strict``; 0 where both are background; else ``ignore_index``.

    Raises:
        TypeError: a mask is not an integer tensor.
        ValueError: shapes differ.

    Paper:
        Ru et al., "Learning Affinity from Attention: End-to-End Weakly-Supervised Semantic Segmentation with
        Transformers", CVPR 2022, arXiv:2203.02664, section 3.4.

    Example:
        >>> import torch
        >>> from wsss_modules import fuse_thresholds
        >>> fuse_thresholds(torch.tensor([[[1, 0, 0]]]), torch.tensor([[[1, 1, 0]]]))
        tensor([[[  1, 255,   0]]])
    """
    check_ndim("strict", strict, 3, "(B, H, W)")
    check_shape("lenient", lenient, strict.shape, "to match strict")
    for name, mask in (("strict", strict), ("lenient", lenient)):
        check_integer(name, mask, "did you pass scores?")
    both = (strict == 0) & (lenient == 0)
    return torch.where(strict > 0, strict, torch.where(both, 0, ignore_index)).long()


def refine_cam_with_background(
    image: Tensor,
    cam: Tensor,
    labels: Tensor,
    refine: PixelAdaptiveRefinement,
    *,
    low: float = 0.35,
    high: float = 0.55,
    regions: Tensor | None = None,
    down_scale: int = 2,
    ignore_index: int = 255,
) -> Tensor:
    """AFA's pseudo labels from CAMs: refined by PAR under a low and a high background score, and fused.

    For each of the two: a constant background score joins the maps, a softmax over background and present classes makes
    them compete, PAR runs at ``1 / down_scale`` of the size, and the argmax is taken at full size.

    Args:
        image: (B, 3, H, W) floating point in [0, 1], see :func:`denormalize_images`.
        cam: (B, K, H, W) floating point, usually in [0, 1].
        labels: (B, K) multi-hot; absent classes can't win.
        refine: PAR with its options.
        low: background score above which a class is possible.
        high: background score above which a class is certain.
        regions: (B, 4) int64, the part of each image that is not padding, ``x1, y1, x2, y2`` in pixels, half-open; all
            of it by default. It may reach beyond the image.
        down_scale: factor by which images and maps shrink for PAR.
        ignore_index: label of unsure pixels and of those outside the region.

    Returns:
        mask (B, H, W) int64: 0 background, 1..K classes, or ``ignore_index``.

    Raises:
        TypeError: ``image`` or ``cam`` is not floating point.
        ValueError: shapes don't match, or ``low`` above ``high``.

    Paper:
        Ru et al., CVPR 2022, arXiv:2203.02664, section 3.4.

    Notes:
        The released code runs PAR twice for each image. Its weights depend on the image alone: here both scores of all
        images are refined at once, and only maps of present classes. Takes no gradient. The number of maps depends on
        the labels, which breaks the graph of ``torch.compile``.

    Example:
        >>> import torch
        >>> from wsss_modules import PixelAdaptiveRefinement, refine_cam_with_background
        >>> _ = torch.manual_seed(0)
        >>> image, cam = torch.rand(1, 3, 8, 8), torch.zeros(1, 2, 8, 8)
        >>> cam[:, 1, :, 4:] = 0.9
        >>> refine_cam_with_background(image, cam, torch.tensor([[0, 1]]), PixelAdaptiveRefinement((1,), 2))[0, 0]
        tensor([  0,   0,   0,   0, 255,   2,   2,   2])
    """
    _check(image, cam, labels, regions)
    if low > high:
        raise ValueError(f"low: expected at most high = {high}, got {low}")
    with torch.no_grad():
        small_image, small = _shrink(at_least_float32(image), down_scale), _shrink(at_least_float32(cam), down_scale)
        packed, keys = _pack(small, labels)
        both = [present_softmax(packed, keys > 0, background) for background in (low, high)]
        refined = refine(small_image, torch.cat(both, 1))
        full = F.interpolate(refined, image.shape[-2:], mode="bilinear", align_corners=False)
        lenient, strict = (_to_classes(scores, keys) for scores in full.chunk(2, dim=1))
        return _keep(fuse_thresholds(strict, lenient, ignore_index=ignore_index), regions, ignore_index)


def refine_scores(
    image: Tensor,
    scores: Tensor,
    labels: Tensor,
    refine: PixelAdaptiveRefinement,
    *,
    regions: Tensor | None = None,
    down_scale: int = 2,
) -> Tensor:
    """Refine background and class scores inside each image's region by PAR, at a fraction of the size.

    Args:
        image: (B, 3, H, W) floating point in [0, 1].
        scores: (B, 1 + K, H, W) floating point, background first.
        labels: (B, K) multi-hot; absent classes become 0.
        refine: PAR with its options.
        regions: (B, 4) int64 ``x1, y1, x2, y2``, the part of each image that is not padding; all by default. Images are
            cut to it first, so that no padding takes part.
        down_scale: factor by which images and scores shrink for PAR.

    Returns:
        (B, 1 + K, H, W) in the dtype of ``scores``; 0 outside the region.

    Raises:
        TypeError: ``image`` or ``scores`` is not floating point.
        ValueError: shapes don't match.

    Paper:
        Ru et al., CVPR 2022, arXiv:2203.02664, section 3.4.

    Notes:
        Images with the same region are refined together. Takes no gradient.

    Example:
        >>> import torch
        >>> from wsss_modules import PixelAdaptiveRefinement, refine_scores
        >>> scores, region = torch.rand(1, 3, 8, 8), torch.tensor([[0, 0, 8, 6]])
        >>> refine = PixelAdaptiveRefinement((1, 2), 3)
        >>> out = refine_scores(torch.rand(1, 3, 8, 8), scores, torch.tensor([[1, 0]]), refine, regions=region)
        >>> out.shape, bool(out[:, 2].any()), bool(out[:, :, 6:].any())
        (torch.Size([1, 3, 8, 8]), False, False)
    """
    check_ndim("scores", scores, 4, "(B, 1+K, H, W)")
    _check(image, scores[:, 1:], labels, regions)
    with torch.no_grad():
        maps, keys = _pack_scores(scores, labels)
        refined = _refine_regions(image, maps, refine, regions, down_scale)
        places = F.pad(keys, (1, 0))[:, :, None, None].expand_as(refined)
        # unused maps are 0 and share place 0 with the background
        full = refined.new_zeros(scores.shape).scatter_add(1, places, refined)
        return full.to(scores.dtype)


def refine_walked_scores(
    image: Tensor,
    low: Tensor,
    high: Tensor,
    labels: Tensor,
    refine: PixelAdaptiveRefinement,
    *,
    regions: Tensor | None = None,
    down_scale: int = 2,
    ignore_index: int = 255,
) -> Tensor:
    """AFA's final pseudo labels: scores that walked under a low and a high background, refined by PAR and fused.

    Args:
        image: (B, 3, H, W) floating point in [0, 1].
        low: (B, 1 + K, h, w) floating point, scores under the low background, see :func:`affinity_random_walk`;
            brought to (H, W) first, bilinear.
        high: (B, 1 + K, h, w) floating point, those under the high background.
        labels: (B, K) multi-hot; absent classes can't win.
        refine: PAR with its options.
        regions: (B, 4) int64 ``x1, y1, x2, y2``, the part of each image that is not padding.
        down_scale: factor by which images and scores shrink for PAR.
        ignore_index: label of unsure pixels and of those outside the region.

    Returns:
        mask (B, H, W) int64: 0 background, 1..K classes, or ``ignore_index``.

    Raises:
        TypeError: ``image``, ``low`` or ``high`` is not floating point.
        ValueError: shapes don't match.

    Paper:
        Ru et al., CVPR 2022, arXiv:2203.02664, sections 3.3 and 3.4.

    Example:
        >>> import torch
        >>> from wsss_modules import PixelAdaptiveRefinement, refine_walked_scores
        >>> low, high = torch.tensor([0.3, 0.7]).view(1, 2, 1, 1), torch.tensor([0.6, 0.4]).view(1, 2, 1, 1)
        >>> refine = PixelAdaptiveRefinement((1,), 2)
        >>> refine_walked_scores(torch.rand(1, 3, 2, 2), low, high, torch.tensor([[1]]), refine)
        tensor([[[255, 255],
                 [255, 255]]])
    """
    check_shape("high", high, low.shape, "to match low")
    check_ndim("low", low, 4, "(B, 1+K, h, w)")
    check_floating("low", low)
    check_shape("labels", labels, (len(low), low.shape[1] - 1), "to match low")
    check_shape("image", image, (len(low), 3, None, None), "to match low")
    with torch.no_grad():
        (lenient, keys), (strict, _) = (_pack_scores(scores, labels) for scores in (low, high))
        both = F.interpolate(torch.cat([lenient, strict], 1), image.shape[-2:], mode="bilinear", align_corners=False)
        refined = _refine_regions(image, both, refine, regions, down_scale)
        weak, strong = (_to_classes(scores, keys) for scores in refined.chunk(2, dim=1))
        return _keep(fuse_thresholds(strong, weak, ignore_index=ignore_index), regions, ignore_index)


def _pack_scores(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Background and present classes, (B, 1 + M, H, W), unused maps 0; and the classes, (B, M)."""
    packed, keys = _pack(at_least_float32(scores[:, 1:]), labels)
    packed = torch.where((keys > 0)[:, :, None, None], packed, 0.0)
    return torch.cat([at_least_float32(scores[:, :1]), packed], 1), keys


def _refine_regions(
    image: Tensor, maps: Tensor, refine: PixelAdaptiveRefinement, regions: Tensor | None, down_scale: int
) -> Tensor:
    """Maps (B, C, H, W) refined within each image's region, 0 outside."""
    pixels, refined = at_least_float32(image), torch.zeros_like(maps)
    for (x1, y1, x2, y2), images in _groups(image, regions):
        if x2 <= x1 or y2 <= y1:
            continue
        part = maps[images, :, y1:y2, x1:x2]
        small = refine(_shrink(pixels[images, :, y1:y2, x1:x2], down_scale), part)  # PAR itself shrinks the maps
        large = F.interpolate(small, part.shape[-2:], mode="bilinear", align_corners=False)
        refined[images, :, y1:y2, x1:x2] = large
    return refined


def _check(image: Tensor, cam: Tensor, labels: Tensor, regions: Tensor | None) -> None:
    check_ndim("cam", cam, 4, "(B, K, H, W)")
    check_floating("cam", cam)
    check_floating("image", image)
    check_shape("image", image, (len(cam), 3, *cam.shape[2:]), "to match the maps")
    check_shape("labels", labels, cam.shape[:2], "to match the maps")
    if regions is not None:
        check_regions(regions, len(cam))


def _shrink(x: Tensor, factor: int) -> Tensor:
    size = [max(1, side // factor) for side in x.shape[-2:]]
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:2], *size)
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def _pack(cam: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The maps of present classes, (B, M, H, W), and their classes 1..K, (B, M), 0 for one that is not used."""
    present = labels > 0
    most = int(present.sum(1).max()) if present.numel() else 0
    index = torch.argsort((~present).to(torch.uint8), dim=1, stable=True)[:, :most]
    keys = torch.where(present.gather(1, index), index + 1, 0)
    return cam.gather(1, index[:, :, None, None].expand(-1, -1, *cam.shape[2:])), keys


def _to_classes(scores: Tensor, keys: Tensor) -> Tensor:
    """The class of the strongest of (B, 1 + M, H, W): (B, H, W)."""
    return F.pad(keys, (1, 0)).gather(1, scores.argmax(1).flatten(1)).view(len(scores), *scores.shape[2:])


def _keep(mask: Tensor, regions: Tensor | None, ignore_index: int) -> Tensor:
    if regions is None:
        return mask
    return torch.where(inside_regions(regions, (mask.shape[1], mask.shape[2])), mask, ignore_index)


def _groups(image: Tensor, regions: Tensor | None) -> list[tuple[list[int], list[int]]]:
    """Regions within the image as ``x1, y1, x2, y2``, each with the images that have it."""
    height, width = image.shape[-2:]
    if regions is None:
        return [([0, 0, width, height], list(range(len(image))))]
    limits = regions.new_tensor([width, height, width, height])
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, region in enumerate(torch.minimum(regions.clamp(min=0), limits).tolist()):
        groups.setdefault(tuple(region), []).append(index)
    return [(list(region), images) for region, images in groups.items()]
