"""C2AM: a map that splits each image into two regions without any label, and what its foreground is good for.

Axes: B images, D feature channels, H W pixels or cells, K foreground classes, N M rows to compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32
from wsss_modules.cam import cam_to_mask, multi_scale_cam

__all__ = [
    "BorderPolarity",
    "ClassAgnosticMaps",
    "DisentangledFeatures",
    "Disentangler",
    "Polarity",
    "RegionFeatures",
    "activation_polarity",
    "merge_class_agnostic_maps",
    "pairwise_cosine_similarity",
    "pool_two_regions",
    "refine_cam_with_background_cue",
    "threshold_cue",
]

_LEAST_NORM = 1e-12


class RegionFeatures(NamedTuple):
    """What `pool_two_regions` returns: (B, D) features of the region of the map, ``fg``, and of the rest, ``bg``."""

    fg: Tensor
    bg: Tensor


def pool_two_regions(features: Tensor, activation: Tensor) -> RegionFeatures:
    r"""Average the features of each image under a map and under its complement.

    .. math:: fg = \frac{1}{HW} \sum_{hw} p_{hw} x_{hw}, \qquad bg = \frac{1}{HW} \sum_{hw} (1 - p_{hw}) x_{hw}

    so that fg + bg is the global average of the features. Neither is divided by the area of its region: cosines, which
    is what C2AM takes of them, don't see it.

    Args:
        features: (B, D, H, W) float.
        activation: (B, 1, H, W) float p, usually in [0, 1].

    Returns:
        `RegionFeatures`, (B, D) each, in the dtype of ``features``.

    Raises:
        TypeError: either is not floating point.
        ValueError: a wrong shape, or maps without a cell.

    Paper:
        Xie et al., C2AM: Contrastive Learning of Class-Agnostic Activation Map for Weakly Supervised Object
        Localization and Semantic Segmentation, CVPR 2022, arXiv:2203.13505.

    Notes:
        One batched product with the rows p and 1 - p reads the features once and copies nothing, where the released
        code makes a transposed copy of them (1.2 GB for 128 crops of 448 pixels and 3,072 channels) for each of two
        products. Computed in float32 for half precision, also under autocast. Compiles with ``fullgraph=True``.

    Example:
        >>> features = torch.tensor([[[[2.0, 4.0, 8.0, 16.0]]]])
        >>> pool_two_regions(features, torch.tensor([[[[1.0, 0.5, 0.0, 0.0]]]]))
        RegionFeatures(fg=tensor([[1.]]), bg=tensor([[6.5000]]))
    """
    check_ndim("features", features, 4, "(B, D, H, W)")
    check_floating("features", features)
    batch, _, height, width = features.shape
    check_shape("activation", activation, (batch, 1, height, width), "to match features")
    check_floating("activation", activation)
    if height * width == 0:
        raise ValueError(f"features: expected at least one cell, got shape {tuple(features.shape)}")
    with torch.autocast(features.device.type, enabled=False):
        dtype = torch.promote_types(features.dtype, torch.float32)
        p = activation.to(dtype).flatten(2)  # (B, 1, H * W)
        regions = torch.cat([p, 1 - p], 1) / (height * width)  # (B, 2, H * W)
        pooled = features.to(dtype).flatten(2) @ regions.mT  # (B, D, 2)
    fg, bg = pooled.to(features.dtype).unbind(2)
    return RegionFeatures(fg, bg)


class DisentangledFeatures(NamedTuple):
    """What `Disentangler` returns.

    Attributes:
        fg: (B, D) features of the region of the map, see `pool_two_regions`. Which of the two regions is the
            foreground is not known before training, see `activation_polarity`.
        bg: (B, D) features of the rest.
        logits: (B, 1, H, W) the map before the sigmoid: what is merged at test time.
        probability: (B, 1, H, W) in [0, 1].
    """

    fg: Tensor
    bg: Tensor
    logits: Tensor
    probability: Tensor


class Disentangler(nn.Module):
    r"""Split each image into two soft regions by one learnt map, and pool the features of both.

    With features x: ``logits = batch_norm(conv3x3(x))``, ``probability = sigmoid(logits)``; see `pool_two_regions` for
    the rest. Nothing is detached: `wsss_losses.C2AMLoss` of ``fg`` and ``bg`` trains the backbone as well.

    Args:
        in_channels: D, channels of the features. The released network joins the last two levels of a ResNet-50 at
            stride 16: 2048 + 1024.

    Shapes:
        features (B, D, H, W), at least 0 as after a ReLU: cosines of features of mixed sign fall below the clamp of
        the losses, where they have no gradient. Returns `DisentangledFeatures`.

    Raises:
        ValueError: features without D channels.

    Paper:
        Xie et al., CVPR 2022, arXiv:2203.13505.

    Differences:
        The released head returns either the probability or, for inference, the logits, and then pools with these too,
        which means nothing. This one always returns both maps and pools with the probability.

    Notes:
        The batch norm centres the one map over the batch (of its process), so that the training can't start with all
        images in one region. Parameters have the released names. Compiles with ``fullgraph=True``.

    Example:
        >>> head = Disentangler(16)
        >>> out = head(torch.rand(4, 16, 7, 7))
        >>> out.fg.shape, out.probability.shape
        (torch.Size([4, 16]), torch.Size([4, 1, 7, 7]))
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.activation_head = nn.Conv2d(in_channels, 1, 3, padding=1, bias=False)
        self.bn_head = nn.BatchNorm2d(1)

    def forward(self, features: Tensor) -> DisentangledFeatures:
        """Map and pool, see the class."""
        check_shape("features", features, (None, self.activation_head.in_channels, None, None), "for this head")
        logits = self.bn_head(self.activation_head(features))
        probability = torch.sigmoid(logits)
        return DisentangledFeatures(*pool_two_regions(features, probability), logits, probability)


