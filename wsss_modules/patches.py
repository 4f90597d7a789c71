"""Patches as pixels (ViT-PCM): row and column LSTMs, a patch classifier with max pooling, transforms of patch maps.

Axes: B images, D feature channels, K classes *including background at 0*, h w patches, H hidden channels, C any.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32

__all__ = [
    "HVBiLSTM",
    "PatchClassifierGMP",
    "PatchClassifierOutput",
    "PatchTransform",
    "equivariance_target",
    "merge_class_labels",
    "mosaic2x2",
    "split2x2",
]


class HVBiLSTM(nn.Module):
    """Bidirectional LSTMs along rows and along columns, so that each patch knows its row and its column.

    Both read the features themselves; the column LSTM does not see what the row LSTM says.

    Args:
        in_dim: D, channels of the features.
        hidden_dim: H; 192 for ViT-B/16.
        dropout: probability with which a feature is dropped, once of each patch and once of each whole sequence.

    Shapes:
        features (B, D, h, w) -> (B, 4 H, h, w): rows rightwards, rows leftwards, columns downwards, columns upwards.

    Raises:
        ValueError: features without D channels, or a size below 1.

    Paper:
        Rossetti et al., "Max Pooling with Vision Transformers Reconciles Class and Shape in Weakly Supervised Semantic
        Segmentation", ECCV 2022, arXiv:2210.17400, section 3.2.

    Differences:
        In the released code each direction drops other features of a sequence; here both drop the same. The forget
        gate's bias starts at 1, input weights Glorot uniform and recurrent ones orthogonal, as there. It has one bias
        vector an LSTM, torch two, whose second starts at 0 and stays there unless trained: freeze it, or count it in.

    Notes:
        Grids need not be square. Released Keras weights: ``weight_ih`` is ``kernel`` transposed, ``weight_hh`` is
        ``recurrent_kernel`` transposed, ``bias_ih`` is ``bias``; the order of the gates (i, f, g, o) is the same.

    Example:
        >>> import torch
        >>> from wsss_modules import HVBiLSTM
        >>> HVBiLSTM(8, 3)(torch.randn(2, 8, 4, 6)).shape
        torch.Size([2, 12, 4, 6])
    """

    def __init__(self, in_dim: int, hidden_dim: int, dropout: float = 0.2) -> None:
        super().__init__()
        if min(in_dim, hidden_dim) < 1:
            raise ValueError(f"in_dim, hidden_dim: expected at least 1, got {in_dim} and {hidden_dim}")
        self.in_dim, self.out_dim, self.dropout = in_dim, 4 * hidden_dim, dropout
        self.rows = nn.LSTM(in_dim, hidden_dim, batch_first=True, bidirectional=True)
        self.cols = nn.LSTM(in_dim, hidden_dim, batch_first=True, bidirectional=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as Keras does: see *Differences*."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "weight_ih" in name:  # Glorot's bound counts all four gates as outputs, as Keras does
                    nn.init.xavier_uniform_(parameter)
                elif "weight_hh" in name:
                    nn.init.orthogonal_(parameter)
                else:
                    nn.init.zeros_(parameter)
                    if "bias_ih" in name:
                        forget = len(parameter) // 4
                        parameter[forget : 2 * forget] = 1.0

    def forward(self, features: Tensor) -> Tensor:
        """Code every patch by its row and its column, see the class."""
        check_shape("features", features, (None, self.in_dim, None, None), "for this layer")
        batch = len(features)
        features = F.dropout(features, self.dropout, self.training)
        rows = self._run(self.rows, rearrange(features, "b d h w -> (b h) w d"))
        cols = self._run(self.cols, rearrange(features, "b d h w -> (b w) h d"))
        rows = rearrange(rows, "(b h) w c -> b c h w", b=batch)
        return torch.cat([rows, rearrange(cols, "(b w) h c -> b c h w", b=batch)], 1)

    def _run(self, lstm: nn.LSTM, sequences: Tensor) -> Tensor:
        if self.training and self.dropout > 0:  # one mask for all steps of a sequence
            sequences = sequences * F.dropout(torch.ones_like(sequences[:, :1]), self.dropout)
        out: Tensor = lstm(sequences)[0]
        return out

    def extra_repr(self) -> str:
        """Show the options."""
        return f"in_dim={self.in_dim}, out_dim={self.out_dim}, dropout={self.dropout}"


class PatchClassifierOutput(NamedTuple):
    """What :class:`PatchClassifierGMP` returns; K counts the background, which is class 0.

    Attributes:
        logits: (B, K, h, w) scores of each patch.
        probs: (B, K, h, w) their softmax over the classes.
        pooled: (B, K) largest probability of each class over the patches.
        pooled_logits: (B, K) log-odds of ``pooled``, log(p / (1 - p)), exact where p rounds to 0 or 1: what
            :func:`wsss_losses.multi_label_soft_margin_loss` takes in place of the clipped logarithms of
            :func:`wsss_losses.pooled_probability_bce_loss`.
    """

    logits: Tensor
    probs: Tensor
    pooled: Tensor
    pooled_logits: Tensor


class PatchClassifierGMP(nn.Module):
    r"""Classify every patch by a softmax over background and classes; the image has what its surest patch has.

    .. math:: p_k(u) = \mathrm{softmax}_k(W^\top x_u), \qquad \hat p_k = \max_u p_k(u)

    Args:
        in_dim: D, channels of the features.
        num_classes: K, the background included: 21 for VOC.
        dropout: probability with which a feature of a patch is dropped.

    Shapes:
        features (B, D, h, w) -> :class:`PatchClassifierOutput`.

    Raises:
        ValueError: fewer than two classes, or features without D channels.

    Paper:
        Rossetti et al., ECCV 2022, arXiv:2210.17400, section 3.3.

    Notes:
        Any features with stride: of a ViT, MiT, or a CNN under a few transformer blocks. Equal maxima share the
        gradient, as in the released code. The softmax is computed in float32 at least; compiles with
        ``fullgraph=True``.

    Example:
        >>> import torch
        >>> from wsss_modules import PatchClassifierGMP
        >>> out = PatchClassifierGMP(8, num_classes=3)(torch.randn(2, 8, 4, 6))
        >>> out.probs.shape, out.pooled.shape
        (torch.Size([2, 3, 4, 6]), torch.Size([2, 3]))
    """

    def __init__(self, in_dim: int, num_classes: int, dropout: float = 0.2) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes: expected at least 2, background and a class, got {num_classes}")
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(in_dim, num_classes, 1, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.05)

    def forward(self, features: Tensor) -> PatchClassifierOutput:
        """Classify the patches and the image, see the class."""
        check_shape("features", features, (None, self.classifier.in_channels, None, None), "for this head")
        logits = self.classifier(self.dropout(features))
        with torch.autocast(features.device.type, enabled=False):
            z = at_least_float32(logits)
            probs = z.softmax(1)
            pooled = probs.amax((2, 3))
            scores = (pooled, _log_odds(z, probs))
        return PatchClassifierOutput(logits, probs.to(logits.dtype), *(score.to(logits.dtype) for score in scores))

    def l2_penalty(self, weight: float = 0.01) -> Tensor:
        """``weight`` times the sum of the squared weights, a scalar: the third term of ViT-PCM's loss."""
        return weight * self.classifier.weight.square().sum()


