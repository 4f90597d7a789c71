"""IRNet's two heads on frozen features: class boundaries, and displacements to instance centroids.

Axes: B images, C channels, h w cells of the output grid, H W pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_ndim, check_shape

__all__ = [
    "BoundaryHead",
    "DisplacementHead",
    "EdgeDisplacement",
    "IRNHead",
    "IRNOutput",
    "MeanShift",
    "edge_displacement_inference",
]

RESNET50_CHANNELS = (64, 256, 512, 1024, 2048)
RESNET50_STRIDES = (4, 4, 8, 16, 16)


class IRNOutput(NamedTuple):
    """What `IRNHead` returns, on the grid of the second feature map (stride 4).

    Attributes:
        edge_logits: (B, 1, h, w); the sigmoid is the boundary probability ``edge``.
        displacement: (B, 2, h, w), (dy, dx) from each cell to its instance's centroid, in cells.
    """

    edge_logits: Tensor
    displacement: Tensor


class EdgeDisplacement(NamedTuple):
    """What `edge_displacement_inference` returns.

    Attributes:
        edge: (B, 1, h, w) boundary probability in [0, 1].
        displacement: (B, 2, h, w), (dy, dx) in cells.
    """

    edge: Tensor
    displacement: Tensor


class MeanShift(nn.Module):
    """Subtract a stored mean vector in evaluation; do nothing in training.

    The displacement loss only sees differences of displacements, so their mean is free: it is measured once after
    training with `fit`, and taken off, which centres the field.

    Args:
        channels: C, 2 for displacements.

    Shapes:
        (B, C, h, w) -> (B, C, h, w).

    Paper:
        Ahn, Cho and Kwak, Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations, CVPR 2019,
        arXiv:1904.05044, section 4.2; a detail of the released code.

    Example:
        >>> shift = MeanShift().eval()
        >>> field = torch.ones(4, 2, 3, 3)
        >>> shift.fit([field, 3 * field])
        tensor([2., 2.])
        >>> shift(field).mean()
        tensor(-1.)
    """

    running_mean: Tensor

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))

    def forward(self, displacement: Tensor) -> Tensor:
        """Centre a field, see the class."""
        if self.training:
            return displacement
        return displacement - self.running_mean.to(displacement.dtype)[:, None, None]

    @torch.no_grad()
    def fit(
        self, batches: Iterable[Tensor | tuple[Tensor, Tensor]], *, weighting: Literal["batch", "pixel"] = "batch"
    ) -> Tensor:
        """Measure and store the mean.

        Args:
            batches: Raw fields (B, C, h, w), see `DisplacementHead.raw`; each may come with its valid cells
                (B, h, w) bool, the others (padding) don't count.
            weighting: "batch" averages the means of the batches, as released; "pixel" weights every cell equally,
                whatever the batch it came in.

        Returns:
            (C,) the mean, also kept in ``running_mean``.

        Raises:
            ValueError: no batch, a wrong shape, or an unknown ``weighting``.

        Differences:
            The released code measures in evaluation mode, where a mean that is already stored is subtracted: run on a
            trained checkpoint it returns nearly zero. It counts padding, and leaves the last incomplete batch out.
        """
        if weighting not in ("batch", "pixel"):
            raise ValueError(f'weighting: expected "batch" or "pixel", got {weighting!r}')
        channels = self.running_mean.shape[0]
        total = torch.zeros_like(self.running_mean, dtype=torch.float64)
        weight = torch.zeros((), dtype=torch.float64, device=total.device)
        seen = False
        for item in batches:
            field, valid = item if isinstance(item, tuple) else (item, None)
            check_shape("batches", field, (None, channels, None, None), "for this mean")
            field = field.to(total)
            if valid is None:
                count = torch.full_like(weight, field.shape[0] * field.shape[2] * field.shape[3])
            else:
                check_shape("valid", valid, (field.shape[0], *field.shape[2:]), "to match the field")
                field = torch.where(valid.to(total.device)[:, None], field, 0.0)
                count = valid.sum().to(weight)
            sums = field.sum((0, 2, 3))
            if weighting == "batch":  # a batch without a valid cell has no mean
                sums, count = sums / count.clamp(min=1), (count > 0).to(weight)
            total += sums
            weight += count
            seen = True
        if not seen:
            raise ValueError("batches: expected at least one displacement field (B, C, h, w), got none")
        self.running_mean.copy_(total / weight.clamp(min=1))
        return self.running_mean.clone()


class BoundaryHead(nn.Module):
    """Class boundary logits from five feature maps.

    Each map: 1x1 convolution to ``width``, GroupNorm, bilinear up-sampling to the grid of the second map, ReLU; their
    concatenation is classified by a 1x1 convolution. A map finer than the second one is average-pooled first.

    Args:
        in_channels: Channels of the five maps, ResNet-50 by default.
        strides: Their strides in pixels, each a multiple of the one before. The defaults are IRNet's ResNet-50 with
            (conv1, pool, layer1..4) at stride 4, 4, 8, 16, 16; EfficientNet-Lite0 has (16, 24, 40, 112, 320) channels
            at (2, 4, 8, 16, 32).
        width: Channels per map.
        groups: Groups of the GroupNorms; one per channel where this doesn't divide the width.

    Shapes:
        five maps (B, C_i, h_i, w_i) -> edge logits (B, 1, h, w) of the size of the second map.

    Raises:
        ValueError: not five levels, strides that don't divide each other, or maps that don't match.

    Paper:
        Ahn, Cho and Kwak, CVPR 2019, arXiv:1904.05044, section 4.1 and figure 3.

    Notes:
        Compiles with ``fullgraph=True``. Up-sampling comes before ReLU, as released.

    Example:
        >>> head = BoundaryHead((16, 24, 40, 112, 320), (2, 4, 8, 16, 32))
        >>> sizes = [(32, 29), (16, 15), (8, 8), (4, 4), (2, 2)]
        >>> maps = [torch.rand(2, c, *s) for c, s in zip((16, 24, 40, 112, 320), sizes)]
        >>> head(maps).shape
        torch.Size([2, 1, 16, 15])
    """

    def __init__(
        self,
        in_channels: Sequence[int] = RESNET50_CHANNELS,
        strides: Sequence[int] = RESNET50_STRIDES,
        width: int = 32,
        groups: int = 4,
    ) -> None:
        super().__init__()
        _check_layout(in_channels, strides)
        self.levels = nn.ModuleList(
            _Level(channels, width, groups, stride, strides[1])
            for channels, stride in zip(in_channels, strides, strict=True)
        )
        self.classifier = nn.Conv2d(5 * width, 1, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map the boundaries, see the class."""
        size = _check_features(features)
        levels = [_crop(level(x), size, i) for i, (level, x) in enumerate(zip(self.levels, features, strict=True))]
        return self.classifier(torch.cat(levels, 1))


