"""AffinityNet's head: pixel features whose L1 distance is the affinity of a pair (PSA).

Axis letters: B batch, C channels, P offsets in raster order, n sources, H W map size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Literal

import torch
from torch import Tensor, nn

from wsss_modules._checks import check_floating, check_ndim
from wsss_modules.affinity.local import LocalAffinity
from wsss_modules.affinity.offsets import Border, affinity_offsets, check_crop, inside, is_full, source_box


def feature_affinity(
    features: Tensor,
    radius: int,
    *,
    distance: Literal["mean", "sum"] = "mean",
    border: Border = "released",
) -> Tensor:
    """Affinity of each pair from the L1 distance of the features of its two pixels.

    ``a_ij = exp(-mean_c |f_ic - f_jc|)``

    Args:
        features: (B, C, H, W) float.
        radius: radius in pixels; released: 5.
        distance: ``"mean"`` over channels (released) or ``"sum"`` (paper).
        border: ``"released"``: the sources are the crop of :func:`pair_index`. ``"full"``: all H·W pixels are sources,
            and pairs with a partner outside have affinity 0.

    Returns:
        (B, P, n) float in (0, 1], in the order of :func:`affinity_offsets`, in the dtype of ``features``.

    Raises:
        TypeError: if ``features`` is not floating point.
        ValueError: if it does not have four axes, the map is too small for the released crop, or an option is unknown.

    Paper:
        Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly Supervised
        Semantic Segmentation", CVPR 2018, arXiv:1803.10464, eq. 1.

    Differences:
        The paper sums over channels, the released code averages.

    Notes:
        One offset at a time, with the signs computed again in backward: memory O(B·C·H·W), where a gather of all pairs
        takes P times that. The distance is computed in float32 for half-precision features. The slope of ``|x|`` at 0
        is 0. Works inside ``torch.compile(fullgraph=True)``.

    Example:
        >>> import torch
        >>> from wsss_modules import feature_affinity
        >>> features = torch.zeros(1, 4, 2, 3)
        >>> features[..., 1:] = 1
        >>> feature_affinity(features, radius=2)[0, :, 0].tolist()  # one source: row 0, column 1
        [1.0, 0.3678794503211975, 1.0, 1.0]
    """
    check_ndim("features", features, 4, "(B, C, H, W)")
    check_floating("features", features)
    _check_distance(distance)
    size = (features.shape[2], features.shape[3])
    check_crop(size, radius, border)
    compute_dtype = torch.promote_types(features.dtype, torch.float32)
    l1 = pair_l1_distance(features.to(compute_dtype), radius, border == "full")  # (B, P, n)
    if distance == "mean":
        l1 = l1 / features.shape[1]
    affinity = torch.exp(-l1)
    if border == "full":
        affinity = torch.where(inside(affinity_offsets(radius), size, features.device).flatten(1), affinity, 0)
    return affinity.to(features.dtype)


class AffinityHead(nn.Module):
    """Three feature maps of a backbone to the affinity of near pixels; see :func:`feature_affinity`.

    Each map passes a 1x1 convolution without bias, optional group normalisation and ELU; their concatenation passes
    another 1x1 convolution without bias and ELU, which gives the features that are compared.

    Args:
        in_channels: channels of the three inputs (ResNet-38: 512, 1024, 4096; VGG-16: 512, 512, 1024).
        widths: channels of the three branches; their sum is the number of compared channels.
        norm: ``"gn"`` for group normalisation (VGG-16) or ``None`` (ResNet-38).
        groups: groups of the three normalisations, used with ``norm="gn"``.
        radius: radius in pixels of the map.
        distance: ``"mean"`` over channels (released) or ``"sum"`` (paper).
        border: pairs of ``forward``: ``"released"`` crop or ``"full"`` coverage.

    Raises:
        ValueError: not three numbers each, or an unusable ``radius`` or unknown option.

    Paper:
        Ahn and Kwak, CVPR 2018, arXiv:1803.10464, section 3.2.

    Differences:
        The paper's head is wider (128, 256, 512). The released one, with half of it, is the default.

    Example:
        >>> import torch
        >>> from wsss_modules import AffinityHead
        >>> head = AffinityHead((8, 12, 16), widths=(4, 8, 12))
        >>> maps = [torch.randn(2, channels, 6, 11) for channels in (8, 12, 16)]
        >>> head(*maps).shape  # (6 - 4)(11 - 8) sources
        torch.Size([2, 34, 6])
        >>> head.local_affinity(*maps).values.shape
        torch.Size([2, 34, 6, 11])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        widths: Sequence[int] = (64, 128, 256),
        norm: Literal["gn"] | None = None,
        groups: Sequence[int] = (8, 16, 32),
        radius: int = 5,
        distance: Literal["mean", "sum"] = "mean",
        border: Border = "released",
    ) -> None:
        super().__init__()
        if not len(in_channels) == len(widths) == len(groups) == 3:
            counts = (len(in_channels), len(widths), len(groups))
            raise ValueError(f"in_channels, widths, groups: expected three numbers each, got {counts}")
        if norm not in (None, "gn"):
            raise ValueError(f"norm: expected 'gn' or None, got {norm!r}")
        _check_distance(distance)
        is_full(border)
        affinity_offsets(radius)  # what is unusable is refused here, not in the first forward
        self.radius, self.distance, self.border = radius, distance, border
        reduce = [
            nn.Conv2d(channels, width, 1, bias=False) for channels, width in zip(in_channels, widths, strict=True)
        ]
        self.reduce = nn.ModuleList(reduce)
        self.norm = nn.ModuleList(
            nn.GroupNorm(n_groups, width) if norm == "gn" else nn.Identity()
            for n_groups, width in zip(groups, widths, strict=True)
        )
        self.project = nn.Conv2d(sum(widths), sum(widths), 1, bias=False)
        self.elu = nn.ELU()
        for convolution in reduce:
            nn.init.kaiming_normal_(convolution.weight)
        nn.init.xavier_uniform_(self.project.weight, gain=4)

    def features(self, conv4: Tensor, conv5: Tensor, conv6: Tensor) -> Tensor:
        """The compared features (B, sum of widths, H, W), from three maps of the same height and width."""
        branches = zip((conv4, conv5, conv6), self.reduce, self.norm, strict=True)
        return self.elu(self.project(torch.cat([self.elu(norm(reduce(x))) for x, reduce, norm in branches], dim=1)))

    def forward(self, conv4: Tensor, conv5: Tensor, conv6: Tensor) -> Tensor:
        """Affinity in pair form (B, P, n), for the loss."""
        features = self.features(conv4, conv5, conv6)
        return feature_affinity(features, self.radius, distance=self.distance, border=self.border)

    def local_affinity(self, conv4: Tensor, conv5: Tensor, conv6: Tensor) -> LocalAffinity:
        """Affinity of the map, for the random walk; pairs that the crop of ``border`` leaves out have affinity 0."""
        size = (conv4.shape[2], conv4.shape[3])
        return LocalAffinity.from_pairs(self(conv4, conv5, conv6), self.radius, size, border=self.border)

    @staticmethod
    def released_key(name: str) -> str | None:
        """The key in our ``state_dict`` of a parameter of the released network; None for its backbone.

        Args:
            name: released name: ``f8_3.weight`` .. ``f8_5.weight``, ``f9.weight``, ``gn8_3.bias`` ...
        """
        module, _, leaf = name.partition(".")
        places = {"f9": "project"} | {f"f8_{3 + i}": f"reduce.{i}" for i in range(3)}
        places |= {f"gn8_{3 + i}": f"norm.{i}" for i in range(3)}
        return f"{places[module]}.{leaf}" if module in places else None

    def load_released_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the head's weights from a released checkpoint; those of the backbone are left out."""
        named = ((self.released_key(key.removeprefix("module.")), value) for key, value in state.items())
        self.load_state_dict({key: value for key, value in named if key is not None})