def _log_odds(z: Tensor, probs: Tensor) -> Tensor:
    """z_k - log(sum of exp(z_j), j != k) at the patch where probability k is largest: (B, K)."""
    place = probs.flatten(2).argmax(2)  # (B, K)
    there = z.flatten(2).gather(2, place[:, None].expand(-1, z.shape[1], -1))  # (B, class, patch of class k)
    own = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    return there.diagonal(dim1=1, dim2=2) - there.masked_fill(own, float("-inf")).logsumexp(1)


def merge_class_labels(probs: Tensor, labels: Tensor) -> Tensor:
    r"""Correct class probabilities by what the labels know.

    Absent classes become 0, each present one is divided by its maximum over the patches, and the classes of a patch are
    divided by their sum; 0 / 0 is 0.

    Args:
        probs: (B, K, h, w) floating point, at least 0; K counts the background, if there is one.
        labels: (B, K) multi-hot for the same classes.

    Returns:
        (B, K, h, w) in [0, 1], in the dtype of ``probs``; sums to 1 wherever a present class has a probability above 0.
        All 0 for an image without a label.

    Raises:
        TypeError: ``probs`` is not floating point.
        ValueError: shapes don't match.

    Paper:
        Rossetti et al., ECCV 2022, arXiv:2210.17400, section 3.4.

    Notes:
        Each present class reaches its maximum somewhere, also in a crop that does not show it. Computed in float32 for
        half precision.

    Example:
        >>> import torch
        >>> from wsss_modules import merge_class_labels
        >>> probs = torch.tensor([[[[0.2, 0.4]], [[0.1, 0.1]], [[0.7, 0.5]]]])
        >>> merge_class_labels(probs, torch.tensor([[1, 1, 0]]))[0, :, 0]
        tensor([[0.3333, 0.5000],
                [0.6667, 0.5000],
                [0.0000, 0.0000]])
    """
    check_ndim("probs", probs, 4, "(B, K, h, w)")
    check_floating("probs", probs)
    check_shape("labels", labels, probs.shape[:2], "to match probs")
    if probs.numel() == 0:
        return probs
    kept = at_least_float32(probs) * labels.to(torch.promote_types(probs.dtype, torch.float32))[:, :, None, None]
    stretched = _ratio(kept, kept.amax((2, 3), keepdim=True))
    return _ratio(stretched, stretched.sum(1, keepdim=True)).to(probs.dtype)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    some = whole > 0
    return torch.where(some, part / torch.where(some, whole, 1.0), 0.0)