class Polarity(NamedTuple):
    """Which of the two regions is the background, see `activation_polarity`.

    Attributes:
        inverted: () bool, true if the map fires on the background.
        border: () mean of the map at the border of the images; how far it is from 1/2 says how sure ``inverted`` is.
    """

    inverted: Tensor
    border: Tensor


def activation_polarity(probability: Tensor, *, border: int = 4) -> Polarity:
    """Tell from the borders of the images whether a class-agnostic map fires on the foreground or on the background.

    Photographers leave background at the border. The mean of four means, of the first and last rows and of the first
    and last columns, over all images: above 1/2, the map is that of the background. (Corners count twice.)

    Args:
        probability: (B, 1, H, W) in [0, 1], such as `Disentangler` gives. The more images the better: all share one
            polarity, since one head made them. `BorderPolarity` averages over batches.
        border: Width in cells; where a map has fewer than twice as many, opposite borders overlap.

    Returns:
        `Polarity`, on the device of ``probability``, ``border`` in float32 at least.

    Raises:
        TypeError: ``probability`` is not floating point.
        ValueError: a wrong shape, no map or an empty one, or a ``border`` below 1.

    Paper:
        Xie et al., CVPR 2022, arXiv:2203.13505.

    Differences:
        The released code looks once, at the last batch of the first epoch, which may hold few images.

    Example:
        >>> middle = torch.zeros(1, 1, 12, 12)
        >>> middle[..., 4:8, 4:8] = 1
        >>> activation_polarity(middle)
        Polarity(inverted=tensor(False), border=tensor(0.))
        >>> activation_polarity(1 - middle)
        Polarity(inverted=tensor(True), border=tensor(1.))
    """
    check_shape("probability", probability, (None, 1, None, None), "(B, 1, H, W)")
    check_floating("probability", probability)
    if probability.numel() == 0:
        raise ValueError(f"probability: expected at least one map with a cell, got shape {tuple(probability.shape)}")
    _check_border(border)
    p = at_least_float32(probability)
    sides = (p[..., :border, :], p[..., -border:, :], p[..., :border], p[..., -border:])
    mean = torch.stack([side.mean() for side in sides]).mean()
    return Polarity(mean > 0.5, mean)


