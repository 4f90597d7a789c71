"""Features of a student fused from the deepest stage to the shallowest, to be compared with a teacher's (ReviewKD).

Axes: B images, C channels of a map, M channels in which maps are fused, H W cells; stages from shallow to deep.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_ndim, check_shape
from wsss_modules._frozen import frozen

__all__ = ["AttentionBasedFusion", "FusedMaps", "ReviewDistiller", "pyramid_maps", "teacher_features"]

Norm = Literal["batch", "group"]


def pyramid_maps(network: nn.Module, images: Tensor) -> Any:
    """The maps of a timm network with ``features_only=True``, with channels first whatever the network does.

    Swin and some others give channels last, and say so in ``output_fmt``.

    Args:
        network: Any module; what does not say that its channels are last is returned as it comes.
        images: (B, 3, H, W).

    Returns:
        What ``network`` returns; of a list of maps (B, h, w, C) those as (B, C, h, w).

    Example:
        >>> class Last(nn.Module):
        ...     output_fmt = "NHWC"
        ...     def forward(self, images):
        ...         return [images.permute(0, 2, 3, 1)]
        >>> [tuple(x.shape) for x in pyramid_maps(Last(), torch.rand(2, 3, 4, 6))]
        [(2, 3, 4, 6)]
    """
    out = network(images)
    if getattr(network, "output_fmt", None) != "NHWC" or not isinstance(out, (list, tuple)):
        return out
    return [x.permute(0, 3, 1, 2) for x in out]


def teacher_features(teacher: nn.Module, images: Tensor) -> Any:
    """What a teacher makes of the images: in eval mode, without a graph; its mode and flags are as before afterwards.

    Args:
        teacher: Any network, such as a timm one with ``features_only=True``.
        images: (B, 3, H, W).

    Returns:
        What ``teacher`` returns, without gradients, and with channels first, see `pyramid_maps`.

    Raises:
        TypeError: ``teacher`` is no module, so that its mode is not known.

    Paper:
        Chen, Liu, Zhao and Jia, Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv:2104.09044.

    Differences:
        A released training leaves the teacher in train mode and in the graph: its batch norm takes the statistics of
        the batch, and its running ones drift.

    Example:
        >>> teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
        >>> maps = teacher_features(teacher, torch.rand(2, 3, 8, 8))
        >>> maps.requires_grad, teacher.training, teacher[1].num_batches_tracked.item()
        (False, True, 0)
    """
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher: expected an nn.Module, got {type(teacher).__name__}")
    with frozen(teacher), torch.no_grad():
        return pyramid_maps(teacher, images)


class FusedMaps(NamedTuple):
    """``out`` (B, C, H, W), as many channels as the teacher's map; ``residual`` (B, M, H, W), for the next stage."""

    out: Tensor
    residual: Tensor


class AttentionBasedFusion(nn.Module):
    r"""Fuse a map of the student with what comes from deeper stages, each pixel by itself.

    .. math:: r = x' \cdot a_0 + y' \cdot a_1, \qquad x' = \mathrm{BN}(W_1 x), \quad
        (a_0, a_1) = \mathrm{sigmoid}(W_a [x'; y'] + b), \quad out = \mathrm{BN}(W_3 * r)

    with y' the residual of the deeper stage, resized to x' by nearest neighbours, a 1 x 1 convolution W_1, and a 3 x 3
    one W_3. The two attentions are independent of each other. The deepest stage has no residual: r = x'.

    Args:
        in_channels: Channels of the student's map.
        mid_channels: M, channels in which maps are fused.
        out_channels: Channels of the teacher's map.
        fuse: Whether there is a residual.
        norm: "batch", as released, or "group" (32 groups or fewer) for batches of one image, whose maps of a single
            cell batch norm refuses in training.

    Shapes:
        x (B, in_channels, h, w), residual (B, M, h', w') of any size, out_size (H, W) or None for that of x ->
        `FusedMaps`.

    Raises:
        ValueError: an unknown ``norm``, a wrong shape, or a residual that is missing or not expected.

    Paper:
        Chen, Liu, Zhao and Jia, Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv:2104.09044, section 3.3.

    Differences:
        The two batch norms are the released code's. That compares the target's width only, and takes squares.

    Notes:
        The attention's convolution is split: its half for the residual runs before the residual is resized, which is
        the same, since each cell is repeated, and neither that half at full size nor the concatenation is formed. That
        saves time on maps of some size; on maps of 8 x 8 cells one call more takes as long as what is saved. Compiles
        with ``fullgraph=True``.

    Example:
        >>> fusion = AttentionBasedFusion(16, 32, 64)
        >>> out, residual = fusion(torch.rand(2, 16, 12, 20), torch.rand(2, 32, 6, 10))
        >>> out.shape, residual.shape
        (torch.Size([2, 64, 12, 20]), torch.Size([2, 32, 12, 20]))
    """

    def __init__(
        self, in_channels: int, mid_channels: int, out_channels: int, fuse: bool = True, *, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        if norm not in ("batch", "group"):
            raise ValueError(f'norm: expected "batch" or "group", got {norm!r}')
        self.in_channels = in_channels
        first = nn.Conv2d(in_channels, mid_channels, 1, bias=False)
        last = nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False)
        for convolution in (first, last):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.reduce = nn.Sequential(first, _make_norm(mid_channels, norm))
        self.expand = nn.Sequential(last, _make_norm(out_channels, norm))
        self.attention = nn.Conv2d(2 * mid_channels, 2, 1) if fuse else None

    def forward(self, x: Tensor, residual: Tensor | None = None, out_size: tuple[int, int] | None = None) -> FusedMaps:
        """Fuse, resize, and map to the teacher's channels."""
        check_shape("x", x, (None, self.in_channels, None, None), "for this fusion")
        fused = self.reduce(x)
        if self.attention is None:
            if residual is not None:
                raise ValueError("residual: expected None, since fuse=False")
        else:
            if residual is None:
                raise ValueError("residual: expected the map of the deeper stage, since fuse=True")
            check_shape("residual", residual, (len(x), fused.shape[1], None, None), "to match x and mid_channels")
            fused = self._fuse(fused, residual, self.attention)
        if out_size is not None and tuple(out_size) != tuple(fused.shape[-2:]):
            fused = F.interpolate(fused, out_size, mode="nearest")
        return FusedMaps(self.expand(fused), fused)

    @staticmethod
    def _fuse(x: Tensor, y: Tensor, attention: nn.Conv2d) -> Tensor:
        size = x.shape[-2:]
        of_x, of_y = attention.weight.split(x.shape[1], 1)
        share = torch.sigmoid(F.conv2d(x, of_x, attention.bias) + _nearest(F.conv2d(y, of_y), size))  # (B, 2, h, w)
        return x * share[:, :1] + _nearest(y, size) * share[:, 1:]


