"""Two complementary pseudo labels from boxes, computed on the coarse features (BANA, stage 2).

Axes: D feature channels, h w cells, H W pixels, n boxes, K classes present in the image, C = 1 + K maps with the
background first, Q = g * g background queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules._precision import at_least_float32
from wsss_modules._unit import unit
from wsss_modules.boxes.geometry import boxes_to_masks, check_image_boxes
from wsss_modules.dense_crf import CRFParameters

__all__ = ["BANA_CRF", "BoxLabels", "BoxPseudoLabeler", "UpsampledFeatures", "box_pseudo_labels", "fuse_labels"]

#: The dense CRF over the scores of BANA's boxes, after :func:`wsss_modules.unary_from_scores`.
BANA_CRF = CRFParameters(bilateral_sxy=55.0, bilateral_srgb=3.0, bilateral_weight=4.0)


class UpsampledFeatures:
    r"""Features at the size of the image, bilinear with aligned corners, without ever making them.

    With :math:`F = A f` (A holds at most four weights in a row, those of a pixel's cells) everything that labels ask of
    F is a small sum over the cells:

    - a linear map of F is that map of f, up-sampled: :math:`w \cdot F = A (w \cdot f)`;
    - the squared length is a quadratic form of four neighbouring cells, whose inner products are five maps:
      :math:`|F_p|^2 = \sum_{ij} A_{pi} A_{pj} \, f_i \cdot f_j`;
    - a sum over a region is the region pulled down: :math:`m^T F = (A^T m)^T f`.

    Args:
        features: (D, h, w) floating point; half precision is computed in float32.
        size: (H, W) in pixels.

    Raises:
        TypeError: ``features`` is not floating point.
        ValueError: a wrong shape or size.

    Notes:
        O(D h w) for the inner products, then O(H W) for each map: 64 times fewer operations than on the full features
        where a cell has 8 x 8 pixels, and no tensor of D x H x W. Exact but for rounding.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> features = torch.randn(8, 3, 4)
        >>> full = F.interpolate(features[None], (9, 11), mode="bilinear", align_corners=True)[0]
        >>> up = UpsampledFeatures(features, (9, 11))
        >>> bool(torch.isclose(up.norm(), full.norm(dim=0), atol=1e-5).all())
        True
    """

    def __init__(self, features: Tensor, size: tuple[int, int]) -> None:
        check_ndim("features", features, 3, "(D, h, w)")
        check_floating("features", features)
        if 0 in features.shape[1:] or min(size) < 1:
            raise ValueError(f"features: expected at least one cell and one pixel, got {tuple(features.shape)}, {size}")
        self.features = at_least_float32(features)
        self.size = size
        self._rows, self._columns = (
            _interpolation(n, cells, self.features) for n, cells in zip(size, features.shape[1:], strict=True)
        )

    def project(self, weight: Tensor) -> Tensor:
        """Linear maps of the features: ``weight`` (C, D) -> (C, H, W)."""
        return self.up(torch.einsum("cd,dhw->chw", weight.to(self.features), self.features))

    def up(self, maps: Tensor) -> Tensor:
        """Coarse maps (..., h, w) at the size of the image."""
        return self._rows @ maps @ self._columns.T

    def norm(self) -> Tensor:
        """(H, W) lengths of the features."""
        f = self.features
        right, below = f[:, :, 1:], f[:, 1:]
        pairs = (
            (f, f),
            (f[:, :, :-1], right),
            (f[:, :-1], below),
            (f[:, :-1, :-1], f[:, 1:, 1:]),
            (f[:, :-1, 1:], f[:, 1:, :-1]),
        )
        own, beside, above, one, other = (torch.einsum("dhw,dhw->hw", a, b) for a, b in pairs)
        # along one side a pixel has two cells: the squares of their weights, and twice their product
        rows, columns = self._rows.square(), self._columns.square()
        row_pairs, column_pairs = (2 * a[:, :-1] * a[:, 1:] for a in (self._rows, self._columns))
        squared = rows @ (own @ columns.T + beside @ column_pairs.T)
        squared = squared + row_pairs @ (above @ columns.T + (one + other) @ (column_pairs.T / 2))
        return squared.clamp(min=0).sqrt()

    def mean(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean features of regions (R, H, W), 0 where one has no pixel, and their sizes: (R, D), (R,)."""
        weight = regions.to(self.features)
        pulled = self._rows.T @ weight @ self._columns  # (R, h, w)
        count = weight.sum((1, 2))
        total = torch.einsum("rhw,dhw->rd", pulled, self.features)
        return total / (count[:, None] + 1e-12), count


class BoxLabels(NamedTuple):
    """What `box_pseudo_labels` returns, for one image with the K classes of ``keys``.

    Attributes:
        y_crf: (H, W) int64, 0 background or a class: the labels from background attention, class maps and the CRF.
        y_ret: (H, W) int64, those of the nearest prototype (retrieval).
        keys: (K,) int64 classes present, ascending.
        scores: (1 + K, H, W) in [0, 1], sum 1 (but see ``background_mask``): what the CRF was given.
        correlation: (1 + K, H, W) in [0, 1]: likeness to the prototypes.
        attention: (H, W) in [0, 1]: likeness to the background, 0 below the threshold.
        cam: (K, H, W) in [0, 1]: class maps, divided by their maximum in each box and 0 outside the boxes of the class.
    """

    y_crf: Tensor
    y_ret: Tensor
    keys: Tensor
    scores: Tensor
    correlation: Tensor
    attention: Tensor
    cam: Tensor


def box_pseudo_labels(
    features: Tensor,
    weight: Tensor,
    boxes: Tensor,
    classes: Tensor,
    size: tuple[int, int],
    *,
    crf: Callable[[Tensor], Tensor] | None = None,
    grid: int = 1,
    threshold: float = 0.99,
    background_mask: Tensor | None = None,
    eps: float = 1e-12,
) -> BoxLabels:
    r"""Label an image from its boxes: once by attention and a CRF, once by retrieval.

    The background plane u0 is :math:`A = \frac{1}{Q} \sum_j \mathrm{relu}(\cos(F, q_j))`, with what lies below
    ``threshold`` times the maximum over the whole image set to 0, and 1 outside all boxes; the plane of a class is
    :math:`\mathrm{relu}(w_c \cdot F)` divided by its maximum in each of its boxes (a later box overwrites an earlier
    one), 0 outside them. Inside the boxes the planes pass a softmax, outside only background is possible. The CRF makes
    ``y_crf`` of them. Retrieval averages the features under each label of ``y_crf`` to a prototype, and gives each
    pixel the label of the prototype it is most alike, among those whose boxes it lies in: ``y_ret``.

    Args:
        features: (D, h, w) floating point, of the whole image; they are taken as up-sampled to ``size``.
        weight: (C, D) rows of the classifier of all classes, the background first; see `BoxClassifier`.
        boxes: (n, 4) x1, y1, x2, y2 in pixels, half-open; corners are cut to integers. Without any, all is background.
        classes: (n,) integers 1..C-1.
        size: (H, W) in pixels.
        crf: From scores (1 + K, H, W) in [0, 1] to probabilities of the same shape; None leaves them as they are.
            :func:`wsss_modules.dense_crf` with `BANA_CRF` is the published one.
        grid: g x g background queries; the published stage takes a single one.
        threshold: Share of the greatest attention below which it counts for nothing. 0.99 leaves an almost binary map,
            whose maximum often lies outside the boxes.
        background_mask: (H, W) of which pixels are certain background, above 0, by default those outside all boxes.
            Where one that was made elsewhere reaches into a box, scores are the planes as they are, as released.
        eps: Added to the maximum of a class in a box.

    Returns:
        `BoxLabels`. Both label maps are 0 outside the boxes, and a class occurs only inside its own.

    Raises:
        TypeError: ``features`` or ``weight`` is not floating point, ``classes`` not of integers.
        ValueError: shapes don't match, or a class that ``weight`` has no row for.

    Paper:
        Oh, Kim and Ham, Background-Aware Pooling and Noise-Aware Loss for Weakly-Supervised Semantic Segmentation, CVPR
        2021, arXiv:2104.00905, section 3.2.

    Differences:
        The hard threshold on the attention, and the classifier's row in place of the prototype of a label that no pixel
        has, are the released code's. Where boxes cover the image, that code's attention is NaN, and a box of less than
        a pixel stops it: here the attention is 0 and the box has no pixel.

    Notes:
        Works on the coarse features, see `UpsampledFeatures`: the released form holds about four tensors of D x H x W,
        768 MB each for 1024 channels at 375 x 500. Shapes depend on the number of classes present.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> boxes, classes = torch.tensor([[2, 2, 12, 10], [8, 4, 20, 14]]), torch.tensor([3, 1])
        >>> labels = box_pseudo_labels(torch.rand(8, 4, 6), torch.randn(5, 8), boxes, classes, (16, 24))
        >>> labels.keys, labels.scores.shape, set(labels.y_crf.unique().tolist()) <= {0, 1, 3}
        (tensor([1, 3]), torch.Size([3, 16, 24]), True)
    """
    check_ndim("weight", weight, 2, "(C, D)")
    check_floating("weight", weight)
    check_image_boxes(boxes, classes)
    check_integer("classes", classes)
    up = UpsampledFeatures(features, size)
    check_shape("weight", weight, (None, features.shape[0]), "to match features")
    if len(classes) and not (classes.min() >= 1 and classes.max() < len(weight)):
        raise ValueError(
            f"classes: expected 1..{len(weight) - 1} to match weight, got {int(classes.min())}..{int(classes.max())}"
        )
    classes = classes.to(features.device).long()
    keys = classes.unique()
    masks = boxes_to_masks(boxes.to(features.device), size, rounding="truncate")  # (n, H, W)
    own = torch.stack([masks[classes == key].any(0) for key in keys]) if len(keys) else masks[:0]  # (K, H, W)
    background = ~own.any(0) if background_mask is None else background_mask.to(features.device) > 0
    check_shape("background_mask", background, size, "to match size")
    length = up.norm().clamp(min=1e-12)

    attention = _attention(up, length, background, grid)
    attention = torch.where(attention < threshold * attention.max(), 0.0, attention)
    cam = _class_maps(up.project(weight[keys]).relu(), masks, classes, keys, eps)
    planes = torch.cat([torch.where(background, 1.0, attention)[None], cam])
    scores = torch.where(background, planes, planes.softmax(0))
    refined = scores if crf is None else crf(scores)
    check_shape("crf(scores)", refined, scores.shape, "as its scores")
    allowed = torch.cat([torch.ones_like(background)[None], own])
    names = F.pad(keys, (1, 0))
    y_crf = names[torch.where(allowed, refined, 0.0).argmax(0)]

    prototypes, count = up.mean(y_crf == names[:, None, None])
    prototypes = torch.where(count[:, None] > 0, prototypes, weight[names].to(prototypes))
    likeness = (up.project(unit(prototypes)) / length).relu().clamp(max=1)  # rounding, where features cancel
    correlation = torch.where(allowed, likeness, 0.0)
    correlation[0] = torch.where(background, 1.0, correlation[0])
    y_ret = names[correlation.argmax(0)]
    return BoxLabels(y_crf, y_ret, keys, scores, correlation, attention, cam)


class BoxPseudoLabeler(nn.Module):
    """Label images from their boxes; see :func:`box_pseudo_labels`.

    Args:
        crf: From scores (1 + K, H, W) to probabilities, used where a call does not bring its own.
        grid: g x g background queries.
        threshold: Share of the greatest attention below which it counts for nothing.
        eps: Added to the maximum of a class in a box.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> boxes, classes = torch.tensor([[2, 2, 12, 10]]), torch.tensor([3])
        >>> BoxPseudoLabeler()(torch.rand(8, 4, 6), torch.randn(5, 8), boxes, classes, (16, 24)).y_ret.shape
        torch.Size([16, 24])
    """

    def __init__(
        self,
        crf: Callable[[Tensor], Tensor] | None = None,
        *,
        grid: int = 1,
        threshold: float = 0.99,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.crf, self.grid, self.threshold, self.eps = crf, grid, threshold, eps

    def forward(
        self,
        features: Tensor,
        weight: Tensor,
        boxes: Tensor,
        classes: Tensor,
        size: tuple[int, int],
        crf: Callable[[Tensor], Tensor] | None = None,
        background_mask: Tensor | None = None,
    ) -> BoxLabels:
        """Features (D, h, w), classifier (C, D), boxes (n, 4) and classes (n,) -> labels at ``size``."""
        return box_pseudo_labels(
            features,
            weight,
            boxes,
            classes,
            size,
            crf=self.crf if crf is None else crf,
            grid=self.grid,
            threshold=self.threshold,
            background_mask=background_mask,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        """Show the options."""
        return f"grid={self.grid}, threshold={self.threshold}, eps={self.eps}"


def fuse_labels(y_crf: Tensor, y_ret: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Keep the label on which both agree.

    Args:
        y_crf: (B, H, W) or (H, W) integers.
        y_ret: The same shape.
        ignore_index: The value of pixels on which they differ; where both hold it, it stays.

    Returns:
        The same shape and type as ``y_crf``.

    Raises:
        TypeError: either is not of integers.
        ValueError: shapes differ.

    Paper:
        Oh, Kim and Ham, CVPR 2021, arXiv:2104.00905, section 3.3.

    Example:
        >>> fuse_labels(torch.tensor([0, 2, 2]), torch.tensor([0, 2, 0]))
        tensor([  0,   2, 255])
    """
    check_integer("y_crf", y_crf, "did you pass scores?")
    check_integer("y_ret", y_ret, "did you pass scores?")
    check_shape("y_ret", y_ret, y_crf.shape, "to match y_crf")
    return torch.where(y_crf == y_ret, y_crf, ignore_index)


def _interpolation(size: int, cells: int, like: Tensor) -> Tensor:
    """(size, cells) weights of linear interpolation with aligned corners."""
    identity = torch.eye(cells, dtype=like.dtype, device=like.device)
    return F.interpolate(identity[None], size, mode="linear", align_corners=True)[0].T


def _attention(up: UpsampledFeatures, length: Tensor, background: Tensor, grid: int) -> Tensor:
    """(H, W) mean likeness to the background of each cell of a grid over the image, 0 without background."""
    queries, count = up.mean(_grid_cells(background, grid))
    valid = count > 0
    likeness = (up.project(unit(queries)[valid]) / length).relu().clamp(max=1)  # rounding, where features cancel
    return likeness.sum(0) / valid.sum().clamp(min=1)


def _grid_cells(mask: Tensor, grid: int) -> Tensor:
    """(Q, H, W): ``mask`` in each cell of a grid over the map that `pad_to_grid` would make of it."""
    belongs = []
    for side in mask.shape:
        missing = -side % grid
        before = missing // 2 if missing % 2 == 0 else 0
        cell = (torch.arange(side, device=mask.device) + before) // ((side + missing) // grid)
        belongs.append(cell == torch.arange(grid, device=mask.device)[:, None])  # (g, side)
    rows, columns = belongs
    return (rows[:, None, :, None] & columns[None, :, None, :] & mask).flatten(0, 1)


def _class_maps(maps: Tensor, masks: Tensor, classes: Tensor, keys: Tensor, eps: float) -> Tensor:
    """Maps (K, H, W) of ``keys`` divided by their maximum in each box; of several boxes of a class the last counts."""
    if len(keys) == 0:
        return maps
    row = torch.searchsorted(keys, classes)  # (n,)
    highest = torch.stack([torch.where(m, maps[k], 0.0).max() for m, k in zip(masks, row.tolist(), strict=True)])
    latest = torch.zeros(maps.shape, dtype=torch.int64, device=maps.device)  # 0: in no box of the class
    for box, (mask, k) in enumerate(zip(masks, row.tolist(), strict=True), start=1):
        latest[k].masked_fill_(mask, box)
    return maps / F.pad(highest + eps, (1, 0), value=float("inf"))[latest]