class BorderPolarity(nn.Module):
    """The polarity of a class-agnostic map, averaged over all images it is shown; see :func:`activation_polarity`.

    What it has seen are buffers, so that the polarity is stored with the weights of the network that it is part of.

    Args:
        border: Width in cells.

    Raises:
        ValueError: a ``border`` below 1.

    Notes:
        In a distributed run each process counts the images it is shown; ``DistributedDataParallel`` and a checkpoint
        written by the first process keep what that one has seen.

    Example:
        >>> polarity = BorderPolarity()
        >>> for _ in range(3):
        ...     running = polarity(torch.full((8, 1, 14, 14), 0.75))
        >>> running.border, polarity.images
        (tensor(0.7500), tensor(24))
        >>> bool(polarity.polarity().inverted)
        True
    """

    border_mean: Tensor
    images: Tensor

    def __init__(self, *, border: int = 4) -> None:
        super().__init__()
        _check_border(border)
        self.border = border
        self.register_buffer("border_mean", torch.tensor(0.5))
        self.register_buffer("images", torch.tensor(0))

    @torch.no_grad()
    def forward(self, probability: Tensor) -> Polarity:
        """Add the maps (B, 1, H, W) of a batch to the average; returns the polarity so far."""
        shown = activation_polarity(probability, border=self.border)
        self.images += len(probability)
        self.border_mean += (shown.border.to(self.border_mean) - self.border_mean) * (len(probability) / self.images)
        return self.polarity()

    def polarity(self) -> Polarity:
        """The polarity over all images seen: ``border`` 1/2 and not inverted before the first."""
        return Polarity(self.border_mean > 0.5, self.border_mean.clone())

    @torch.no_grad()
    def reset(self) -> None:
        """Forget what was seen."""
        self.border_mean.fill_(0.5)
        self.images.zero_()

    def extra_repr(self) -> str:
        """Show the options."""
        return f"border={self.border}"


class ClassAgnosticMaps(NamedTuple):
    """What `merge_class_agnostic_maps` returns, in [0, 1), each map with its maximum near 1.

    Attributes:
        cam: (B, 1, ceil(H / 4), ceil(W / 4)).
        high_res: (B, 1, H, W).
    """

    cam: Tensor
    high_res: Tensor