@torch.library.custom_op(
    "wsss::pair_l1_distance",
    mutates_args=(),
    schema="(Tensor features, int radius, bool full) -> Tensor",
)
def pair_l1_distance(features: Tensor, radius: int, full: bool) -> Tensor:
    """Sum over channels of |f_source - f_destination|: (B, P, n); 0 where the partner is outside."""
    (height, width), pairs = _pairs((features.shape[2], features.shape[3]), radius, full)
    result = features.new_zeros((features.shape[0], len(pairs), height, width))
    for images, into in zip(_in_cache(features), result.split(_few(features)), strict=True):
        for p, (source, destination, place) in enumerate(pairs):
            difference = images[source] - images[destination]
            torch.sum(difference.abs_(), dim=1, out=into[:, p][place])
    return result.flatten(2)


@pair_l1_distance.register_fake
def _(features: Tensor, radius: int, full: bool) -> Tensor:
    rows, columns = source_box((features.shape[2], features.shape[3]), radius, "full" if full else "released")
    n_sources = (rows.stop - rows.start) * (columns.stop - columns.start)
    return features.new_empty((features.shape[0], len(affinity_offsets(radius)), n_sources))


@torch.library.custom_op(
    "wsss::pair_l1_distance_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor features, int radius, bool full) -> Tensor",
)
def pair_l1_distance_backward(grad: Tensor, features: Tensor, radius: int, full: bool) -> Tensor:
    """Gradient of :func:`pair_l1_distance`; the signs are computed again."""
    shape, pairs = _pairs((features.shape[2], features.shape[3]), radius, full)
    result = torch.empty_like(features)
    few = _few(features)
    parts = zip(_in_cache(features), grad.unflatten(2, shape).split(few), result.split(few), strict=True)
    for images, above, into in parts:
        total = torch.zeros_like(images)
        for p, (source, destination, place) in enumerate(pairs):
            push = images[source] - images[destination]
            push.sign_().mul_(above[:, p : p + 1][place])
            total[source].add_(push)
            total[destination].sub_(push)
        into.copy_(total)
    return result