class ReviewDistiller(nn.Module):
    r"""Maps of a student, each fused with all deeper ones, in the channels and sizes of a teacher's.

    From the deepest stage to the shallowest, each `AttentionBasedFusion` hands what it has fused to the next, so that a
    shallow map of the teacher also teaches the deeper stages of the student. Needed in training only.

    Args:
        in_channels: Channels of the student's maps, from shallow to deep; of timm, ``feature_info.channels()``.
        out_channels: Channels of the teacher's maps, from shallow to deep.
        mid_channels: M; by default those of the student's deepest map, at most 512.
        norm: See `AttentionBasedFusion`.

    Shapes:
        features: one (B, C_i, h_i, w_i) for each stage; out_sizes: one (H_i, W_i) for each, by default the student's ->
        list of (B, out_channels_i, H_i, W_i), from shallow to deep.

    Raises:
        ValueError: lists of different lengths or of length 0, or a wrong shape.

    Paper:
        Chen, Liu, Zhao and Jia, Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv:2104.09044.

    Differences:
        The released code leaves surplus shallow maps out without a word; here give as many as there are stages. Sizes
        come with each call, so that images may have any shape; two of its three variants fix them.

    Notes:
        ``blocks[0]`` is the deepest stage, as in the released state dict. If the two pyramids have different numbers of
        stages, take as many of the deepest ones, such as timm's ``out_indices``. Networks that give channels last, such
        as Swin, are asked by `pyramid_maps`. Where a stage ends with an activation, the authors take the teacher's maps
        before it, and on ImageNet the student's as well. For classification the pooled vector is one more stage.

    Example:
        >>> distiller = ReviewDistiller([16, 24, 40], [64, 128, 256])
        >>> student = [torch.rand(2, c, 32 // s, 48 // s) for c, s in ((16, 4), (24, 8), (40, 16))]
        >>> [tuple(x.shape) for x in distiller(student)]
        [(2, 64, 8, 12), (2, 128, 4, 6), (2, 256, 2, 3)]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        mid_channels: int | None = None,
        *,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        if not in_channels or len(in_channels) != len(out_channels):
            raise ValueError(
                f"in_channels, out_channels: expected as many stages of one as of the other, at least one, "
                f"got {list(in_channels)} and {list(out_channels)}"
            )
        mid = min(512, in_channels[-1]) if mid_channels is None else mid_channels
        stages = list(zip(in_channels, out_channels, strict=True))[::-1]
        self.blocks = nn.ModuleList(
            AttentionBasedFusion(of_student, mid, of_teacher, fuse=depth > 0, norm=norm)
            for depth, (of_student, of_teacher) in enumerate(stages)
        )

    def forward(self, features: Sequence[Tensor], out_sizes: Sequence[tuple[int, int]] | None = None) -> list[Tensor]:
        """The student's maps as the teacher's are to be."""
        if len(features) != len(self.blocks):
            raise ValueError(f"features: expected {len(self.blocks)} maps, got {len(features)}")
        if out_sizes is not None and len(out_sizes) != len(features):
            raise ValueError(f"out_sizes: expected {len(features)} sizes, got {len(out_sizes)}")
        maps: list[Tensor] = []
        residual: Tensor | None = None
        for depth, block in enumerate(self.blocks):
            stage = len(features) - 1 - depth
            check_ndim(f"features[{stage}]", features[stage], 4, "(B, C, h, w)")
            size = None if out_sizes is None else out_sizes[stage]
            out, residual = block(features[stage], residual, size)
            maps.append(out)
        return maps[::-1]


def _nearest(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if tuple(x.shape[-2:]) == tuple(size) else F.interpolate(x, tuple(size), mode="nearest")


def _make_norm(channels: int, norm: Norm) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    groups = gcd(32, channels)
    return nn.GroupNorm(max(1, groups // 2) if groups == channels else groups, channels)  # two channels each, at least
