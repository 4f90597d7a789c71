"""Pooling of boxes without their background (BANA).

Axes: B images, D feature channels, H W pixels, h w cells, K boxes, Q = g * g background queries of an image, C classes
with the background first, P points of a box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules._precision import at_least_float32
from wsss_modules.boxes.geometry import check_boxes, check_map, normalize_boxes

__all__ = [
    "BackgroundAwarePooling",
    "BackgroundPrototypes",
    "BoxClassifier",
    "BoxClassifierOutput",
    "PooledBoxes",
    "background_attention",
    "background_aware_pooling",
    "background_prototypes",
    "pad_to_grid",
    "weighted_roi_avg_pool",
]


def pad_to_grid(x: Tensor, grid: int) -> Tensor:
    """Pad a map with zeros until both sides are multiples of ``grid``.

    An even number of rows or columns is added half on each side, an odd number at the bottom or on the right.

    Args:
        x: (B, C, H, W).
        grid: g, at least 1.

    Returns:
        (B, C, H', W'), H' and W' the next multiples of g. ``x`` itself if there is nothing to add.

    Raises:
        ValueError: a wrong shape or grid.

    Paper:
        In the released code of Oh, Kim and Ham, Background-Aware Pooling and Noise-Aware Loss for Weakly-Supervised
        Semantic Segmentation, CVPR 2021, arXiv:2104.00905.

    Example:
        >>> pad_to_grid(torch.ones(1, 1, 2, 3), 4).int()[0, 0]
        tensor([[0, 0, 0, 0],
                [1, 1, 1, 0],
                [1, 1, 1, 0],
                [0, 0, 0, 0]], dtype=torch.int32)
    """
    check_ndim("x", x, 4, "(B, C, H, W)")
    if grid < 1:
        raise ValueError(f"grid: expected at least 1, got {grid}")
    sides = []
    for side in (x.shape[3], x.shape[2]):
        missing = -side % grid
        before = missing // 2 if missing % 2 == 0 else 0
        sides += [before, missing - before]
    return F.pad(x, sides) if any(sides) else x


class BackgroundPrototypes(NamedTuple):
    """What `background_prototypes` returns.

    Attributes:
        prototypes: (B, Q, D), zeros where a cell of the grid has no background.
        cells: (B, Q) how many cells of background are under each, in the dtype of the features; above 0 means valid.
    """

    prototypes: Tensor
    cells: Tensor


def background_prototypes(
    features: Tensor, background_mask: Tensor, grid: int = 4, *, eps: float = 1e-12
) -> BackgroundPrototypes:
    r"""Average the features of certain background over each cell of a grid.

    .. math:: q_j = \frac{\sum_{i \in cell_j} b_i f_i}{\sum_{i \in cell_j} b_i + \epsilon}

    Args:
        features: (B, D, h, w) floating point.
        background_mask: (B, 1, H, W), 1 outside all boxes, else 0; resized to (h, w) by the nearest pixel.
        grid: g; maps are padded by `pad_to_grid` and cut into g x g equal parts.
        eps: keeps the quotient finite.

    Returns:
        `BackgroundPrototypes` with Q = g * g, in the dtype of ``features``; gradients flow into the prototypes.

    Raises:
        TypeError: ``features`` is not floating point.
        ValueError: a wrong shape or grid.

    Paper:
        Oh, Kim and Ham, CVPR 2021, arXiv:2104.00905, section 3.1.

    Notes:
        Compiles with ``fullgraph=True``. Half precision is summed in float32.

    Example:
        >>> features = torch.tensor([[[[1.0, 5.0], [3.0, 7.0]]]])
        >>> mask = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
        >>> found = background_prototypes(features, mask, grid=1)
        >>> found.prototypes.item(), found.cells.item()
        (2.0, 2.0)
    """
    check_map("features", features)
    check_shape("background_mask", background_mask, (len(features), 1, None, None), "to match features")
    x = at_least_float32(features)
    mask = background_mask.to(x.dtype)
    if mask.shape[2:] != x.shape[2:]:
        mask = F.interpolate(mask, x.shape[2:], mode="nearest")
    total, count = (
        padded.unflatten(2, (grid, -1)).unflatten(4, (grid, -1)).sum((3, 5)).flatten(2)
        for padded in (pad_to_grid(x * mask, grid), pad_to_grid(mask, grid))
    )  # (B, D, Q), (B, 1, Q)
    prototypes = (total / (count + eps)).mT
    return BackgroundPrototypes(prototypes.to(features.dtype), count[:, 0].to(features.dtype))


def background_attention(features: Tensor, prototypes: Tensor, valid: Tensor) -> Tensor:
    r"""How much each place looks like the background.

    .. math:: A_i = \frac{1}{|V|} \sum_{j \in V} \mathrm{relu}(\cos(f_i, q_j))

    Args:
        features: (D, h, w), or (B, D, h, w) with ``prototypes`` (B, Q, D) and ``valid`` (B, Q).
        prototypes: (Q, D) queries q.
        valid: (Q,) which of them count (V); above 0 means valid.

    Returns:
        (h, w), or (B, h, w), in [0, 1], in the dtype of ``features``; 0 where no query is valid.

    Raises:
        TypeError: ``features`` is not floating point.
        ValueError: shapes don't match.

    Paper:
        Oh, Kim and Ham, CVPR 2021, arXiv:2104.00905, eq. 2.

    Differences:
        Where a box covers the image the released code averages over nothing, which is NaN.

    Notes:
        Vectors shorter than 1e-12 are taken as short as they are. Compiles with ``fullgraph=True``.

    Example:
        >>> features = torch.tensor([[[1.0, 0.0, -1.0]], [[0.0, 2.0, 0.0]]])  # D = 2, one row of three places
        >>> background_attention(features, torch.tensor([[3.0, 0.0], [0.0, 9.0]]), torch.tensor([1, 0]))
        tensor([[1., 0., 0.]])
    """
    check_floating("features", features)
    if features.ndim == 3:
        check_ndim("prototypes", prototypes, 2, "(Q, D)")
        check_ndim("valid", valid, 1, "(Q,)")
        return background_attention(features[None], prototypes[None], valid[None])[0]
    check_ndim("features", features, 4, "(D, h, w) or (B, D, h, w)")
    check_shape("prototypes", prototypes, (len(features), None, features.shape[1]), "to match features")
    check_shape("valid", valid, prototypes.shape[:2], "to match prototypes")
    dtype = at_least_float32(features).dtype
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.to(dtype), dim=1, eps=1e-12)
        q = F.normalize(prototypes.to(dtype), dim=2, eps=1e-12)
        # rounding steps above 1: weights 1 - A of both signs would cancel where all is alike
        similarity = torch.einsum("bqd,bdhw->bqhw", q, x).relu().clamp(max=1)
        weight = (valid > 0).to(dtype)
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("bqhw,bq->bhw", similarity, weight).to(features.dtype)


def weighted_roi_avg_pool(
    x: Tensor, weight: Tensor, output_size: tuple[int, int] = (2, 2), *, eps: float = 1e-12
) -> Tensor:
    r"""Average a map over windows, with a weight for each place.

    .. math:: y_o = \frac{\sum_{i \in o} w_i x_i}{\sum_{i \in o} w_i + \epsilon}

    Windows of rows have the stride s = max(H // OH, 1) and the length max(H - (OH - 1) s, 1), those of columns
    likewise: of odd sizes they overlap. A map with fewer rows than windows repeats its last row at the bottom, one with
    fewer columns its first column on the left.

    Args:
        x: (N, D, H, W) floating point.
        weight: (N, 1, H, W) weights, at least 0.
        output_size: (OH, OW).
        eps: added to the sum of the weights; a window of weights 0 gives 0.

    Returns:
        (N, D, OH, OW) in the dtype of ``x``.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: a wrong shape, or an empty map.

    Paper:
        Oh, Kim and Ham, CVPR 2021, arXiv:2104.00905, eq. 3.

    Notes:
        Two small matrix products in place of a convolution with D kernels of ones. Half precision is summed in float32.
        Compiles with ``fullgraph=True``.

    Example:
        >>> x = torch.tensor([[[[1.0, 3.0, 5.0]]]])
        >>> weighted_roi_avg_pool(x, torch.tensor([[[[1.0, 1.0, 0.0]]]]), (1, 2)).flatten()
        tensor([2., 3.])
    """
    check_map("x", x)
    check_shape("weight", weight, (len(x), 1, *x.shape[2:]), "to match x")
    values = at_least_float32(x)
    weight = weight.to(values.dtype)
    rows = _windows(x.shape[2], output_size[0], first=False).to(values)
    columns = _windows(x.shape[3], output_size[1], first=True).to(values)
    with torch.autocast(x.device.type, enabled=False):
        total, mass = (rows @ (part @ columns.T) for part in (values * weight, weight))
        return (total / (mass + eps)).to(x.dtype)


class PooledBoxes(NamedTuple):
    """What `background_aware_pooling` returns.

    Attributes:
        pooled: (K, D, OH, OW), in the order of the boxes.
        prototypes: (B, Q, D) background queries.
        cells: (B, Q) how many cells of background are under each query; above 0 means valid.
    """

    pooled: Tensor
    prototypes: Tensor
    cells: Tensor


def background_aware_pooling(
    features: Tensor,
    boxes: Tensor,
    background_mask: Tensor,
    *,
    output_size: tuple[int, int] = (2, 2),
    grid: int = 4,
    min_background: float = 0.125,
    use_background: Tensor | None = None,
    align_corners: bool = False,
    eps: float = 1e-12,
) -> PooledBoxes:
    r"""Pool the features of boxes, each place weighted by how little it looks like the background.

    Features are read bilinearly at about one point a cell of the box, and pooled by `weighted_roi_avg_pool` with the
    weight :math:`1 - A` of `background_attention`. Where an image has too little background, the weight is 1.

    Args:
        features: (B, D, h, w) floating point.
        boxes: (K, 5) image index, x1, y1, x2, y2 in pixels of the mask, half-open, in any order.
        background_mask: (B, 1, H, W) at the size of the images, 1 outside all boxes; see
            `background_mask_from_boxes`.
        output_size: (OH, OW) windows of a box.
        grid: g x g background queries.
        min_background: An image whose share of background is not above this is pooled plainly.
        use_background: (B,) in place of that rule: which images are pooled with attention.
        align_corners: Read the features where the boxes lie, and those of the border beyond the map. The released code
            takes coordinates made for aligned corners (see `normalize_boxes`) for those of the other convention, up to
            half a cell off, so that zeros from outside the map blend in at its border; that is False.
        eps: See `weighted_roi_avg_pool`.

    Returns:
        `PooledBoxes`, in the dtype of ``features``.

    Raises:
        TypeError: ``features`` is not floating point.
        ValueError: a wrong shape, or an image index out of range.

    Paper:
        Oh, Kim and Ham, Background-Aware Pooling and Noise-Aware Loss for Weakly-Supervised Semantic Segmentation, CVPR
        2021, arXiv:2104.00905, section 3.1.

    Differences:
        Boxes keep their order; the released code groups them by image. No boxes at all, and boxes without area, don't
        fail: the latter are read at one point.

    Notes:
        All points of the batch are read in one call, without a copy of the features for each box, and every vector is
        compared with the queries once. How many points a box has depends on the data, so the graph of
        ``torch.compile`` breaks and the device waits for the boxes. No statistics over the batch.

    Example:
        >>> from wsss_modules import background_mask_from_boxes
        >>> _ = torch.manual_seed(0)
        >>> boxes = torch.tensor([[1, 8, 8, 40, 40], [0, 0, 0, 20, 64]])
        >>> mask = background_mask_from_boxes(boxes, 2, (64, 64))
        >>> background_aware_pooling(torch.rand(2, 16, 8, 8), boxes, mask).pooled.shape
        torch.Size([2, 16, 2, 2])
    """
    queries = background_prototypes(features, background_mask, grid)
    check_boxes(boxes, len(features))
    dtype = at_least_float32(features).dtype
    if use_background is None:
        use_background = background_mask.to(dtype).mean((1, 2, 3)) > min_background
    check_shape("use_background", use_background, (len(features),), "to match features")
    use = (use_background > 0) & (queries.cells > 0).any(1)
    regions = normalize_boxes(boxes[:, 1:], (background_mask.shape[2], background_mask.shape[3]), dtype)
    grids, extents = _points(regions, (features.shape[2], features.shape[3]))
    members = [(boxes[:, 0] == image).nonzero()[:, 0].tolist() for image in range(len(features))]
    longest = max([sum(len(grids[box]) for box in own) for own in members], default=0)
    if longest == 0:
        empty = features.new_zeros(0, features.shape[1], *output_size)
        return PooledBoxes(empty + 0 * features.sum(), *queries)
    outside = torch.full((len(features), 1, longest, 2), 2.0, dtype=dtype, device=features.device)
    for image, own in enumerate(members):
        if own:
            points = torch.cat([grids[box] for box in own])
            outside[image, 0, : len(points)] = points.to(features.device)
    beyond = "border" if align_corners else "zeros"  # the end of a half-open box is a pixel beyond its last centre
    x = F.grid_sample(
        features.to(dtype), outside, mode="bilinear", padding_mode=beyond, align_corners=align_corners
    )  # (B, D, 1, P)
    attention = background_attention(x, queries.prototypes.to(dtype), queries.cells)  # (B, 1, P)
    weight = torch.where(use[:, None], 1 - attention[:, 0], 1.0)  # (B, P)
    parts: dict[int, Tensor] = {}
    for image, own in enumerate(members):
        start = 0
        for box in own:
            stop = start + len(grids[box])
            extent = extents[box]
            values = x[image, :, 0, start:stop].unflatten(1, extent)[None]
            weights = weight[image, None, start:stop].unflatten(1, extent)[None]
            parts[box] = weighted_roi_avg_pool(values, weights, output_size, eps=eps)[0]
            start = stop
    stacked = torch.stack([parts[box] for box in range(len(boxes))])
    return PooledBoxes(stacked.to(features.dtype), *queries)


class BackgroundAwarePooling(nn.Module):
    """Pool boxes without their background; see :func:`background_aware_pooling`.

    Args:
        output_size: (OH, OW) windows of a box.
        grid: g x g background queries.
        min_background: An image whose share of background is not above this is pooled plainly.
        align_corners: Read the features where the boxes lie; False as released.
        eps: See `weighted_roi_avg_pool`.

    Example:
        >>> from wsss_modules import background_mask_from_boxes
        >>> boxes = torch.tensor([[0, 8, 8, 40, 40]])
        >>> mask = background_mask_from_boxes(boxes, 1, (64, 64))
        >>> BackgroundAwarePooling(grid=2)(torch.rand(1, 16, 8, 8), boxes, mask).prototypes.shape
        torch.Size([1, 4, 16])
    """

    def __init__(
        self,
        *,
        output_size: tuple[int, int] = (2, 2),
        grid: int = 4,
        min_background: float = 0.125,
        align_corners: bool = False,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.output_size, self.grid, self.eps = output_size, grid, eps
        self.min_background, self.align_corners = min_background, align_corners

    def forward(
        self, features: Tensor, boxes: Tensor, background_mask: Tensor, use_background: Tensor | None = None
    ) -> PooledBoxes:
        """Features, boxes and the mask of their outside -> a vector for each window, and the background queries."""
        return background_aware_pooling(
            features,
            boxes,
            background_mask,
            output_size=self.output_size,
            grid=self.grid,
            min_background=self.min_background,
            use_background=use_background,
            align_corners=self.align_corners,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"output_size={self.output_size}, grid={self.grid}, min_background={self.min_background}, "
            f"align_corners={self.align_corners}, eps={self.eps}"
        )


class BoxClassifierOutput(NamedTuple):
    """What `BoxClassifier` returns: M = K * OH * OW windows and then the valid background queries of all images.

    Attributes:
        logits: (M, C), the background being class 0.
        target: (M,) int64, the class of each row.
        pooled: (K, D, OH, OW) vectors of the boxes.
        prototypes: (B, Q, D) background queries.
        cells: (B, Q) how many cells of background are under each query.
    """

    logits: Tensor
    target: Tensor
    pooled: Tensor
    prototypes: Tensor
    cells: Tensor


class BoxClassifier(nn.Module):
    """Classify the windows of boxes by the class of the box, and background queries as background (BANA, stage 1).

    The objective is the plain mean cross-entropy of all rows: ``F.cross_entropy(out.logits, out.target)``, which is not
    a number where a batch has neither a box nor background, so that there are no rows. Weighted class maps come from
    the rows of ``classifier.weight``, see `box_pseudo_labels`.

    Args:
        in_channels: D, channels of the features.
        num_classes: K foreground classes; the classifier has 1 + K rows, without bias.
        output_size: (OH, OW) windows of a box.
        grid: g x g background queries.
        min_background: An image whose share of background is not above this is pooled plainly.
        align_corners: Read the features where the boxes lie; False as released.

    Paper:
        Oh, Kim and Ham, CVPR 2021, arXiv:2104.00905, section 3.1.

    Differences:
        Rows follow the order of the boxes. The released code groups them by image but not their classes, so boxes that
        are not sorted by image get the classes of others.

    Example:
        >>> from wsss_modules import background_mask_from_boxes
        >>> _ = torch.manual_seed(0)
        >>> boxes, classes = torch.tensor([[0, 8, 8, 40, 40], [1, 0, 0, 20, 64]]), torch.tensor([3, 1])
        >>> mask = background_mask_from_boxes(boxes, 2, (64, 64))
        >>> out = BoxClassifier(16, 3, grid=1)(torch.rand(2, 16, 8, 8), boxes, classes, mask)
        >>> F.cross_entropy(out.logits, out.target).backward()
        >>> out.target
        tensor([3, 3, 3, 3, 1, 1, 1, 1, 0, 0])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        output_size: tuple[int, int] = (2, 2),
        grid: int = 4,
        min_background: float = 0.125,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.pooling = BackgroundAwarePooling(
            output_size=output_size, grid=grid, min_background=min_background, align_corners=align_corners
        )
        self.classifier = nn.Conv2d(in_channels, 1 + num_classes, 1, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(
        self,
        features: Tensor,
        boxes: Tensor,
        classes: Tensor,
        background_mask: Tensor,
        use_background: Tensor | None = None,
    ) -> BoxClassifierOutput:
        """Classify boxes and background.

        Args:
            features: (B, D, h, w).
            boxes: (K, 5) image index, x1, y1, x2, y2 in pixels, half-open, in any order.
            classes: (K,) integers 1..K of a mask.
            background_mask: (B, 1, H, W), 1 outside all boxes.
            use_background: (B,) which images are pooled with attention, in place of the rule.

        Raises:
            TypeError: ``features`` is not floating point or ``classes`` not of integers.
            ValueError: shapes don't match.
        """
        check_shape("classes", classes, (len(boxes),), "to match boxes")
        check_integer("classes", classes)
        out = self.pooling(features, boxes, background_mask, use_background)
        windows = out.pooled.flatten(2).mT.flatten(0, 1)  # (K * OH * OW, D)
        queries = out.prototypes[out.cells > 0]
        logits = F.linear(torch.cat([windows, queries]), self.classifier.weight.flatten(1))
        per_box = math.prod(self.pooling.output_size)
        target = torch.cat([classes.long().repeat_interleave(per_box), classes.new_zeros(len(queries)).long()])
        return BoxClassifierOutput(logits, target.to(logits.device), *out)


def _windows(side: int, count: int, *, first: bool) -> Tensor:
    """(count, side): how often each place is in each window; short sides repeat the first or the last place."""
    if count < 1:
        raise ValueError(f"output_size: expected at least 1 window a side, got {count}")
    stride = max(side // count, 1)
    length = max(side - (count - 1) * stride, 1)
    place = torch.arange(count)[:, None] * stride + torch.arange(length)
    place = (place - max(count - side, 0) if first else place).clamp(0, side - 1)
    return F.one_hot(place, side).sum(1)


def _points(regions: Tensor, size: tuple[int, int]) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Points (x, y) at which each region of a map is read, row by row, and how many rows and columns they are.

    Spaced by ``linspace`` in float32 whatever the features, as released: other rounding would move the points.
    """
    cells = regions.new_tensor([size[1] - 1, size[0] - 1]) / 2
    first, last = (regions[:, :2] * cells + cells).floor(), (regions[:, 2:] * cells + cells).ceil()
    extents: Sequence[Sequence[float]] = (last - first).clamp(min=1).tolist()  # without area: one point
    grids, counts = [], []
    for (x1, y1, x2, y2), (width, height) in zip(regions.tolist(), extents, strict=True):
        x, y = (torch.linspace(a, b, int(n), dtype=torch.float32) for a, b, n in ((x1, x2, width), (y1, y2, height)))
        grids.append(torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1).reshape(-1, 2))
        counts.append((len(y), len(x)))
    return grids, counts