@pair_l1_distance_backward.register_fake
def _(grad: Tensor, features: Tensor, radius: int, full: bool) -> Tensor:
    return torch.empty_like(features)


def _check_distance(distance: str) -> None:
    if distance not in ("mean", "sum"):
        raise ValueError(f"distance: expected 'mean' or 'sum', got {distance!r}")


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    features, ctx.radius, ctx.full = inputs
    ctx.save_for_backward(features)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    (features,) = ctx.saved_tensors
    return pair_l1_distance_backward(grad, features, ctx.radius, ctx.full), None, None


pair_l1_distance.register_autograd(_backward, setup_context=_setup)


CACHED = 2**20  # numbers that stay in a core's cache from one offset to the next


def _few(features: Tensor) -> int:
    """Images to compare at once: on a CPU as many as its cache holds; elsewhere all, for fewer launches."""
    if features.device.type != "cpu":
        return max(1, len(features))
    return max(1, CACHED // max(1, features.shape[1:].numel()))


def _in_cache(features: Tensor) -> Iterator[Tensor]:
    """The images, :func:`_few` at a time; on a CPU with their channels together, so that they are summed in order.

    Of 16 maps of 448 channels and 28 x 28 cells, on one core, both forward and backward took a half to a third of the
    time of the whole batch at once.
    """
    for images in features.split(_few(features)):
        yield images.contiguous(memory_format=torch.channels_last) if images.device.type == "cpu" else images


Part = tuple[EllipsisType, slice, slice]


def _pairs(size: tuple[int, int], radius: int, full: bool) -> tuple[tuple[int, int], list[tuple[Part, Part, Part]]]:
    """Height and width of the sources; and for each offset its sources, their partners, and its place among all."""
    rows, columns = source_box(size, radius, "full" if full else "released")
    pairs: list[tuple[Part, Part, Part]] = []
    for offset in affinity_offsets(radius):
        (y, x), partners = _boxes(offset, size, rows, columns)
        place = slice(y.start - rows.start, y.stop - rows.start), slice(x.start - columns.start, x.stop - columns.start)
        pairs.append(((..., y, x), (..., *partners), (..., *place)))
    return (rows.stop - rows.start, columns.stop - columns.start), pairs


def _boxes(
    offset: tuple[int, int], size: tuple[int, int], rows: slice, columns: slice
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Sources among ``rows``, ``columns`` whose partner is inside, and their partners."""
    dy, dx = offset
    top, left = rows.start, max(columns.start, -dx)
    bottom, right = max(min(rows.stop, size[0] - dy), top), max(min(columns.stop, size[1] - dx), left)
    return (slice(top, bottom), slice(left, right)), (slice(top + dy, bottom + dy), slice(left + dx, right + dx))