def merge_class_agnostic_maps(
    logits: Sequence[Tensor],
    size: tuple[int, int],
    *,
    inverted: bool,
    mirrored: Sequence[bool] | None = None,
    invert: Literal["one_minus", "negate"] = "one_minus",
    stride: int = 4,
    round_to: int = 16,
    eps: float = 1e-5,
) -> ClassAgnosticMaps:
    """Merge the foreground logits of several views of the same images into one foreground map each.

    Turned round if ``inverted``, cut off below 0, flipped back, resized, summed over the views, divided by the maximum.

    Args:
        logits: One (B, 1, h_i, w_i) tensor per view (scale, flip) of `DisentangledFeatures.logits`.
        size: (H, W) of the images in pixels.
        inverted: Whether the maps fire on the background: ``bool(activation_polarity(...).inverted)``.
        mirrored: For each of ``logits`` whether it belongs to the mirrored images and must be flipped back.
        invert: How maps that fire on the background are turned round, see Differences.
        stride: ``cam`` lies on a grid of ceil(H / stride) by ceil(W / stride).
        round_to: ``high_res`` is resized to multiples of this, then cut: see `multi_scale_cam`.
        eps: See `normalize_cam`.

    Returns:
        `ClassAgnosticMaps`. An image whose logits are all on the background side has a map of zeros; any other is
        stretched up to 1, however weak it is.

    Raises:
        TypeError: maps are not floating point.
        ValueError: no map, a wrong shape, or an unknown ``invert``.

    Paper:
        Xie et al., CVPR 2022, arXiv:2203.13505.

    Differences:
        The released code takes ``1 - logit``, which inverts a probability; that of a sigmoid's logit is ``-logit``. So
        with ``"one_minus"`` (released) a cell counts as foreground where its probability of background is below
        sigmoid(1) = 0.731 if the map is inverted, but where that of foreground is above 0.5 if it is not: the result
        depends on the polarity, which is a matter of chance. ``"negate"`` treats both alike.

    Notes:
        Bilinear, half-pixel centres (``align_corners=False``). Breaks the graph of ``torch.compile``, see
        `multi_scale_cam`.

    Example:
        >>> logits = torch.tensor([[[[-2.0, -1.0, 3.0]]]])
        >>> merge_class_agnostic_maps([logits], (1, 3), inverted=False, round_to=1).high_res
        tensor([[[[0.0000, 0.0000, 1.0000]]]])
        >>> merge_class_agnostic_maps([logits], (1, 3), inverted=True, round_to=1, invert="negate").high_res
        tensor([[[[1.0000, 0.5000, 0.0000]]]])
    """
    if invert not in ("one_minus", "negate"):
        raise ValueError(f'invert: expected "one_minus" or "negate", got {invert!r}')
    if not logits:
        raise ValueError("logits: expected at least one tensor (B, 1, h, w), got none")
    for i, view in enumerate(logits):
        check_shape(f"logits[{i}]", view, (len(logits[0]), 1, None, None), "(B, 1, h, w)")
    turned = logits if not inverted else [1 - view if invert == "one_minus" else -view for view in logits]
    maps = [F.relu(view) for view in turned]
    everyone = torch.ones(len(maps[0]), 1, dtype=torch.bool, device=maps[0].device)
    merged = multi_scale_cam(maps, everyone, size, mirrored=mirrored, stride=stride, round_to=round_to, eps=eps)
    assert merged.high_res is not None  # for mypy: round_to was given
    return ClassAgnosticMaps(merged.cam[:, None], merged.high_res[:, None])


def threshold_cue(cam: Tensor, threshold: float = 0.3) -> Tensor:
    """Foreground where a class-agnostic map exceeds a threshold: what the dense CRF then refines to a background cue.

    Args:
        cam: (B, 1, H, W) foreground map in [0, 1], see `merge_class_agnostic_maps`.
        threshold: Ties are background.

    Returns:
        (B, H, W) int64: 0 background, 1 foreground.

    Raises:
        ValueError: a wrong shape.

    Paper:
        Xie et al., CVPR 2022, arXiv:2203.13505.

    Notes:
        The released pipeline takes 0.3 and refines the result with ``dense_crf(image, unary_from_mask(cue, 2),
        IRN_CRF)``.

    Example:
        >>> threshold_cue(torch.tensor([[[[0.2, 0.3, 0.31]]]]))
        tensor([[[0, 0, 1]]])
    """
    check_shape("cam", cam, (None, 1, None, None), "(B, 1, H, W)")
    return cam_to_mask(cam, threshold)


def refine_cam_with_background_cue(
    cam: Tensor, saliency: Tensor, *, labels: Tensor | None = None, keys: Tensor | None = None
) -> Tensor:
    """Label each pixel with its strongest class, or with background where the background cue is at least as strong.

    The cue 1 - saliency takes the place of the constant threshold of `cam_to_mask`. It works on the CAMs of any system.

    Args:
        cam: (B, K, H, W) CAMs of the foreground classes in [0, 1], see `normalize_cam`. K may be 0.
        saliency: (B, 1, H, W) foreground probability in [0, 1], soft or 0/1.
        labels: (B, K) multi-hot. If given, absent classes can't win.
        keys: (K,) int64 class of each channel, 1..K as in a mask; default: channel k is class k + 1.

    Returns:
        mask (B, H, W) int64: 0 background or a class. Where the saliency is 0, CAMs of `normalize_cam` (below 1) leave
        background; where it is 1, every pixel with a positive CAM takes a class. Ties are background.

    Raises:
        TypeError: ``saliency`` is not floating point.
        ValueError: a wrong shape.

    Paper:
        Xie et al., CVPR 2022, arXiv:2203.13505.

    Example:
        >>> cam = torch.tensor([[[[0.4, 0.4, 0.0]], [[0.1, 0.9, 0.0]]]])
        >>> refine_cam_with_background_cue(cam, torch.tensor([[[[0.5, 0.5, 1.0]]]]))
        tensor([[[0, 2, 0]]])
    """
    check_ndim("cam", cam, 4, "(B, K, H, W)")
    check_shape("saliency", saliency, (cam.shape[0], 1, *cam.shape[2:]), "to match cam")
    if not saliency.is_floating_point():
        raise TypeError(f"saliency: expected floating point in [0, 1], got {saliency.dtype}; divide 8-bit maps by 255")
    return cam_to_mask(cam, 1 - saliency, labels=labels, keys=keys)


