"""Class activation maps: the head that makes them, normalisation, merging over scales and flips, and maps to masks.

Axes: B images, K foreground classes, D feature channels, H W pixels, M (image, present class) pairs of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules._precision import at_least_float32

__all__ = [
    "CAMHead",
    "CAMOutput",
    "PresentCAM",
    "background_score",
    "cam_to_mask",
    "merge_flip",
    "minmax_cam",
    "multi_scale_cam",
    "normalize_cam",
    "select_present",
]


def normalize_cam(cam: Tensor, eps: float = 1e-5, *, subtract_min: bool = False) -> Tensor:
    r"""Divide every map by its own spatial maximum.

    .. math:: \hat a_k = a_k / (\max_{hw} a_k + \epsilon)

    with :math:`a_k - \min_{hw} a_k` in place of :math:`a_k` if ``subtract_min``.

    Args:
        cam: (..., H, W) floating point, at least 0 (apply ReLU first). A map of zeros stays zero, also with ``eps=0``;
            one that is negative everywhere is returned as it is.
        eps: Added to the maximum: 1e-5 in PSA, IRN, ReCAM, SIPE; 1e-8 in MCTformer and NSROM (with ``subtract_min``).
        subtract_min: Stretch to the full range [0, 1) (AFA, NSROM, MCTformer). A constant map becomes zero.

    Returns:
        (..., H, W) in [0, 1), in the dtype of ``cam``. Gradients flow through the maximum as well.

    Raises:
        TypeError: ``cam`` is not floating point.
        ValueError: ``cam`` has fewer than two axes.

    Paper:
        Ahn and Kwak, Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly Supervised Semantic
        Segmentation, CVPR 2018, arXiv:1803.10464, section 3.1.

    Notes:
        Half precision is normalised in float32: 1e-5 is below the normal range of float16.

    Example:
        >>> normalize_cam(torch.tensor([[[0.0, 1.0], [2.0, 4.0]]]), eps=0)
        tensor([[[0.0000, 0.2500],
                 [0.5000, 1.0000]]])
    """
    check_floating("cam", cam)
    if cam.ndim < 2:
        raise ValueError(f"cam: expected shape (..., H, W), got {tuple(cam.shape)}")
    if cam.numel() == 0:
        return cam
    values = at_least_float32(cam)
    if subtract_min:
        values = values - values.amin((-2, -1), keepdim=True)
    scale = values.amax((-2, -1), keepdim=True) + eps
    return (values / torch.where(scale > 0, scale, 1.0)).to(cam.dtype)


def minmax_cam(cam: Tensor, eps: float = 1e-5, *, clamp: bool = True) -> Tensor:
    r"""Rectify every map and stretch it to the full range.

    .. math:: \hat a_k = \frac{r(r(a_k) - \min_{hw} r(a_k) - \epsilon)}{\max_{hw} r(a_k) - \min_{hw} r(a_k) + \epsilon}

    with r = ReLU.

    Args:
        cam: (..., H, W) floating point, signed.
        eps: Subtracted above and added below; a map whose range is within it becomes zero, also one that is constant.
        clamp: Apply the outer ReLU. Without it a value within ``eps`` of the minimum is taken for 0 and comes out
            negative: a map of zeros becomes -1 everywhere and loses against any background (PPC).

    Returns:
        (..., H, W) in [0, 1), in the dtype of ``cam``; the maximum of a map rounds to 1 where its range is far above
        ``eps``. Gradients flow through minimum and maximum as well. Below 0 without ``clamp``.

    Raises:
        TypeError: ``cam`` is not floating point.
        ValueError: ``cam`` has fewer than two axes.

    Paper:
        As in the released code of AEFT (Yoon et al., ECCV 2022) and PPC (Du et al., CVPR 2022, arXiv:2110.07110).

    Notes:
        `normalize_cam` with ``subtract_min`` has no ``eps`` above, so that only the minimum itself becomes zero. Half
        precision is normalised in float32.

    Example:
        >>> minmax_cam(torch.tensor([[[-3.0, 0.0], [2.0, 4.0]]]))
        tensor([[[0.0000, 0.0000],
                 [0.5000, 1.0000]]])
    """
    check_floating("cam", cam)
    if cam.ndim < 2:
        raise ValueError(f"cam: expected shape (..., H, W), got {tuple(cam.shape)}")
    if cam.numel() == 0:
        return cam
    values = F.relu(at_least_float32(cam))
    low, high = values.amin((-2, -1), keepdim=True), values.amax((-2, -1), keepdim=True)
    if clamp:
        return (F.relu(values - low - eps) / (high - low + eps)).to(cam.dtype)
    values = torch.where(values < low + eps, 0.0, values)
    return ((values - low - eps) / (high - low + eps)).to(cam.dtype)


def background_score(cam: Tensor, alpha: float, labels: Tensor | None = None) -> Tensor:
    r"""Background score that falls where any class is active: :math:`(1 - \max_k a_k)^\alpha`.

    Args:
        cam: (B, K, H, W) in [0, 1], see `normalize_cam`. K may be 0.
        alpha: At least 0. Small values make a strong background (PSA: 4), large ones a weak background (24 or 32);
            16 before the random walk.
        labels: (B, K) multi-hot. If given, absent classes don't count; an image without a class is all background.

    Returns:
        (B, 1, H, W) in [0, 1], in the dtype of ``cam``; 1 where no class is present. Join it as
        ``scores = torch.cat([background_score(cam, 16), cam], 1)``.

    Raises:
        TypeError: ``cam`` is not floating point.
        ValueError: a wrong shape, or a negative ``alpha``.

    Paper:
        Ahn and Kwak, CVPR 2018, arXiv:1803.10464, eq. 2.

    Differences:
        The released code fails for an image without a class; here its score is 1.

    Example:
        >>> background_score(torch.tensor([[[[0.5]], [[0.9]]]]), 2, torch.tensor([[1, 0]]))
        tensor([[[[0.2500]]]])
    """
    check_ndim("cam", cam, 4, "(B, K, H, W)")
    check_floating("cam", cam)
    if alpha < 0:
        raise ValueError(f"alpha: expected at least 0, got {alpha}")
    if labels is not None:
        check_shape("labels", labels, cam.shape[:2], "to match cam")
        cam = torch.where(_present(labels)[:, :, None, None], cam, 0.0)
    if cam.shape[1] == 0:
        return cam.new_ones(cam.shape[0], 1, *cam.shape[2:])
    highest = at_least_float32(cam).amax(1, keepdim=True)
    return ((1 - highest).clamp(0, 1) ** alpha).to(cam.dtype)


def merge_flip(maps: Tensor, mirrored: Tensor, *, reduce: Literal["sum", "mean", "max"] = "sum") -> Tensor:
    """Merge the maps of an image with those of its mirror image, which are flipped back.

    Args:
        maps: (..., H, W) maps of the images.
        mirrored: (..., H, W) maps of the mirrored images, in the same order.
        reduce: "sum" (PSA, IRN), "mean" or "max" (AFA).

    Returns:
        (..., H, W).

    Raises:
        ValueError: shapes differ, or an unknown ``reduce``.

    Example:
        >>> merge_flip(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([[2., 0.]])
    """
    check_shape("mirrored", mirrored, maps.shape, "to match maps")
    back = mirrored.flip(-1)
    if reduce == "sum":
        return maps + back
    if reduce == "mean":
        return (maps + back) / 2
    if reduce == "max":
        return torch.maximum(maps, back)
    raise ValueError(f'reduce: expected "sum", "mean" or "max", got {reduce!r}')


class PresentCAM(NamedTuple):
    """Maps of the classes that are present, those of all images of a batch one after the other (M pairs).

    Attributes:
        cam: (M, H, W) maps on the requested grid.
        high_res: (M, H, W) maps at image size, or None if they were not asked for.
        keys: (M,) int64 class of each map, 1..K as in a mask.
        image: (M,) int64 index of each map's image in the batch, ascending.
    """

    cam: Tensor
    high_res: Tensor | None
    keys: Tensor
    image: Tensor

    def full(self, batch: int, num_classes: int) -> Tensor:
        """Put ``cam`` back among all classes, absent ones zero: (batch, num_classes, H, W)."""
        full = self.cam.new_zeros(batch, num_classes, *self.cam.shape[1:])
        full[self.image, self.keys - 1] = self.cam
        return full

    def of_image(self, index: int) -> PresentCAM:
        """The maps of one image of the batch."""
        mine = self.image == index
        return PresentCAM(
            self.cam[mine], None if self.high_res is None else self.high_res[mine], self.keys[mine], self.image[mine]
        )


def select_present(cam: Tensor, labels: Tensor) -> PresentCAM:
    """Keep the maps of the present classes.

    Args:
        cam: (B, K, H, W).
        labels: (B, K) multi-hot; present means greater than 0.

    Returns:
        `PresentCAM` with M = number of present pairs and no ``high_res``; ``.full(B, K)`` is the way back.

    Raises:
        ValueError: a wrong shape.

    Notes:
        M depends on the data, so this breaks the graph of ``torch.compile`` and waits for the device once.

    Example:
        >>> select_present(torch.rand(2, 3, 4, 4), torch.tensor([[1, 0, 1], [0, 1, 0]])).keys
        tensor([1, 3, 2])
    """
    check_ndim("cam", cam, 4, "(B, K, H, W)")
    check_shape("labels", labels, cam.shape[:2], "to match cam")
    image, index = _present(labels).nonzero(as_tuple=True)
    return PresentCAM(cam[image, index], None, index + 1, image)


def multi_scale_cam(
    maps: Sequence[Tensor],
    labels: Tensor,
    size: tuple[int, int],
    *,
    mirrored: Sequence[bool] | None = None,
    stride: int = 1,
    round_to: int | None = None,
    relu: bool | Literal["sum"] = False,
    eps: float = 1e-5,
    subtract_min: bool = False,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
) -> PresentCAM:
    """Sum the maps of one image at several scales, up-sampled to a common grid, and normalise each class.

    Only the maps of present classes are up-sampled, which is the same and, on VOC, about 13 times less work.

    PSA: ``multi_scale_cam(maps, labels, size, mirrored=[False, True] * 4)`` gives ``cam`` at image size.
    IRN: ``multi_scale_cam(maps, labels, size, stride=4, round_to=16)`` gives ``cam`` at stride 4, for the random walk,
    and ``high_res`` at image size, for labels; its maps were merged with `merge_flip` before.
    OC-CSE and AEFT: as PSA, of maps that may be negative, with ``relu=True``.
    L2G: as PSA, with ``relu="sum", interpolation="bicubic", eps=1e-8``.

    Args:
        maps: One (B, K, h_i, w_i) tensor per scale (and flip), at least 0 unless ``relu``.
        labels: (B, K) multi-hot.
        size: (H, W) of the images in pixels; the same for all images of the batch.
        mirrored: For each of ``maps`` whether it belongs to the mirrored images and must be flipped back.
        stride: ``cam`` lies on a grid of ceil(H / stride) by ceil(W / stride).
        round_to: Also give ``high_res``: up-sampled to the next multiple of ``round_to``, which keeps the cells aligned
            with a network of that stride, then cut to ``size``. Its maximum is taken after the cut.
        relu: Apply ReLU to each map between the up-sampling and the sum, or, with "sum", to their sum.
        eps: See `normalize_cam`.
        subtract_min: See `normalize_cam`.
        interpolation: "bilinear" or "bicubic", whose overshoots stay in the sum unless ``relu``.

    Returns:
        `PresentCAM`: maps in [0, 1), (M, H, W) over all present (image, class) pairs.

    Raises:
        ValueError: no map, a wrong shape, or an unknown option.

    Paper:
        Ahn and Kwak, CVPR 2018, arXiv:1803.10464; Ahn, Cho and Kwak, Weakly Supervised Learning of Instance
        Segmentation with Inter-pixel Relations, CVPR 2019, arXiv:1904.05044.

    Notes:
        Half-pixel centres (``align_corners=False``). A mean would be the same but for ``eps``. Breaks the graph, see
        `select_present`.

    Example:
        >>> labels = torch.tensor([[0, 1, 1]])
        >>> maps = [torch.rand(1, 3, 5, 7), torch.rand(1, 3, 3, 4)]
        >>> out = multi_scale_cam(maps, labels, (38, 55), stride=4, round_to=16)
        >>> out.cam.shape, out.high_res.shape, out.keys
        (torch.Size([2, 10, 14]), torch.Size([2, 38, 55]), tensor([2, 3]))
    """
    if not maps:
        raise ValueError("maps: expected at least one tensor (B, K, h, w), got none")
    flags = [False] * len(maps) if mirrored is None else list(mirrored)
    if len(flags) != len(maps):
        raise ValueError(f"mirrored: expected one flag for each of the {len(maps)} maps, got {len(flags)}")
    check_ndim("labels", labels, 2, "(B, K)")
    if relu not in (False, True, "sum"):
        raise ValueError(f'relu: expected True, False or "sum", got {relu!r}')
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f'interpolation: expected "bilinear" or "bicubic", got {interpolation!r}')
    if stride < 1 or (round_to is not None and round_to < 1):
        raise ValueError(f"stride, round_to: expected at least 1, got {stride} and {round_to}")
    image, index = _present(labels).nonzero(as_tuple=True)
    grid = (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    fine = None if round_to is None else (_round_up(size[0], round_to), _round_up(size[1], round_to))
    cam: Tensor | None = None
    high: Tensor | None = None
    for i, (scale, flip) in enumerate(zip(maps, flags, strict=True)):
        check_shape(f"maps[{i}]", scale, (*labels.shape, None, None), "to match labels")
        check_floating(f"maps[{i}]", scale)
        present = at_least_float32(scale[image, index])  # (M, h, w)
        present = present.flip(-1) if flip else present
        cam = _add(cam, _resize(present, grid, interpolation, relu is True))
        if fine is not None:
            high = _add(high, _resize(present, fine, interpolation, relu is True)[:, : size[0], : size[1]])
    assert cam is not None  # for mypy: maps is not empty
    if relu == "sum":
        cam, high = F.relu(cam), None if high is None else F.relu(high)
    cam = normalize_cam(cam, eps, subtract_min=subtract_min).to(maps[0].dtype)
    if high is not None:
        high = normalize_cam(high, eps, subtract_min=subtract_min).to(maps[0].dtype)
    return PresentCAM(cam, high, index + 1, image)


def cam_to_mask(
    cam: Tensor, threshold: float | Tensor, *, labels: Tensor | None = None, keys: Tensor | None = None
) -> Tensor:
    """Label each pixel with its strongest class, or with background where no class exceeds the threshold.

    Args:
        cam: (B, K, H, W), usually in [0, 1]. K may be 0. NaN counts as background.
        threshold: Background score: a number, or (B, 1, H, W) such as `background_score` gives. Ties are background.
        labels: (B, K) multi-hot. If given, absent classes can't win.
        keys: (K,) int64 class of each channel, 1..K as in a mask; default: channel k is class k + 1.

    Returns:
        mask (B, H, W) int64: 0 background or a class. The first of several equal classes wins.

    Raises:
        ValueError: a wrong shape.

    Example:
        >>> cam = torch.tensor([[[[0.1, 0.9]], [[0.2, 0.6]]]])
        >>> cam_to_mask(cam, 0.15), cam_to_mask(cam, 0.15, keys=torch.tensor([3, 7]))
        (tensor([[[2, 1]]]), tensor([[[7, 3]]]))
    """
    check_ndim("cam", cam, 4, "(B, K, H, W)")
    batch, channels, height, width = cam.shape
    if labels is not None:
        check_shape("labels", labels, (batch, channels), "to match cam")
        cam = torch.where(_present(labels)[:, :, None, None], cam, float("-inf"))
    if keys is not None:
        check_shape("keys", keys, (channels,), "to match cam")
        check_integer("keys", keys)
    if isinstance(threshold, Tensor) and threshold.ndim > 0:
        check_shape("threshold", threshold, (batch, 1, height, width), "to match cam")
        threshold = threshold[:, 0]
    if channels == 0:
        return torch.zeros(batch, height, width, dtype=torch.int64, device=cam.device)
    strongest, index = cam.max(1)
    classes = index + 1 if keys is None else keys[index]
    return torch.where(strongest > threshold, classes, 0)


class CAMOutput(NamedTuple):
    """What `CAMHead` returns.

    Attributes:
        logits: (B, K) class scores of the image.
        cam: (B, K, H, W) class activation maps, at least 0.
    """

    logits: Tensor
    cam: Tensor


class CAMHead(nn.Module):
    r"""Image classifier without bias whose weights, applied at each pixel, are the class activation maps.

    With features x and weights w: ``logits = w . mean_hw(dropout(x))`` and ``cam = relu(w . x)``, optionally its square
    root. Dropout never touches the maps. With ``pool="max"`` the largest value of each channel takes the place of the
    mean (AFA, whose maps are signed: `class_maps`).

    Args:
        in_channels: D, channels of the features.
        num_classes: K, foreground classes.
        mode: "gap_then_conv" averages the features and then classifies (ResNet-38, ResNet-50); "conv_then_gap"
            classifies each pixel and then averages (VGG-16). Equal but for rounding.
        sqrt: Compress the maps with a square root (VGG-16 of PSA).
        dropout: Probability with which a channel is dropped in training (PSA: 0.5; IRN: 0).
        pool: "mean" or "max" over the pixels: of the features, or of the class scores with "conv_then_gap".

    Shapes:
        features (B, D, H, W) -> `CAMOutput` with logits (B, K) and cam (B, K, H, W).

    Raises:
        ValueError: an unknown ``mode`` or ``pool``, or features without D channels.

    Paper:
        Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016, arXiv:1512.04150; as in Ahn and
        Kwak, CVPR 2018, arXiv:1803.10464.

    Notes:
        Weights start Xavier uniform as in PSA; IRN keeps torch's default: call ``head.classifier.reset_parameters()``.
        Compiles with ``fullgraph=True``. Train with ``F.multilabel_soft_margin_loss(out.logits, labels)``.

    Example:
        >>> head = CAMHead(16, num_classes=20)
        >>> out = head(torch.rand(2, 16, 5, 7))
        >>> out.logits.shape, out.cam.shape
        (torch.Size([2, 20]), torch.Size([2, 20, 5, 7]))
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        mode: Literal["gap_then_conv", "conv_then_gap"] = "gap_then_conv",
        sqrt: bool = False,
        dropout: float = 0.0,
        pool: Literal["mean", "max"] = "mean",
    ) -> None:
        super().__init__()
        if pool not in ("mean", "max"):
            raise ValueError(f'pool: expected "mean" or "max", got {pool!r}')
        if mode not in ("gap_then_conv", "conv_then_gap"):
            raise ValueError(f'mode: expected "gap_then_conv" or "conv_then_gap", got {mode!r}')
        self.mode = mode
        self.sqrt = sqrt
        self.pool = pool
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(in_channels, num_classes, 1, bias=False)
        nn.init.xavier_uniform_(self.classifier.weight)

    def forward(self, features: Tensor) -> CAMOutput:
        """Classify the images and map the classes, see the class."""
        check_shape("features", features, (None, self.classifier.in_channels, None, None), "for this head")
        maps = self.class_maps(features)
        if self.mode == "gap_then_conv":
            pooled = self._pooled(self.dropout(features))
            logits = rearrange(self.classifier(pooled), "b k 1 1 -> b k")
        elif self.training and self.dropout.p > 0:
            logits = self._pooled(self.classifier(self.dropout(features))).flatten(1)
        else:
            logits = self._pooled(maps).flatten(1)
        cam = F.relu(maps)
        if self.sqrt:  # selected before the root, whose slope at 0 is infinite
            cam = torch.where(cam > 0, torch.where(cam > 0, cam, 1.0).sqrt(), 0.0)
        return CAMOutput(logits, cam)

    def class_maps(self, features: Tensor) -> Tensor:
        """Signed class scores of each pixel, (B, K, H, W): the maps before ReLU."""
        return self.classifier(features)

    def _pooled(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True) if self.pool == "mean" else F.adaptive_max_pool2d(x, 1)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"mode={self.mode!r}, sqrt={self.sqrt}, pool={self.pool!r}"


def _present(labels: Tensor) -> Tensor:
    return labels if labels.dtype == torch.bool else labels > 0


def _round_up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


def _resize(maps: Tensor, size: tuple[int, int], interpolation: str, relu: bool) -> Tensor:
    resized = F.interpolate(maps[:, None], size, mode=interpolation, align_corners=False)[:, 0]
    return F.relu(resized) if relu else resized


def _add(total: Tensor | None, item: Tensor) -> Tensor:
    return item if total is None else total + item