class DisplacementHead(nn.Module):
    """Displacement field from five feature maps: from each cell to the centroid of its instance.

    The three coarse maps are joined on the grid of the third map, then with the two fine ones on that of the second.
    The mean is taken off in evaluation, see `MeanShift`.

    Args:
        in_channels: See `BoundaryHead`.
        strides: See `BoundaryHead`.
        widths: Channels of the first, the second, and all further layers.
        groups: GroupNorm groups of the first and of all further layers, see `BoundaryHead`.

    Shapes:
        five maps (B, C_i, h_i, w_i) -> (dy, dx) in cells, (B, 2, h, w) of the size of the second map.

    Raises:
        ValueError: see `BoundaryHead`.

    Paper:
        Ahn, Cho and Kwak, CVPR 2019, arXiv:1904.05044, section 4.1 and figure 3.

    Notes:
        Compiles with ``fullgraph=True``.

    Example:
        >>> head = DisplacementHead((8, 8, 16, 32, 32))
        >>> maps = [torch.rand(1, c, s, s) for c, s in zip((8, 8, 16, 32, 32), (12, 12, 6, 3, 3))]
        >>> head(maps).shape
        torch.Size([1, 2, 12, 12])
    """

    def __init__(
        self,
        in_channels: Sequence[int] = RESNET50_CHANNELS,
        strides: Sequence[int] = RESNET50_STRIDES,
        widths: tuple[int, int, int] = (64, 128, 256),
        groups: tuple[int, int] = (8, 16),
    ) -> None:
        super().__init__()
        _check_layout(in_channels, strides)
        out, middle = strides[1], strides[2]
        wide = widths[2]
        self.levels = nn.ModuleList(
            [
                _Level(in_channels[0], widths[0], groups[0], strides[0], out),
                _Level(in_channels[1], widths[1], groups[1], strides[1], out),
                *(_Level(in_channels[i], wide, groups[1], strides[i], middle) for i in (2, 3, 4)),
            ]
        )
        self.merge = _Level(3 * wide, wide, groups[1], middle, out)
        self.project = _Level(widths[0] + widths[1] + wide, wide, groups[1], out, out)
        self.regressor = nn.Conv2d(wide, 2, 1, bias=False)
        self.mean_shift = MeanShift(2)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Estimate the field, see the class."""
        return self.mean_shift(self.raw(features))

    def raw(self, features: Sequence[Tensor]) -> Tensor:
        """The field before `MeanShift`, whatever the mode: what `MeanShift.fit` must be given."""
        size = _check_features(features)
        middle = (features[2].shape[2], features[2].shape[3])
        levels = [level(x) for level, x in zip(self.levels, features, strict=True)]
        coarse = torch.cat([_crop(x, middle, i + 2) for i, x in enumerate(levels[2:])], 1)
        fine = [_crop(x, size, i) for i, x in enumerate(levels[:2])]
        joined = torch.cat([*fine, _crop(self.merge(coarse), size, 2)], 1)
        return self.regressor(self.project(joined))


class IRNHead(nn.Module):
    """IRNet's boundary and displacement heads on the features of a frozen backbone.

    Args:
        in_channels: See `BoundaryHead`.
        strides: See `BoundaryHead`.
        edge_width: ``width`` of `BoundaryHead`.
        displacement_widths: ``widths`` of `DisplacementHead`.
        detach: Keep gradients away from the backbone, as released.

    Shapes:
        five maps (B, C_i, h_i, w_i) -> `IRNOutput`: edge logits (B, 1, h, w) and displacement (B, 2, h, w).

    Raises:
        ValueError: see `BoundaryHead`.

    Paper:
        Ahn, Cho and Kwak, CVPR 2019, arXiv:1904.05044.

    Notes:
        The two branches share no layer: IRNet trains ``boundary`` at learning rate 0.1 and ``displacement`` at 1.0.

    Example:
        >>> head = IRNHead((8, 8, 16, 32, 32))
        >>> maps = [torch.rand(1, c, s, s) for c, s in zip((8, 8, 16, 32, 32), (12, 12, 6, 3, 3))]
        >>> out = head(maps)
        >>> out.edge_logits.shape, out.displacement.shape
        (torch.Size([1, 1, 12, 12]), torch.Size([1, 2, 12, 12]))
    """

    def __init__(
        self,
        in_channels: Sequence[int] = RESNET50_CHANNELS,
        strides: Sequence[int] = RESNET50_STRIDES,
        *,
        edge_width: int = 32,
        displacement_widths: tuple[int, int, int] = (64, 128, 256),
        detach: bool = True,
    ) -> None:
        super().__init__()
        self.boundary = BoundaryHead(in_channels, strides, edge_width)
        self.displacement = DisplacementHead(in_channels, strides, displacement_widths)
        self.detach = detach

    def forward(self, features: Sequence[Tensor]) -> IRNOutput:
        """Map boundaries and displacements, see the class."""
        if self.detach:
            features = [x.detach() for x in features]
        return IRNOutput(self.boundary(features), self.displacement(features))

    @property
    def mean_shift(self) -> MeanShift:
        """The `MeanShift` of the displacement head."""
        return self.displacement.mean_shift

    @staticmethod
    def released_key(name: str) -> str | None:
        """The key in our ``state_dict`` of a parameter of the released network; None for its backbone.

        Args:
            name: Released name, such as ``fc_edge1.0.weight`` or ``fc_dp7.4.running_mean``. The released network
                registers its mean shift twice; both names lead to the same key.

        Returns:
            A key such as ``boundary.levels.0.conv.weight``, or None.
        """
        module, _, rest = name.partition(".")
        parts = {"0": "conv", "1": "norm"}
        index, _, leaf = rest.partition(".")
        if module == "mean_shift" or (module == "fc_dp7" and index == "4"):
            return "displacement.mean_shift.running_mean"
        if module == "fc_edge6":
            return f"boundary.classifier.{rest}"
        if module == "fc_dp7" and index == "3":
            return f"displacement.regressor.{leaf}"
        for prefix, head in (("fc_edge", "boundary"), ("fc_dp", "displacement")):
            if module.startswith(prefix) and index in parts:
                number = int(module.removeprefix(prefix))
                place = {6: "merge", 7: "project"}.get(number, f"levels.{number - 1}")
                return f"{head}.{place}.{parts[index]}.{leaf}"
        return None

    def load_released_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the heads of a released IRNet checkpoint; its backbone is left out.

        Args:
            state: The released ``state_dict``, with or without a ``module.`` prefix.

        Raises:
            RuntimeError: a parameter is missing or has a wrong shape.
        """
        named = ((self.released_key(key.removeprefix("module.")), value) for key, value in state.items())
        self.load_state_dict({key: value for key, value in named if key is not None})


