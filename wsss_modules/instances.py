"""Instances without proposals: centroids from a displacement field, connected components, detections.

Axes: B images (any leading axes), h w cells, H W pixels, M score maps, n instances.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape

__all__ = [
    "Instances",
    "cluster_centroids",
    "connected_components",
    "detect_instances",
    "find_centroids",
]


class Instances(NamedTuple):
    """What `detect_instances` returns.

    Attributes:
        mask: (n, H, W) bool.
        classes: (n,) int64, 1..K as in a mask.
        score: (n,) float, 0 for a fragment that is too small.
    """

    mask: Tensor
    classes: Tensor
    score: Tensor


def find_centroids(displacement: Tensor, iterations: int = 300) -> Tensor:
    r"""Follow a displacement field from every cell until it leads nowhere else.

    .. math:: c \leftarrow \mathrm{clamp}(c + D(c)), \quad c_0 = \text{the cell itself}

    with D read bilinearly; the end point is rounded half to even.

    Args:
        displacement: (..., 2, h, w) float, (dy, dx) in cells, finite.
        iterations: Number of steps. Stops early once nothing moves any more, which changes nothing.

    Returns:
        (..., 2, h, w) int64, the (y, x) cell that each cell leads to.

    Raises:
        TypeError: ``displacement`` is not floating point.
        ValueError: a wrong shape, or a value that is not finite.

    Paper:
        Ahn, Cho and Kwak, Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations, CVPR 2019,
        arXiv:1904.05044, eq. 10.

    Notes:
        One gather per step, of a row that holds both components at the four corners. Data-dependent number of steps:
        compiles with graph breaks.

    Example:
        >>> y, x = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
        >>> find_centroids(torch.stack([1 - y, 2 - x])).flatten(1).unique(dim=1)
        tensor([[1],
                [2]])
    """
    check_floating("displacement", displacement)
    if displacement.ndim < 3 or displacement.shape[-3] != 2:
        raise ValueError(f"displacement: expected shape (..., 2, h, w), got {tuple(displacement.shape)}")
    if not bool(displacement.isfinite().all()):
        raise ValueError("displacement: expected finite values, got NaN or infinity")
    *lead, _, h, w = displacement.shape
    field = displacement if displacement.dtype == torch.float64 else displacement.float()
    field = field.reshape(-1, 2, h, w)
    corners = torch.cat([_shifted(field, dy, dx) for dy in (0, 1) for dx in (0, 1)], 1)  # (B, 4 * 2, h, w)
    table = corners.permute(0, 2, 3, 1).reshape(-1, 4, 2)  # (B * h * w, corner, component)
    image = torch.arange(len(field), device=field.device).repeat_interleave(h * w) * (h * w)
    y, x = _grid(h, w, field)
    at = torch.stack([y, x], -1).reshape(1, h * w, 2).repeat(len(field), 1, 1).reshape(-1, 2)
    limit = at.new_tensor([h - 1, w - 1])
    for step in range(iterations):
        low = at.floor()
        part = at - low
        row = image + low[:, 0].long() * w + low[:, 1].long()
        value = table[row]  # (B * h * w, 4, 2)
        fy, fx = part[:, :1], part[:, 1:]
        top = value[:, 0] * (1 - fx) + value[:, 1] * fx
        bottom = value[:, 2] * (1 - fx) + value[:, 3] * fx
        after = torch.minimum((at + (top * (1 - fy) + bottom * fy)).clamp(min=0), limit)
        if step % 8 == 7 and torch.equal(after, at):  # a fixed point of every cell: all further steps repeat it
            break
        at = after
    return at.round().long().reshape(len(field), h, w, 2).permute(0, 3, 1, 2).reshape(*lead, 2, h, w)


def connected_components(labels: Tensor) -> Tensor:
    """Number the 4-connected components of equal, non-zero labels.

    Args:
        labels: (..., H, W) bool or integer; 0 (False) is background and belongs to no component.

    Returns:
        (..., H, W) int64: 0 for background, else 1, 2, ... in the raster order of each component's first pixel, counted
        anew for each map.

    Raises:
        TypeError: ``labels`` is floating point.
        ValueError: fewer than two axes.

    Notes:
        Works on horizontal runs: labels of touching runs are merged by pointer jumping, in a few rounds, on the device.
        Sizes of intermediate tensors depend on the data, so it compiles with graph breaks.

    Example:
        >>> connected_components(torch.tensor([[1, 1, 0, 1], [0, 0, 2, 1]]))
        tensor([[1, 1, 0, 2],
                [0, 0, 3, 2]])
    """
    check_integer("labels", labels)
    if labels.ndim < 2:
        raise ValueError(f"labels: expected shape (..., H, W), got {tuple(labels.shape)}")
    if labels.numel() == 0:
        return torch.zeros_like(labels, dtype=torch.int64)
    maps = labels.reshape(-1, *labels.shape[-2:])
    on = maps != 0
    joined = on[..., 1:] & (maps[..., 1:] == maps[..., :-1])  # pixel continues the run on its left
    starts = on & ~F.pad(joined, (1, 0))
    run = starts.flatten().cumsum(0).reshape(maps.shape) - 1  # of pixels that are on; in raster order
    down = on[:, 1:] & (maps[:, 1:] == maps[:, :-1])
    # of adjacent columns that link the same two runs, keep the first
    again = down[..., 1:] & down[..., :-1] & joined[:, 1:] & joined[:, :-1]
    link = down & ~F.pad(again, (1, 0))
    root = _merge(int(starts.sum()), run[:, :-1][link], run[:, 1:][link])
    first = root == torch.arange(len(root), device=root.device)
    number = first.cumsum(0)[root]  # 1.. over all maps
    pixels = torch.where(on, number[run.clamp(min=0)] if len(root) else 0, 0)
    if len(maps) > 1:
        counts = pixels.flatten(1).amax(1).cummax(0).values
        pixels = torch.where(on, pixels - F.pad(counts[:-1], (1, 0))[:, None, None], 0)
    return pixels.reshape(labels.shape)


def cluster_centroids(centroids: Tensor, displacement: Tensor, threshold: float = 2.5) -> Tensor:
    """Group the cells that lead to the same place.

    Where the displacement is short, cells are close to a centroid; the connected areas of such cells are the centroids
    of instances. A cell belongs to the area that its own centroid falls into.

    Args:
        centroids: (2, h, w) int64 from `find_centroids`.
        displacement: (2, h, w) float, the same field, in cells.
        threshold: Length below which a displacement is short, in cells.

    Returns:
        (n, h, w) bool, n >= 1: the instances, a partition of the map, in the raster order of their areas. Cells that
        lead to no such area form one more group, which comes first.

    Raises:
        ValueError: a wrong shape.

    Paper:
        Ahn, Cho and Kwak, CVPR 2019, arXiv:1904.05044, section 5.1.

    Example:
        >>> y, x = torch.meshgrid(torch.arange(3.0), torch.arange(12.0), indexing="ij")
        >>> field = torch.stack([1 - y, torch.where(x < 6, 2, 9) - x])
        >>> cluster_centroids(find_centroids(field), field, 1.5).sum((1, 2))
        tensor([18, 18])
    """
    check_shape("displacement", displacement, (2, None, None), "for one image")
    check_shape("centroids", centroids, displacement.shape, "to match displacement")
    check_integer("centroids", centroids, "find_centroids gives them")
    areas = connected_components(displacement.float().square().sum(0).sqrt() < threshold)
    return _one_hot(areas[centroids[0], centroids[1]])


def detect_instances(scores: Tensor, classes: Tensor, *, threshold: float = 0.25, min_area: float = 0.01) -> Instances:
    """Cut score maps of instances into detections: connected areas where one map wins.

    Args:
        scores: (M, H, W) float, one map per pair of class and instance, divided by the greatest value of all of them. M
            may be 0.
        classes: (M,) int64 class of each map, 1..K as in a mask.
        threshold: Background score; ties are background.
        min_area: Areas below this share of H * W get score 0.

    Returns:
        `Instances`, ordered by map and then by the raster order of their first pixel. Empty if nothing exceeds the
        threshold; so it is for maps of zeros or NaN.

    Raises:
        ValueError: a wrong shape.

    Paper:
        Ahn, Cho and Kwak, CVPR 2019, arXiv:1904.05044, section 5.2.

    Differences:
        The released code fails where there is no detection; here the arrays are empty.

    Example:
        >>> scores = torch.zeros(1, 4, 10)
        >>> scores[0, :, :3], scores[0, 2, 6] = 1.0, 0.5
        >>> found = detect_instances(scores, torch.tensor([8]), min_area=0.1)
        >>> found.mask.shape, found.classes, found.score
        (torch.Size([2, 4, 10]), tensor([8, 8]), tensor([1., 0.]))
    """
    check_ndim("scores", scores, 3, "(M, H, W)")
    check_shape("classes", classes, (len(scores),), "to match scores")
    check_integer("classes", classes)
    height, width = scores.shape[1:]
    if scores.numel() == 0:
        empty = torch.zeros(0, height, width, dtype=torch.bool, device=scores.device)
        return Instances(empty, classes[:0], scores.new_zeros(0))
    strongest, winner = scores.max(0)
    winner = torch.where(strongest > threshold, winner + 1, 0)
    component = connected_components(winner)
    n = int(component.max())
    flat, inside = component.flatten(), (component > 0).flatten()
    owner = torch.zeros(n + 1, dtype=torch.int64, device=scores.device)
    owner[flat] = winner.flatten()
    order = owner[1:].argsort(stable=True) + 1
    area = torch.bincount(flat[inside], minlength=n + 1)
    peak = scores.new_zeros(n + 1).scatter_reduce(0, flat[inside], strongest.flatten()[inside], "amax")
    score = torch.where(area < min_area * height * width, 0.0, peak)
    return Instances(component == order[:, None, None], classes[owner[order] - 1], score[order])


def _shifted(field: Tensor, dy: int, dx: int) -> Tensor:
    """The field at (y + dy, x + dx), the last row and column repeated."""
    return F.pad(field, (0, dx, 0, dy), mode="replicate")[..., dy:, dx:]


def _grid(h: int, w: int, like: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.arange(h, dtype=like.dtype, device=like.device)[:, None].expand(h, w)
    x = torch.arange(w, dtype=like.dtype, device=like.device).expand(h, w)
    return y, x


def _merge(nodes: int, a: Tensor, b: Tensor) -> Tensor:
    """The least node of each node's component in the graph with edges (a, b)."""
    root = torch.arange(nodes, device=a.device)
    while True:
        ra, rb = root[a], root[b]
        merged = root.scatter_reduce(0, torch.maximum(ra, rb), torch.minimum(ra, rb), "amin")
        while not torch.equal(jumped := merged[merged], merged):
            merged = jumped
        if torch.equal(merged, root):
            return root
        root = merged


def _one_hot(labels: Tensor) -> Tensor:
    """(h, w) labels to (n, h, w) masks of the labels that occur, in increasing order."""
    return labels == labels.unique()[:, None, None]
