"""The structure of one image: which cells look like those that a class's map shows (SIPE's seeds).

Axes: B images, K foreground classes, C = 1 + K channels with the background first, D feature channels, H W cells,
N = H*W.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32
from wsss_modules.cam import normalize_cam

__all__ = ["StructureAwareSeeds", "normalize_cam_with_background", "structure_aware_seeds", "structure_iou"]

# Rows of the (N, N) similarity that `structure_aware_seeds` holds at a time.
_ROWS = 256


def normalize_cam_with_background(
    class_maps: Tensor,
    labels: Tensor | None = None,
    *,
    bg_from: Literal["all", "present"] = "all",
    eps: float = 1e-5,
) -> Tensor:
    r"""Normalise class maps, and put what no class claims in front of them as the background.

    .. math:: \hat a_k = \frac{r(a_k)}{\max_{hw} r(a_k) + \epsilon}, \qquad \hat a_0 = 1 - \max_k \hat a_k

    with r = ReLU.

    Args:
        class_maps: (B, K, H, W) floating point, signed scores of each class at each cell; K may be 0.
        labels: (B, K) multi-hot; only read with ``bg_from="present"``.
        bg_from: "all" classes take from the background, as released: a class that is absent but answers anywhere
            reaches 1 at its highest cell. "present": only those of ``labels``; an image without a class is all
            background.
        eps: Added to the maximum.

    Returns:
        scores (B, 1+K, H, W) in [0, 1], background first, in the dtype of ``class_maps``. Absent classes are not
        removed. The gradient flows through the maxima as well.

    Raises:
        TypeError: ``class_maps`` is not floating point.
        ValueError: a wrong shape, an unknown ``bg_from``, or "present" without ``labels``.

    Paper:
        Chen, Yang, Lai and Xie, Self-supervised Image-specific Prototype Exploration for Weakly Supervised Semantic
        Segmentation, CVPR 2022, arXiv:2203.02909.

    Differences:
        ``bg_from="present"`` is not in the released code.

    Notes:
        Computed in float32 for half precision. Compiles with ``fullgraph=True``.

    Example:
        >>> normalize_cam_with_background(torch.tensor([[[[4.0, 1.0, -2.0]], [[0.0, 0.0, 2.0]]]]), eps=0)
        tensor([[[[0.0000, 0.7500, 0.0000]],
        <BLANKLINE>
                 [[1.0000, 0.2500, 0.0000]],
        <BLANKLINE>
                 [[0.0000, 0.0000, 1.0000]]]])
    """
    check_ndim("class_maps", class_maps, 4, "(B, K, H, W)")
    check_floating("class_maps", class_maps)
    if bg_from not in ("all", "present"):
        raise ValueError(f'bg_from: expected "all" or "present", got {bg_from!r}')
    if bg_from == "present":
        if labels is None:
            raise ValueError('labels: expected (B, K) for bg_from="present", got None')
        check_shape("labels", labels, class_maps.shape[:2], "to match class_maps")
    cam = normalize_cam(F.relu(at_least_float32(class_maps)), eps)
    claims = cam
    if bg_from == "present" and labels is not None:
        claims = torch.where((labels > 0)[:, :, None, None], cam, 0.0)
    if cam.shape[1] == 0:
        background = cam.new_ones(len(cam), 1, *cam.shape[2:])
    else:
        background = 1 - claims.amax(1, keepdim=True)
    return torch.cat([background, cam], 1).to(class_maps.dtype)


def structure_iou(scores: Tensor, affinity: Tensor) -> Tensor:
    r"""Soft intersection over union of every class map with the neighbourhood of every cell.

    .. math::
        \mathrm{iou}_{ci} = \frac{\sum_j R_{ij} s_{cj}}{\sum_j R_{ij} + \sum_j s_{cj} - \sum_j R_{ij} s_{cj}}

    Row i of R, what belongs together with cell i, is compared with the map of each class as a whole: the class whose
    map covers that structure best is a safer label for the cell than the class that is highest at the cell.

    Args:
        scores: (B, C, H, W) floating point, maps in [0, 1].
        affinity: (B, N, N) floating point R, at least 0: similarities of features, or any other affinity of all cells,
            such as the attention of a transformer.

    Returns:
        (B, C, H, W) in [0, 1] for inputs in [0, 1], in the dtype of ``scores``. 0 where both are empty.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: a wrong shape.

    Paper:
        Chen et al., CVPR 2022, arXiv:2203.02909, structure-aware seeds.

    Differences:
        The released code divides by 0 where a cell belongs to nothing (a zero feature) and the map is empty.

    Notes:
        One matrix product a batch, (C, N) by (N, N), where the released code holds C products (N, N). Half precision
        is summed in float32. Compiles with ``fullgraph=True``.

    Example:
        >>> scores = torch.tensor([[[[1.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]]])
        >>> affinity = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
        >>> structure_iou(scores, affinity)[0, :, 0]
        tensor([[1., 1., 0.],
                [0., 0., 1.]])
    """
    check_ndim("scores", scores, 4, "(B, C, H, W)")
    check_floating("scores", scores)
    cells = scores.shape[2] * scores.shape[3]
    check_shape("affinity", affinity, (len(scores), cells, cells), "to match scores")
    check_floating("affinity", affinity)
    dtype = torch.promote_types(torch.promote_types(scores.dtype, affinity.dtype), torch.float32)
    with torch.autocast(scores.device.type, enabled=False):
        maps = scores.to(dtype).flatten(2)  # (B, C, N)
        return _ratio(_with_ones(maps) @ affinity.to(dtype).mT, maps).view_as(scores).to(scores.dtype)


class StructureAwareSeeds(NamedTuple):
    """What `structure_aware_seeds` returns.

    Attributes:
        seeds: (B, 1+K, H, W), 1 for the class that a cell is a seed of, else 0; all 0 for a cell that is none's.
        probs: (B, 1+K, H, W) softmax of the overlaps over background and classes.
    """

    seeds: Tensor
    probs: Tensor


@torch.no_grad()
def structure_aware_seeds(
    scores: Tensor, valid: Tensor, features: Tensor, *, bg_weight: float = 0.5, eps: float = 1e-5
) -> StructureAwareSeeds:
    r"""Give each cell to the class whose map overlaps best with the cells that look like it.

    .. math:: R_{ij} = \mathrm{relu}(z_i \cdot z_j), \qquad z_i = x_i / (\|x_i\|_2 + \epsilon)

    The overlap is that of `structure_iou`; the background's counts ``bg_weight`` times. The largest wins, the first of
    several equal ones.

    Args:
        scores: (B, 1+K, H, W) floating point in [0, 1], background first, see `normalize_cam_with_background`.
        valid: (B, 1+K, H, W) bool or numbers, or (B, 1+K, 1, 1): where a class may have seeds, usually the image
            labels (background 1), and 0 in the padding of a crop. A cell that another class wins has no seed.
        features: (B, D, H, W) floating point.
        bg_weight: At least 0. With 0 the background wins only where no class overlaps at all.
        eps: Added to the length of the features.

    Returns:
        `StructureAwareSeeds`, in the dtype of ``scores``. No gradient.

    Raises:
        TypeError: ``scores`` or ``features`` is not floating point.
        ValueError: a wrong shape, or a negative ``bg_weight``.

    Paper:
        Chen et al., CVPR 2022, arXiv:2203.02909. ``bg_weight`` is a literal 0.5 in the released code.

    Differences:
        In the released code a zero feature makes the overlap of an absent class 0 / 0, and that class wins; here it is
        0. It also builds a graph that no gradient ever passes.

    Notes:
        R is symmetric, so that only its upper half is computed, in strips of 256 rows that are used up at once: about
        ``N^2 D / 2`` multiply-adds and at most ``256 N`` numbers an image, where the released code computes all of R
        and holds ``(1+K) N^2`` products of it with the maps. Half precision is computed in float32. No host
        synchronisation; compiles with ``fullgraph=True`` (the strips are unrolled).

    Example:
        >>> features = torch.tensor([[[[1.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]]])  # two cells alike
        >>> scores = torch.tensor([[[[0.0, 0.4, 1.0]], [[1.0, 0.6, 0.0]]]])
        >>> structure_aware_seeds(scores, torch.ones(1, 2, 1, 1), features).seeds[0, :, 0]
        tensor([[0., 0., 1.],
                [1., 1., 0.]])
    """
    check_ndim("scores", scores, 4, "(B, 1+K, H, W)")
    check_floating("scores", scores)
    _check_background(scores)
    check_shape("features", features, (len(scores), None, *scores.shape[2:]), "to match scores")
    check_floating("features", features)
    _check_valid(valid, scores)
    if bg_weight < 0:
        raise ValueError(f"bg_weight: expected at least 0, got {bg_weight}")
    dtype = torch.promote_types(torch.promote_types(scores.dtype, features.dtype), torch.float32)
    with torch.autocast(scores.device.type, enabled=False):
        maps, x = scores.to(dtype).flatten(2), features.to(dtype).flatten(2)
        z = x / (x.norm(dim=1, keepdim=True) + eps)  # (B, D, N)
        overlap = _ratio(_with_similar_cells(maps, z), maps).view_as(scores)
        overlap = torch.cat([bg_weight * overlap[:, :1], overlap[:, 1:]], 1)
    winner = overlap.argmax(1, keepdim=True)
    seeds = torch.zeros_like(overlap).scatter_(1, winner, 1.0) * valid.to(dtype)
    return StructureAwareSeeds(seeds.to(scores.dtype), overlap.softmax(1).to(scores.dtype))


def _with_ones(maps: Tensor) -> Tensor:
    """The maps (B, C, N) and one of ones, whose product with an affinity gives its row sums: (B, C + 1, N)."""
    return F.pad(maps, (0, 0, 0, 1), value=1.0)


def _with_similar_cells(maps: Tensor, z: Tensor) -> Tensor:
    """``_with_ones(maps) @ R`` (B, C + 1, N) for R = relu(z^T z), by strips of its upper half."""
    cells, maps = z.shape[2], _with_ones(maps)
    result = torch.zeros_like(maps)
    for start in range(0, cells, _ROWS):
        stop = min(start + _ROWS, cells)
        strip = F.relu(z[:, :, start:stop].mT @ z[:, :, start:])  # (B, rows, N - start)
        result[:, :, start:] += maps[:, :, start:stop] @ strip
        result[:, :, start:stop] += maps[:, :, stop:] @ strip[:, :, stop - start :].mT
    return result


def _ratio(sums: Tensor, maps: Tensor) -> Tensor:
    """Intersection over union from the maps (B, C, N) and ``_with_ones(maps)`` times the affinity, (B, C + 1, N)."""
    shared, similar = sums[:, :-1], sums[:, -1:]
    union = similar + maps.sum(2, keepdim=True) - shared
    return shared / union.clamp(min=torch.finfo(union.dtype).tiny)


def _check_background(scores: Tensor) -> None:
    if scores.shape[1] == 0:
        raise ValueError("scores: expected the background at channel 0, got no channel")


def _check_valid(valid: Tensor, scores: Tensor) -> None:
    whole = (*scores.shape[:2], 1, 1)
    if tuple(valid.shape) != whole:
        check_shape("valid", valid, scores.shape, f"to match scores, or {whole}")