def edge_displacement_inference(
    image: Tensor,
    net: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    multiple: int = 16,
    min_size: int = 0,
    stride: int = 4,
) -> EdgeDisplacement:
    """Run IRNet on an image and its mirror image: edge logits are averaged, the displacement is the plain image's.

    Args:
        image: (B, 3, H, W) normalised images.
        net: Called once with (2B, 3, H', W'), the images and then the mirror images, padded with zeros right and
            below; returns edge logits (2B, 1, h', w') and displacement (2B, 2, h', w'), such as `IRNOutput`. Should be
            in evaluation mode.
        multiple: Pad to a multiple of this, the network's stride.
        min_size: Pad to at least this many pixels; the released code pads to 512.
        stride: Of the network's output. The result has h = ceil(H / stride) rows.

    Returns:
        `EdgeDisplacement`: edge (B, 1, h, w) in [0, 1] and displacement (B, 2, h, w) in cells.

    Raises:
        ValueError: a wrong shape.

    Paper:
        Ahn, Cho and Kwak, CVPR 2019, arXiv:1904.05044; a detail of the released code.

    Differences:
        The released code pads to 512 pixels and cuts off what is larger; this never cuts. Where W is no multiple of
        ``stride``, the mirrored grid is shifted by a part of a cell, as released.

    Example:
        >>> def net(x):
        ...     cells = x[:, :1, ::4, ::4]
        ...     return cells, torch.cat([cells, cells], 1)
        >>> out = edge_displacement_inference(torch.rand(1, 3, 45, 38), net)
        >>> out.edge.shape, out.displacement.shape
        (torch.Size([1, 1, 12, 10]), torch.Size([1, 2, 12, 10]))
    """
    check_ndim("image", image, 4, "(B, 3, H, W)")
    batch, _, height, width = image.shape
    bottom = max(min_size, math.ceil(height / multiple) * multiple) - height
    right = max(min_size, math.ceil(width / multiple) * multiple) - width
    pair = F.pad(torch.cat([image, image.flip(-1)]), (0, right, 0, bottom))
    logits, displacement = net(pair)
    h, w = math.ceil(height / stride), math.ceil(width / stride)
    for name, out, channels in (("edge logits", logits, 1), ("displacement", displacement, 2)):
        check_shape(f"net ({name})", out, (2 * batch, channels, None, None), "for images and mirror images")
        if out.shape[2] < h or out.shape[3] < w:
            raise ValueError(
                f"net ({name}): expected at least {h} x {w} cells, got {tuple(out.shape[2:])}; is stride right?"
            )
    logits = logits[..., :h, :w]
    edge = torch.sigmoid((logits[:batch] + logits[batch:].flip(-1)) / 2)
    return EdgeDisplacement(edge, displacement[:batch, :, :h, :w])


