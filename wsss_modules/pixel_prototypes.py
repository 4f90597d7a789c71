"""Prototypes of the classes in a batch, from the pixels whose class maps are most confident (PPC).

Axes: B images, K foreground classes, D feature channels, H W cells, P = B H W pixels, k pixels a prototype.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules._precision import at_least_float32
from wsss_modules._unit import unit
from wsss_modules.cam import cam_to_mask, minmax_cam

__all__ = [
    "PrototypeEstimate",
    "cam_pseudo_labels",
    "draw_half_of_each_class",
    "estimate_prototypes",
    "rank_in_class",
]


@torch.no_grad()
def cam_pseudo_labels(cam: Tensor, labels: Tensor, background: float = 0.2) -> Tensor:
    """Label each pixel with its strongest present class, or with background where none exceeds a constant.

    Args:
        cam: (B, K, H, W) floating point class maps, any range; each is stretched by `minmax_cam` without clamp.
        labels: (B, K) multi-hot; absent classes can't win.
        background: Score of the background: 0.2 in the SEAM-based PPC, 0.1 in the EPS-based.

    Returns:
        mask (B, H, W) int64, 0 background or a class. Ties are background, else the first class.

    Raises:
        TypeError: ``cam`` is not floating point.
        ValueError: a wrong shape.

    Paper:
        Du, Fu, Liu and Wang, Weakly Supervised Semantic Segmentation by Pixel-to-Prototype Contrast, CVPR 2022,
        arXiv:2110.07110.

    Example:
        >>> cam = torch.tensor([[[[0.0, 1.0, 4.0]], [[5.0, 5.0, 0.0]]]])
        >>> cam_pseudo_labels(cam, torch.tensor([[1, 0]])), cam_pseudo_labels(cam, torch.tensor([[1, 1]]))
        (tensor([[[0, 1, 1]]]), tensor([[[2, 2, 1]]]))
    """
    check_ndim("cam", cam, 4, "(B, K, H, W)")
    check_floating("cam", cam)
    return cam_to_mask(minmax_cam(at_least_float32(cam), clamp=False), background, labels=labels)


class PrototypeEstimate(NamedTuple):
    """What `estimate_prototypes` returns.

    Attributes:
        prototypes: (1 + K, D) of length 1, background first; zeros for one that is not valid.
        pixels: (1 + K, k) int64 pixels that each is made of, counted over images, rows and columns.
        valid: (1 + K,) bool, whether there was any pixel to take. All are without ``labels``.
    """

    prototypes: Tensor
    pixels: Tensor
    valid: Tensor


@torch.no_grad()
def estimate_prototypes(
    features: Tensor,
    cam: Tensor,
    k: int,
    *,
    labels: Tensor | None = None,
    background: Literal["constant", "low_foreground"] = "constant",
    pixels: Tensor | None = None,
) -> PrototypeEstimate:
    r"""Mean feature of the most confident pixels of each class over the batch, weighted by their activation.

    .. math:: p_c = u\Big( \frac{\sum_{i \in T_c} a_{ci} f_i}{\sum_{i \in T_c} a_{ci}} \Big), \qquad u(x) = x / \|x\|

    with a the maps stretched by `minmax_cam` without clamp and :math:`T_c` the k pixels of the largest :math:`a_c`,
    those of all images together.

    Args:
        features: (B, D, H, W) floating point.
        cam: (B, K, H, W) floating point class maps on the same grid, any range.
        k: Pixels a prototype, at least 1; all there are if there are fewer.
        labels: (B, K) multi-hot. If given, a class has pixels only in images that show it, and the background is judged
            by present classes only; by default, as released, all images count for all classes.
        background: What the background is most confident of. "constant": nothing, its map is one constant, so that the
            pixels taken are an arbitrary tie, here the first ones of the batch; "low_foreground": the pixels where the
            strongest class is weakest.
        pixels: (1 + K, k) the pixels to take instead of searching for them.

    Returns:
        `PrototypeEstimate`, without gradient, in the dtype of ``features``.

    Raises:
        TypeError: ``features`` or ``cam`` is not floating point, or ``pixels`` does not hold integers.
        ValueError: a wrong shape, ``k`` below 1, or an unknown ``background``.

    Paper:
        Du et al., CVPR 2022, arXiv:2110.07110, section 3.2.

    Differences:
        Equal activations: the first pixel comes first, whatever the device; in the released code they are arbitrary.
        They matter for the background, and for a class whose map is constant, whose prototype is the plain mean of k
        pixels that mean nothing; with ``labels`` and "low_foreground" neither occurs. Where activations sum to 0 the
        released code gives NaN, here they count equally.

    Notes:
        Under DDP gather features, maps and labels first, or use ``sync`` of `wsss_losses.PixelToPrototypeContrastLoss`.
        Half precision is averaged in float32. Compiles with ``fullgraph=True``.

    Example:
        >>> features = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]], [[0.0, 2.0, 2.0, 2.0]]]])
        >>> cam = torch.tensor([[[[8.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 9.0]]]])
        >>> estimate = estimate_prototypes(features, cam, k=1)
        >>> estimate.prototypes, estimate.pixels.flatten()
        (tensor([[1., 0.],
                [1., 0.],
                [0., 1.]]), tensor([0, 0, 3]))
    """
    check_ndim("cam", cam, 4, "(B, K, H, W)")
    check_floating("cam", cam)
    check_ndim("features", features, 4, "(B, D, H, W)")
    check_floating("features", features)
    check_shape("features", features, (cam.shape[0], None, *cam.shape[2:]), "to match cam")
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    if background not in ("constant", "low_foreground"):
        raise ValueError(f'background: expected "constant" or "low_foreground", got {background!r}')
    activation = minmax_cam(at_least_float32(cam), clamp=False)
    if labels is not None:
        check_shape("labels", labels, cam.shape[:2], "to match cam")
        activation = torch.where((labels > 0)[:, :, None, None], activation, -torch.inf)
    lowest = activation.new_ones(cam.shape[0], 1, *cam.shape[2:])
    if background == "low_foreground" and cam.shape[1] > 0:
        lowest = 1 - activation.amax(1, keepdim=True).clamp(0, 1)
    rows = rearrange(torch.cat([lowest, activation], 1), "b c h w -> c (b h w)")  # (1 + K, P)
    if pixels is None:
        pixels = rows.sort(dim=1, descending=True, stable=True).indices[:, :k]
    else:
        check_integer("pixels", pixels)
        check_shape("pixels", pixels, (len(rows), None), "for classes and background")
    weight = rows.gather(1, pixels)  # (1 + K, k)
    taken = weight > -torch.inf
    valid = taken.any(1)
    total = torch.where(taken, weight, 0.0).sum(1, keepdim=True)
    weight = torch.where(taken, torch.where(total != 0, weight / total, 1.0), 0.0)
    vectors = rearrange(at_least_float32(features), "b d h w -> (b h w) d")
    with torch.autocast(features.device.type, enabled=False):
        mean = torch.einsum("ck,ckd->cd", weight.to(vectors.dtype), vectors[pixels])
    prototypes = torch.where(valid[:, None], unit(mean), 0.0)
    return PrototypeEstimate(prototypes.to(features.dtype), pixels, valid)


@torch.no_grad()
def rank_in_class(classes: Tensor, values: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Rank of each pixel, by ascending value, among those of its class, and the number of these.

    Args:
        classes: (P,) int64 in 0..C-1.
        values: (P,) floating point. Of equal ones the first pixel comes first.
        num_classes: C, classes.

    Returns:
        Two int64 tensors (P,): the ranks from 0, and the number of pixels in the class of each pixel.

    Raises:
        ValueError: a wrong shape.

    Notes:
        Two sorts, no loop over classes and no host synchronisation. Compiles with ``fullgraph=True``.

    Example:
        >>> rank_in_class(torch.tensor([1, 0, 1, 1]), torch.tensor([0.3, 0.5, 0.1, 0.2]), 2)
        (tensor([2, 0, 0, 1]), tensor([3, 1, 3, 3]))
    """
    check_ndim("classes", classes, 1, "(P,)")
    check_shape("values", values, classes.shape, "to match classes")
    order = values.argsort(stable=True)
    order = order[classes[order].argsort(stable=True)]  # by class, then by value
    counts = (classes[:, None] == torch.arange(num_classes, device=classes.device)).sum(0)  # (C,)
    first = (counts.cumsum(0) - counts)[classes[order]]
    position = torch.arange(len(classes), device=classes.device) - first
    return torch.empty_like(position).scatter(0, order, position), counts[classes]


@torch.no_grad()
def draw_half_of_each_class(
    classes: Tensor, num_classes: int, *, lots: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Draw n // 2 of the n pixels of each class, without replacement.

    Args:
        classes: (B, H, W) int64 in 0..C-1; a class is drawn from over all images together.
        num_classes: C, classes.
        lots: (B, H, W) floating point, the numbers that decide, such as those of all processes of a distributed run;
            the lowest are drawn. Uniform random ones by default.
        generator: Source of these, on the device of ``classes``.

    Returns:
        (B, H, W) bool, True for the pixels drawn.

    Raises:
        TypeError: ``classes`` does not hold integers.
        ValueError: a wrong shape.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> draw_half_of_each_class(torch.tensor([[[0, 0, 0, 1, 1]]]), 2, generator=generator).sum()
        tensor(2)
    """
    check_ndim("classes", classes, 3, "(B, H, W)")
    check_integer("classes", classes)
    if lots is None:
        lots = torch.rand(classes.shape, generator=generator, device=classes.device)
    check_shape("lots", lots, classes.shape, "to match classes")
    rank, count = rank_in_class(classes.flatten(), lots.flatten(), num_classes)
    return (rank < count // 2).view(classes.shape)