def pairwise_cosine_similarity(
    a: Tensor, b: Tensor | None = None, *, clamp: tuple[float, float] | None = (0.0005, 0.9995)
) -> Tensor:
    r"""Cosine similarity of all pairs of rows, clamped.

    .. math:: s_{ij} = \mathrm{clamp}(\hat a_i \cdot \hat b_j), \qquad \hat x = x / \max(\|x\|_2, 10^{-12})

    Args:
        a: (N, D) float.
        b: (M, D) float; default: ``a`` itself, for which the gradient costs one matrix product instead of two.
        clamp: Least and largest similarity, or None. A pair beyond them has no gradient: with the default, one that is
            as good as parallel or as good as orthogonal sends nothing back.

    Returns:
        (N, M), in float32 for half precision, else in the dtype of ``a``. A row of zeros has similarity 0 (then
        clamped) with everything, itself included.

    Raises:
        TypeError: rows are not floating point.
        ValueError: a wrong shape.

    Paper:
        Xie et al., CVPR 2022, arXiv:2203.13505.

    Notes:
        Also in float32 under autocast: the logarithm of 1 - s, near s = 1, is lost in half precision. Compiles with
        ``fullgraph=True``.

    Example:
        >>> a = torch.tensor([[1.0, 0.0], [3.0, 3.0], [0.0, 0.0]])
        >>> pairwise_cosine_similarity(a, clamp=(0.01, 0.99))
        tensor([[0.9900, 0.7071, 0.0100],
                [0.7071, 0.9900, 0.0100],
                [0.0100, 0.0100, 0.0100]])
    """
    check_ndim("a", a, 2, "(N, D)")
    check_floating("a", a)
    if b is not None:
        check_shape("b", b, (None, a.shape[1]), "to match a")
        check_floating("b", b)
    dtype = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        if b is None:
            similarity = _SelfSimilarity.apply(a.to(dtype))
        else:
            units = (F.normalize(rows.to(dtype), dim=1, eps=_LEAST_NORM) for rows in (a, b))
            similarity = next(units) @ next(units).mT
    return similarity if clamp is None else similarity.clamp(*clamp)


def _check_border(border: int) -> None:
    if border < 1:
        raise ValueError(f"border: expected at least 1, got {border}")


class _SelfSimilarity(torch.autograd.Function):
    """Cosine similarities s of the rows of x with each other.

    With H = g + gᵀ, the gradient is D (H - diag(c)) D x, where D holds 1 / |x_i| and c_i = sum_j H_ij s_ij takes the
    part along x_i off: one product, and the rest N x N. Autograd would take two products and several passes over x.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        unit = F.normalize(x, dim=1, eps=_LEAST_NORM)
        return unit @ unit.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, similarity = ctx.saved_tensors
        norm = torch.linalg.vector_norm(x, dim=1)
        both = grad + grad.mT
        along = torch.where(norm > _LEAST_NORM, (both * similarity).sum(1), 0.0)
        scale = 1 / norm.clamp(min=_LEAST_NORM)
        return (scale[:, None] * (both - torch.diag_embed(along)) * scale) @ x