class _Level(nn.Module):
    """1x1 convolution, GroupNorm, resampling from one stride to another, ReLU."""

    def __init__(self, in_channels: int, width: int, groups: int, stride: int, out_stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm = nn.GroupNorm(groups if width % groups == 0 else width, width)
        self.pool = max(out_stride // stride, 1)
        self.up = max(stride // out_stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool > 1:  # ceil: an odd last row has a cell of its own, as with a stride-2 convolution
            x = F.avg_pool2d(x, self.pool, ceil_mode=True, count_include_pad=False)
        x = self.norm(self.conv(x))
        if self.up > 1:
            x = F.interpolate(x, scale_factor=float(self.up), mode="bilinear", align_corners=False)
        return F.relu(x)

    def extra_repr(self) -> str:
        return f"pool={self.pool}, up={self.up}"


def _check_layout(in_channels: Sequence[int], strides: Sequence[int]) -> None:
    if len(in_channels) != 5 or len(strides) != 5:
        raise ValueError(f"in_channels, strides: expected five levels, got {len(in_channels)} and {len(strides)}")
    if any(coarse % fine for fine, coarse in itertools.pairwise(strides)):
        raise ValueError(f"strides: expected each to be a multiple of the one before, got {tuple(strides)}")


def _check_features(features: Sequence[Tensor]) -> tuple[int, int]:
    """Check the number of maps and return the size of the second one, which is that of the output."""
    if len(features) != 5:
        raise ValueError(f"features: expected five maps, got {len(features)}")
    for i, x in enumerate(features):
        check_ndim(f"features[{i}]", x, 4, "(B, C, h, w)")
    return cast("tuple[int, int]", tuple(features[1].shape[2:]))


def _crop(x: Tensor, size: tuple[int, int], level: int) -> Tensor:
    """Cut what up-sampling made too large: ceil(H / 16) cells times 4 may be more than ceil(H / 4)."""
    if x.shape[2] < size[0] or x.shape[3] < size[1]:
        raise ValueError(
            f"features[{level}]: expected to cover {size[0]} x {size[1]} cells after resampling, got "
            f"{x.shape[2]} x {x.shape[3]}; are the strides right?"
        )
    return x[..., : size[0], : size[1]]
