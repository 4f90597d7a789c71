"""Local crops of an image: where they lie, how they are cut, read from a map of the whole, and what they teach (L2G).

Axes: B images, K foreground classes, C channels, H W pixels or cells, h w cells of a crop, n crops, those of an image
one after the other.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules._precision import at_least_float32
from wsss_modules.saliency import saliency_on_grid

__all__ = ["corner_and_random_boxes", "crop_align", "cut_crops", "local_attention_target", "random_boxes"]

Size = int | tuple[int, int]


def random_boxes(
    size: tuple[int, int],
    crop: Size,
    number: int,
    *,
    images: int = 1,
    offsets: Tensor | None = None,
    generator: torch.Generator | None = None,
    legacy_crop: bool = False,
    legacy_end: bool = False,
) -> Tensor:
    """Draw boxes of one size, every place in the image being equally likely.

    Args:
        size: (H, W) of the images in pixels.
        crop: Size of the boxes in pixels: a side, or (height, width); at most ``size``.
        number: Boxes an image.
        images: B, how many.
        offsets: (B, number, 2) integers, drawn before: x and y of each box's first corner. Nothing is drawn then.
        generator: Source of the draws. The boxes are on its device; without one, on the CPU.
        legacy_crop: Take the axes for each other, as the released code does for the view of an image.
        legacy_end: Never draw the last place, as the released code does for the crops of a view.

    Returns:
        boxes (B * number, 5) int64: image, x1, y1, x2, y2 in pixels, half-open.

    Raises:
        TypeError: ``offsets`` does not hold integers.
        ValueError: a crop larger than the image, offsets that reach out of it, a wrong shape, or a negative number.

    Paper:
        Jiang, Yang, Hou and Wei, L2G: A Simple Local-to-Global Knowledge Transfer Framework for Weakly Supervised
        Semantic Segmentation, CVPR 2022, arXiv:2204.03206.

    Differences:
        The released code takes the width for the height where it draws x, and the other way round: with images of
        683 x 512 pixels the right quarter is never seen and most crops of 448 reach over the lower edge, into black.
        ``legacy_crop=True`` does that, and its boxes may reach out of the image: `cut_crops` fills them with zeros.

    Example:
        >>> random_boxes((100, 150), 64, 2, generator=torch.Generator().manual_seed(0))
        tensor([[  0,  65,  19, 129,  83],
                [  0,  12,   2,  76,  66]])
    """
    _check_numbers(number, images)
    height, width = _pair(crop)
    spare = _spare(size, (height, width))
    if legacy_crop:
        spare = spare[1], spare[0]
    if offsets is None:
        offsets = _draw(spare, (images, number), generator, legacy_end)
    else:
        _check_offsets(offsets, (images, number), spare)
    x, y = offsets.long().unbind(2)  # (B, number)
    index = torch.arange(images, device=x.device)[:, None].expand(images, number)
    return torch.stack([index, x, y, x + width, y + height], 2).flatten(0, 1)


def corner_and_random_boxes(
    size: tuple[int, int],
    crop: Size,
    number: int = 6,
    *,
    images: int = 1,
    offsets: Tensor | None = None,
    generator: torch.Generator | None = None,
    legacy_end: bool = False,
) -> Tensor:
    """The four boxes in the corners of an image, and further ones at random places.

    Args:
        size: (H, W) of the images in pixels.
        crop: Size of the boxes in pixels: a side, or (height, width); at most ``size``.
        number: Boxes an image, at least 4: 6 for VOC.
        images: B, how many.
        offsets: (B, number - 4, 2) integers, drawn before; see `random_boxes`.
        generator: see `random_boxes`.
        legacy_end: see `random_boxes`.

    Returns:
        boxes (B * number, 5) int64: image, x1, y1, x2, y2 in pixels, half-open. Of each image first the corners: upper
        left, upper right, lower left, lower right.

    Raises:
        TypeError: ``offsets`` does not hold integers.
        ValueError: fewer than four boxes; see also `random_boxes`.

    Paper:
        Jiang et al., CVPR 2022; for COCO the released code takes four boxes at random places.

    Example:
        >>> corner_and_random_boxes((100, 150), 64, 4)
        tensor([[  0,   0,   0,  64,  64],
                [  0,  86,   0, 150,  64],
                [  0,   0,  36,  64, 100],
                [  0,  86,  36, 150, 100]])
    """
    if number < 4:
        raise ValueError(f"number: expected at least the four corners, got {number}")
    drawn = random_boxes(
        size, crop, number - 4, images=images, offsets=offsets, generator=generator, legacy_end=legacy_end
    )
    down, right = _spare(size, _pair(crop))
    corners = torch.tensor([[0, 0], [right, 0], [0, down], [right, down]]).expand(images, 4, 2)
    fixed = random_boxes(size, crop, 4, images=images, offsets=corners).to(drawn.device)
    per_image = [fixed.view(images, 4, 5), drawn.view(images, number - 4, 5)]
    return torch.cat(per_image, 1).flatten(0, 1)


def cut_crops(images: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """Cut boxes of one size out of a batch.

    Args:
        images: (B, C, H, W): images, saliency, anything.
        boxes: (n, 5) integers: image, x1, y1, x2, y2 in pixels. Only image and first corner are read.
        size: Size of the crops in pixels: a side, or (height, width).

    Returns:
        (n, C, height, width) in the dtype of ``images``; 0 outside of them.

    Raises:
        TypeError: ``boxes`` does not hold integers.
        ValueError: a wrong shape.

    Notes:
        One gather for all crops. Compiles with ``fullgraph=True``.

    Example:
        >>> image = torch.arange(12.0).view(1, 1, 3, 4)
        >>> cut_crops(image, torch.tensor([[0, 1, 0, 3, 2], [0, 3, 2, 5, 4]]), 2)[:, 0]
        tensor([[[ 1.,  2.],
                 [ 5.,  6.]],
        <BLANKLINE>
                [[11.,  0.],
                 [ 0.,  0.]]])
    """
    check_ndim("images", images, 4, "(B, C, H, W)")
    check_shape("boxes", boxes, (None, 5), "of image, x1, y1, x2, y2")
    check_integer("boxes", boxes)
    index, x1, y1 = (boxes[:, i].long() for i in range(3))
    (rows, in_rows), (columns, in_columns) = (
        _span(start, length, limit)
        for start, length, limit in zip((y1, x1), _pair(size), images.shape[2:], strict=True)
    )
    if images.shape[2:].numel() == 0:
        return images.new_zeros(len(boxes), images.shape[1], *_pair(size))
    crops = images.movedim(1, 3)[index[:, None, None], rows[:, :, None], columns[:, None, :]].movedim(3, 1)
    inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return torch.where(inside, crops, torch.zeros((), dtype=images.dtype, device=images.device))


def crop_align(features: Tensor, boxes: Tensor, out_size: Size, *, stride: float = 8, aligned: bool = False) -> Tensor:
    r"""Read boxes out of maps of the whole images, each at a size of its own choice (RoIAlign).

    A box is divided into ``out_size`` bins; a bin is the mean of :math:`\lceil roi / out \rceil` points along each
    axis, roi being the length of the box in cells, each of them interpolated between four cells. Along one axis the
    points of bin i lie at

    .. math:: \frac{y_1}{stride} + \Big( i + \frac{j + 1/2}{nb} \Big) \frac{roi}{out} - a, \qquad j = 0 .. nb - 1

    with a = 1/2 if ``aligned``, else 0. Points up to one cell outside take the value of the nearest cell; those beyond
    are 0.

    Args:
        features: (B, C, H, W) floating point: maps of the whole images.
        boxes: (n, 5) numbers: image, x1, y1, x2, y2 in pixels of the input.
        out_size: Cells of the result: a side, or (h, w).
        stride: Pixels a cell of ``features``.
        aligned: Put the centre of a cell at its centre. Where a box begins at a whole cell and has one bin a cell, the
            result then is a slice. The released code reads half a cell further down and right, the mean of 2 x 2 cells,
            and boxes at the border repeat the last row and column.

    Returns:
        (n, C, h, w) in the dtype of ``features``.

    Raises:
        TypeError: ``features`` is not floating point.
        ValueError: a wrong shape, no cell in ``features``, or a size or ``stride`` that is not positive.

    Paper:
        He, Gkioxari, Dollár and Girshick, Mask R-CNN, ICCV 2017, arXiv:1703.06870; as in Jiang et al., L2G, CVPR 2022.

    Differences:
        That of the paper with adaptive sampling, but that a box longer than the whole map, which reaches outside, has
        no more points a bin than the map would need.

    Notes:
        The mean over points of a bin is separable, so that a box is two small products, rows times map times columns,
        and no kernel is needed. Gradients reach ``features``. Computed in float32 for half precision, also under
        autocast. Compiles with ``fullgraph=True``.

    Example:
        >>> maps = torch.arange(16.0).view(1, 1, 4, 4)
        >>> box = torch.tensor([[0, 8, 0, 24, 16]])
        >>> crop_align(maps, box, 2, aligned=True)[0, 0], crop_align(maps, box, 2)[0, 0]
        (tensor([[1., 2.],
                [5., 6.]]), tensor([[3.5000, 4.5000],
                [7.5000, 8.5000]]))
    """
    check_ndim("features", features, 4, "(B, C, H, W)")
    check_floating("features", features)
    check_shape("boxes", boxes, (None, 5), "of image, x1, y1, x2, y2")
    height, width = _pair(out_size)
    if min(height, width) < 1 or stride <= 0:
        raise ValueError(f"out_size, stride: expected positive numbers, got {out_size} and {stride}")
    if 0 in features.shape[2:]:
        raise ValueError(f"features: expected at least one cell, got shape {tuple(features.shape)}")
    dtype = torch.promote_types(features.dtype, torch.float32)
    x1, y1, x2, y2 = boxes[:, 1:].to(dtype).unbind(1)
    with torch.autocast(features.device.type, enabled=False):
        # lengths are taken in pixels: a rounding above one cell a bin would double the points
        rows = _bin_weights(y1 / stride, (y2 - y1) / stride, height, features.shape[2], aligned)  # (n, h, H)
        columns = _bin_weights(x1 / stride, (x2 - x1) / stride, width, features.shape[3], aligned)  # (n, w, W)
        maps = features.to(dtype)[boxes[:, 0].long()]  # (n, C, H, W)
        read = rows[:, None] @ maps @ columns.mT[:, None]
    return read.to(features.dtype)


@torch.no_grad()
def local_attention_target(
    scores: Tensor,
    labels: Tensor,
    saliency: Tensor | None = None,
    *,
    threshold: float = 1e-3,
    background: Literal["binary", "value"] = "binary",
    empty_saliency: Literal["zero", "attention"] = "zero",
    eps: float = 1e-8,
) -> Tensor:
    r"""What a crop teaches the network that sees the whole image: its winning classes in the shape of the saliency.

    With :math:`a_c = r(f_c) / (\max_{hw} r(f_c) + \epsilon)` for the background and the classes that the image has, 0
    for the others, and c* the best of them at a pixel,

    .. math::
        t_{c^*} = [\, a_{c^*} > \theta \,]\, s \ \text{ for a class}, \qquad
        t_0 = [\, a_0 > \theta \,] (1 - s) \ \text{ if the background wins}

    and 0 for all channels but c*. Without saliency, :math:`t_{c^*} = a_{c^*}`.

    Args:
        scores: (n, 1+K, h, w) floating point, signed class maps of the crops, background first; see
            :class:`wsss_modules.PixelCorrelationCAMHead`.
        labels: (n, K) multi-hot, of the image that each crop is part of; greater than 0 means present.
        saliency: (n, 1, H', W') floating point in [0, 1], cut as the crops; read at the nearest pixels.
        threshold: theta, 0.001 for VOC, 0.1 for COCO.
        background: "binary" (VOC), or "value": :math:`a_0` in the place of the bracket, wherever the background wins
            (COCO).
        empty_saliency: What classes have in a crop without any saliency: "zero", or the value of the "attention", as
            the authors say of the paper; with nearly the same result.
        eps: Added to the maxima.

    Returns:
        (n, 1+K, h, w) in [0, 1], without gradient, in the dtype of ``scores``. At most one channel of a pixel is above
        0, and it is no distribution: where nothing is above ``threshold`` all channels are 0. Where a class that the
        image has, or the background, has a score that is NaN or +inf, its channel is NaN in the whole crop, so that the
        loss shows it, and the others are as if it were absent; of absent classes no score matters.

    Raises:
        TypeError: ``scores`` or ``saliency`` is not floating point.
        ValueError: a wrong shape, a negative ``threshold``, or an unknown option.

    Paper:
        Jiang et al., L2G, CVPR 2022: attention transfer and shape transfer.

    Differences:
        The released code breaks ties by an unstable sort; here the first of the best classes wins, and a class wins
        against the background. Its variant without saliency does not run.

    Notes:
        Maxima in place of a sort of all channels and a one-hot matrix; on a CPU only the maps of present classes are
        read and written. Maps are normalised over the crop, so that a class that the image has but the crop has not
        is stretched to 1 as well. Half precision is computed in float32. Compiles with ``fullgraph=True``.

    Example:
        >>> scores = torch.tensor([[[[-1.0, 0.0, 4.0]], [[2.0, 1.0, 0.0]], [[9.0, 9.0, 9.0]]]])
        >>> saliency = torch.tensor([[[[0.75, 1.0, 0.25]]]])
        >>> local_attention_target(scores, torch.tensor([[1, 0]]), saliency)[0, :, 0]
        tensor([[0.0000, 0.0000, 0.7500],
                [0.7500, 1.0000, 0.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    check_ndim("scores", scores, 4, "(n, 1+K, h, w)")
    check_floating("scores", scores)
    if scores.shape[1] < 2:
        raise ValueError(f"scores: expected the background and at least one class, got shape {tuple(scores.shape)}")
    check_shape("labels", labels, (scores.shape[0], scores.shape[1] - 1), "to match scores")
    check_target_options(threshold, background, empty_saliency)
    if 0 in scores.shape:
        return torch.zeros_like(scores)
    best, won, rows = _winner(at_least_float32(scores).flatten(2), labels > 0, eps)
    of_background = of_class = best
    if saliency is not None:
        s = saliency_on_grid(saliency, scores).flatten(2).to(best.dtype)
        hot = (best > threshold).to(best.dtype)
        of_class = hot * s
        if empty_saliency == "attention":
            empty = (saliency == 0).flatten(1).all(1)[:, None, None]
            of_class = torch.where(empty, best, of_class)
        of_background = (best if background == "value" else hot) * (1 - s)
    won[:, :1] *= of_background
    won[:, 1:] *= of_class
    target = torch.zeros(len(scores) * scores.shape[1], won.shape[2], dtype=best.dtype, device=scores.device)
    return target.index_copy_(0, rows, won.flatten(0, 1)).view(scores.shape).to(scores.dtype)


def check_target_options(threshold: float, background: str, empty_saliency: str) -> None:
    """Raise ``ValueError`` for options that `local_attention_target` does not know."""
    if background not in ("binary", "value"):
        raise ValueError(f'background: expected "binary" or "value", got {background!r}')
    if empty_saliency not in ("zero", "attention"):
        raise ValueError(f'empty_saliency: expected "zero" or "attention", got {empty_saliency!r}')
    if threshold < 0:
        raise ValueError(f"threshold: expected at least 0, got {threshold}")


def _winner(scores: Tensor, present: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The largest attention of each pixel (n, 1, hw), 1 for the map that has it and 0 for others (n, m, hw), and these
    maps' rows (n m,) in ``scores`` (n, 1+K, hw), the background's first.

    The first class that has it wins, then the background. A map that counts but has no finite maximum is NaN.
    """
    n, channels = scores.shape[:2]
    counted, chosen = F.pad(present, (1, 0), value=True), torch.arange(channels, device=scores.device).expand(n, -1)
    may_look = scores.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere to look is to wait
    if may_look:  # only what counts is read, as many maps as the image with most classes has
        most = int(counted.sum(1).max())
        chosen = counted.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
        counted = counted.gather(1, chosen)
    rows = (chosen + torch.arange(0, n * channels, channels, device=scores.device)[:, None]).flatten()
    maps = scores.flatten(0, 1).index_select(0, rows).view(n, -1, scores.shape[2])
    peak, counted = F.relu(maps.amax(2, keepdim=True)) + eps, counted[..., None]
    finite = peak.isfinite()
    all_finite = may_look and bool(finite.all())
    if not all_finite:
        maps.masked_fill_(~finite, 0.0)
    # what is negative, or does not count, stays below or at 0
    attention = maps.div_(torch.where(counted & finite & (peak > 0), peak, torch.inf))
    best = F.relu(attention.amax(1, keepdim=True))
    # Arithmetic in place of comparisons, which take four times as long on a CPU: the sign is 0 for what reaches the
    # best and -1 for the rest, so that the rank is above 0 for the former only, highest for the first class, then falls
    # to that of the background.
    number = maps.shape[1]
    place = torch.arange(number, 0, -1, dtype=maps.dtype, device=scores.device).roll(1)[:, None]
    rank = torch.add(place, attention.sub_(best).sign_(), alpha=number)
    won = F.relu(rank.sub_(rank.amax(1, keepdim=True) - 1))
    if not all_finite:
        won.masked_fill_(counted & ~finite, torch.nan)
    return best, won, rows


def _check_numbers(number: int, images: int) -> None:
    if number < 0 or images < 0:
        raise ValueError(f"number, images: expected at least 0, got {number} and {images}")


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _spare(size: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int]:
    """How far a crop can move down and right."""
    spare = size[0] - crop[0], size[1] - crop[1]
    if min(spare) < 0 or min(crop) < 1:
        raise ValueError(f"crop: expected 1 x 1 pixels up to size {size}, got {crop}; pad the image first")
    return spare


def _draw(spare: tuple[int, int], shape: tuple[int, int], generator: torch.Generator | None, open_end: bool) -> Tensor:
    """(B, number, 2) x and y, each uniform in 0..spare."""
    device = "cpu" if generator is None else generator.device
    ends = (max(1, length if open_end else length + 1) for length in (spare[1], spare[0]))
    return torch.stack([torch.randint(end, shape, generator=generator, device=device) for end in ends], 2)


def _check_offsets(offsets: Tensor, shape: tuple[int, int], spare: tuple[int, int]) -> None:
    check_shape("offsets", offsets, (*shape, 2), "of x and y")
    check_integer("offsets", offsets)
    limit = torch.tensor([spare[1], spare[0]], device=offsets.device)
    if bool(((offsets < 0) | (offsets > limit)).any()):
        raise ValueError(f"offsets: expected x in 0..{spare[1]} and y in 0..{spare[0]}, got others")


def _span(start: Tensor, length: int, limit: int) -> tuple[Tensor, Tensor]:
    """(n, length) places from ``start`` on, held inside, and whether they were."""
    places = start[:, None] + torch.arange(length, device=start.device)
    return places.clamp(0, max(0, limit - 1)), (places >= 0) & (places < limit)


def _bin_weights(start: Tensor, length: Tensor, bins: int, cells: int, aligned: bool) -> Tensor:
    """(n, bins, cells): the share of each cell in the mean over the points of each bin, along one axis."""
    if aligned:
        start = start - 0.5
    else:
        length = length.clamp(min=1)
    most = math.ceil(cells / bins)  # points a bin of a box as long as the map
    count = (length / bins).ceil().clamp(1, most)[:, None, None]
    point = torch.arange(most, device=start.device, dtype=start.dtype)
    bin_ = torch.arange(bins, device=start.device, dtype=start.dtype)[:, None]
    place = start[:, None, None] + (bin_ + (point + 0.5) / count) * (length / bins)[:, None, None]  # (n, bins, most)
    counted = (point < count) & (place >= -1) & (place <= cells)
    cell = torch.arange(cells, device=start.device, dtype=start.dtype)
    near = (1 - (place.clamp(0, cells - 1)[..., None] - cell).abs()).clamp(min=0)  # (n, bins, most, cells)
    return torch.where(counted[..., None], near, 0.0).sum(2) / count