class PatchTransform(NamedTuple):
    """Crop, resize, flips and transpose, in this order, one of each for every image of a batch.

    Attributes:
        flip_lr: (B,) bool, mirror left and right.
        flip_ud: (B,) bool, mirror top and bottom.
        transpose: (B,) bool, exchange rows and columns at the end; needs square results.
        box: (B, 4) int64 ``x1, y1, x2, y2`` in cells, half-open, what is kept of each; None for all of it.
        size: (h', w') of the results, bilinear with ``align_corners=True``; None keeps the size, and goes with no box.

    Example:
        >>> import torch
        >>> from wsss_modules import PatchTransform
        >>> maps = torch.arange(4.0).view(1, 1, 2, 2)
        >>> turn = PatchTransform(torch.tensor([True]), torch.tensor([False]), torch.tensor([True]))
        >>> turn.apply(maps)[0, 0], bool((turn.inverse().apply(turn.apply(maps)) == maps).all())
        (tensor([[1., 3.],
                [0., 2.]]), True)
    """

    flip_lr: Tensor
    flip_ud: Tensor
    transpose: Tensor
    box: Tensor | None = None
    size: tuple[int, int] | None = None

    @classmethod
    def draw(
        cls,
        batch: int,
        *,
        crop_probability: float = 0.0,
        crop: int = 0,
        lattice: int = 1,
        grid: tuple[int, int] | None = None,
        size: tuple[int, int] | None = None,
        transpose: bool = True,
        generator: torch.Generator | None = None,
    ) -> PatchTransform:
        """Draw flips and transposes with probability 1/2 each, and square crops.

        Args:
            batch: B, how many images.
            crop_probability: probability of a crop instead of the whole.
            crop: side of the crops in pixels.
            lattice: corners of crops lie on multiples of this, the patch size.
            grid: height and width of the images in pixels; needed for crops.
            size: (h', w') of the results; needed for crops.
            transpose: draw transposes too; only where results are square.
            generator: source of the random numbers, on the CPU.

        Returns:
            Transforms on the CPU, in pixels; see :meth:`on_patches`.

        Raises:
            ValueError: crops without ``grid`` and ``size``, or larger than the images.
        """

        def coins(probability: float = 0.5) -> Tensor:
            return torch.rand(batch, generator=generator) < probability

        flip_lr, flip_ud, turned = coins(), coins(), coins() & transpose
        if crop_probability == 0:
            return cls(flip_lr, flip_ud, turned, None, size)
        if grid is None or size is None or not 0 < crop <= min(grid):
            raise ValueError(f"crop: expected grid and size, and 1 to the shorter side, got {crop}, {grid} and {size}")
        cropped = coins(crop_probability)
        corners = []
        for side in (grid[1], grid[0]):  # x, then y
            place = torch.randint(0, side // lattice + 1, (batch,), generator=generator) * lattice
            corners.append(torch.where(cropped, place.clamp(max=side - crop), 0))
        ends = [torch.where(cropped, corner + crop, side) for corner, side in zip(corners, grid[::-1], strict=True)]
        return cls(flip_lr, flip_ud, turned, torch.stack([*corners, *ends], 1), size)

    def on_patches(self, patch: int) -> PatchTransform:
        """The same transform of maps with one cell for each ``patch`` x ``patch`` pixels, rounded down."""
        box = None if self.box is None else self.box // patch
        size = None if self.size is None else (self.size[0] // patch, self.size[1] // patch)
        return self._replace(box=box, size=size)

    def to(self, device: torch.device) -> PatchTransform:
        """Move the tensors."""
        lr, ud, turned = (x.to(device) for x in (self.flip_lr, self.flip_ud, self.transpose))
        return PatchTransform(lr, ud, turned, None if self.box is None else self.box.to(device), self.size)

    def inverse(self) -> PatchTransform:
        """What undoes flips and transposes.

        Raises:
            ValueError: the transform crops or resizes.
        """
        if self.box is not None or self.size is not None:
            raise ValueError("inverse: expected flips and transposes only, got a crop or a resize")
        swapped = torch.where(self.transpose, self.flip_ud, self.flip_lr)
        return PatchTransform(swapped, torch.where(self.transpose, self.flip_lr, self.flip_ud), self.transpose)

    def apply(self, x: Tensor) -> Tensor:
        """Transform maps or images.

        Each transform is a matrix over the rows and one over the columns, so all images are transformed by two matrix
        products, whatever was drawn for them; entries are exact where nothing is resized. Differentiable.

        Args:
            x: (B, C, h, w) floating point.

        Returns:
            (B, C, h', w'), or (B, C, h, w) without ``size``, in the dtype of ``x``.

        Raises:
            TypeError: ``x`` is not floating point.
            ValueError: another number of images, a box without a size, or a transpose of results that are not square.
        """
        check_ndim("x", x, 4, "(B, C, h, w)")
        check_floating("x", x)
        check_shape("x", x, (len(self.flip_lr), None, None, None), "for the images of the transform")
        height, width = x.shape[2:]
        if self.box is not None and self.size is None:
            raise ValueError("size: expected the size of the results of a crop, got None")
        size = (height, width) if self.size is None else self.size
        if size[0] != size[1] and bool(self.transpose.any()):
            raise ValueError(f"transpose: expected square results, got {size[0]} x {size[1]}")
        maps = at_least_float32(x)
        whole = x.new_zeros(len(x), 2, dtype=torch.int64)
        starts, ends = (whole, whole + torch.tensor([width, height], device=x.device))
        if self.box is not None:
            starts, ends = self.box[:, :2], self.box[:, 2:]
        down = _resampling(starts[:, 1], ends[:, 1], self.flip_ud, height, size[0], maps.dtype)  # (B, h', h)
        across = _resampling(starts[:, 0], ends[:, 0], self.flip_lr, width, size[1], maps.dtype)  # (B, w', w)
        with torch.autocast(x.device.type, enabled=False):
            moved = down[:, None] @ maps @ across.mT[:, None]
        if size[0] == size[1]:
            moved = torch.where(self.transpose[:, None, None, None], moved.mT, moved)
        return moved.to(x.dtype)


def _resampling(start: Tensor, end: Tensor, flip: Tensor, inside: int, out: int, dtype: torch.dtype) -> Tensor:
    """Matrices (B, out, inside) of bilinear interpolation between the centres of the first and the last cell."""
    place = torch.arange(out, device=start.device)
    place = torch.where(flip[:, None], out - 1 - place, place).to(torch.float64)  # (B, out)
    step = (end - start - 1).to(torch.float64) / max(1, out - 1)
    position = start[:, None] + place * step[:, None]
    position = torch.minimum(position.clamp(min=0), (end - 1)[:, None].to(torch.float64)).clamp(max=inside - 1)
    distance = position[:, :, None] - torch.arange(inside, device=start.device)
    return (1 - distance.abs()).clamp(min=0).to(dtype)


def equivariance_target(probs: Tensor, labels: Tensor, transform: PatchTransform, view: PatchTransform) -> Tensor:
    r"""What the predictions on a transformed image say about another transform of the same image.

    .. math:: t = \mathrm{merge}\big(T_2(T_1^{-1}(p)),\, y\big)

    Args:
        probs: p, (B, K, h, w), probabilities of the images transformed by T1; taken as constants.
        labels: y, (B, K) multi-hot, the background included; those of the whole images, also for crops.
        transform: T1, in patches: flips and transposes only.
        view: T2, in patches.

    Returns:
        (B, K, h', w'), see :func:`merge_class_labels`; the maxima of the classes are those of the crop.

    Raises:
        TypeError: ``probs`` is not floating point.
        ValueError: shapes don't match, or T1 crops or resizes.

    Paper:
        Rossetti et al., ECCV 2022, arXiv:2210.17400, section 3.4.

    Example:
        >>> import torch
        >>> from wsss_modules import PatchTransform, equivariance_target
        >>> _ = torch.manual_seed(0)
        >>> first, second = PatchTransform.draw(4), PatchTransform.draw(4, size=(4, 4))
        >>> probs = torch.rand(4, 3, 8, 8).softmax(1)
        >>> equivariance_target(probs, torch.ones(4, 3), first, second).shape
        torch.Size([4, 3, 4, 4])
    """
    return merge_class_labels(view.apply(transform.inverse().apply(probs.detach())), labels)


def mosaic2x2(images: Tensor) -> Tensor:
    """Tile every four images into one of twice the height and width, row by row.

    Args:
        images: (4n, C, h, w).

    Returns:
        (n, C, 2h, 2w): images 4i to 4i+3 at top left, top right, bottom left, bottom right.

    Raises:
        ValueError: another number of axes, or of images.

    Paper:
        Rossetti et al., ECCV 2022, arXiv:2210.17400.

    Differences:
        The released code means to drop a remainder of up to three images, keeps it by a missing bracket, and fails.
        Here the caller decides: cut the batch, or fill it up.

    Example:
        >>> import torch
        >>> from wsss_modules import mosaic2x2
        >>> mosaic2x2(torch.arange(4.0).view(4, 1, 1, 1))[0, 0]
        tensor([[0., 1.],
                [2., 3.]])
    """
    check_ndim("images", images, 4, "(4n, C, h, w)")
    if len(images) % 4:
        raise ValueError(f"images: expected a multiple of 4, got {len(images)}; cut the batch or fill it up")
    return rearrange(images, "(n y x) c h w -> n c (y h) (x w)", y=2, x=2)


def split2x2(mosaics: Tensor) -> Tensor:
    """Undo :func:`mosaic2x2`: the four quarters of each map as maps of their own.

    Args:
        mosaics: (n, C, 2h, 2w).

    Returns:
        (4n, C, h, w).

    Raises:
        ValueError: another number of axes, or an odd height or width.

    Example:
        >>> import torch
        >>> from wsss_modules import mosaic2x2, split2x2
        >>> images = torch.rand(8, 3, 4, 6)
        >>> bool((split2x2(mosaic2x2(images)) == images).all())
        True
    """
    check_ndim("mosaics", mosaics, 4, "(n, C, 2h, 2w)")
    if mosaics.shape[2] % 2 or mosaics.shape[3] % 2:
        raise ValueError(f"mosaics: expected even height and width, got {tuple(mosaics.shape[2:])}")
    return rearrange(mosaics, "n c (y h) (x w) -> (n y x) c h w", y=2, x=2)
