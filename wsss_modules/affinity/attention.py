"""Affinity of all pairs of cells, read off the attention of a transformer (AFA), and what it is trained on.

Axes: B images, L attention maps (blocks times heads), h w cells of the grid, N = h w, H W pixels, P offsets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wsss_modules._checks import check_integer, check_ndim, check_shape
from wsss_modules.affinity.offsets import Offset


class AttentionAffinityHead(nn.Module):
    r"""Affinity of every pair of cells from the attention between them.

    .. math:: P = \sigma\Big(\sum_l w_l\, (A_l + A_l^\top) + b\Big)

    Args:
        num_maps: L, attention maps in all: blocks times heads. 2 blocks of 8 heads, 16, for MiT-B1.

    Raises:
        ValueError: ``num_maps`` below 1.

    Paper:
        Ru et al., "Learning Affinity from Attention: End-to-End Weakly-Supervised Semantic Segmentation with
        Transformers", CVPR 2022, arXiv:2203.02664, section 3.2.

    Differences:
        The paper speaks of an MLP and of attention matrices. The released code has one linear layer, over raw logits:
        the products of queries and keys, neither divided by the root of the channels nor put through a softmax. That
        is what :class:`EfficientSelfAttention` exports, and what :func:`query_key` reads off the blocks of any
        transformer. 16 maps are hard-coded there.

    Notes:
        Any transformer: L and N are free, the grid need not be square, and class tokens are cut away before. The sum
        over the maps comes before the transpose, which is the same and leaves one N x N matrix in place of L.
        Gradients flow into the attention. Weights start Kaiming normal, as released; the sigmoid is computed in
        float32 at least. Compiles with ``fullgraph=True``.

    Example:
        >>> import torch
        >>> from wsss_modules import AttentionAffinityHead
        >>> _ = torch.manual_seed(0)
        >>> attentions = [torch.randn(2, 8, 12, 12), torch.randn(2, 8, 12, 12)]  # q @ k.mT of the last two blocks
        >>> affinity = AttentionAffinityHead(16)(attentions)
        >>> affinity.shape, bool((affinity == affinity.mT).all())
        (torch.Size([2, 12, 12]), True)
    """

    def __init__(self, num_maps: int = 16) -> None:
        super().__init__()
        if num_maps < 1:
            raise ValueError(f"num_maps: expected at least 1, got {num_maps}")
        self.proj = nn.Conv2d(num_maps, 1, 1)
        nn.init.kaiming_normal_(self.proj.weight, a=math.sqrt(5), mode="fan_out")

    def forward(self, attentions: Sequence[Tensor]) -> Tensor:
        """Read the affinity off attention logits.

        Args:
            attentions: (B, heads, N, N) of each block used, without class tokens.

        Returns:
            (B, N, N) in (0, 1), exactly symmetric, in the dtype of the attention.

        Raises:
            ValueError: another number of maps, or shapes that differ.
        """
        if not attentions:
            raise ValueError("attentions: expected at least one tensor (B, heads, N, N), got none")
        first = attentions[0]
        cells = first.shape[-1]
        for i, attention in enumerate(attentions):
            expected = (len(first), None, cells, cells)
            check_shape(f"attentions[{i}]", attention, expected, "(B, heads, N, N); class tokens are to be cut away")
        counts = [attention.shape[1] for attention in attentions]
        if sum(counts) != self.proj.in_channels:
            raise ValueError(
                f"attentions: expected {self.proj.in_channels} maps in all, got {' + '.join(map(str, counts))}"
            )
        dtype = torch.promote_types(first.dtype, torch.float32)
        with torch.autocast(first.device.type, enabled=False):
            total: Tensor | None = None
            weights = self.proj.weight.flatten().to(dtype).split(counts)
            for attention, weight in zip(attentions, weights, strict=True):
                part = torch.einsum("l,blnm->bnm", weight, attention.to(dtype))
                total = part if total is None else total + part
            assert total is not None  # for mypy: attentions is not empty
            bias = self.proj.get_parameter("bias").to(dtype)
            return (total + total.mT + bias).sigmoid().to(first.dtype)


def window_offsets(radius: int) -> tuple[Offset, ...]:
    """Offsets ``(dy, dx)`` of half a square window, each unordered pair of cells once.

    Args:
        radius: largest distance along each axis in cells, at least 0. Radius 8 gives 144 offsets.

    Returns:
        Pairs with ``|dy| <= radius`` and ``|dx| <= radius`` in the half plane ``dy > 0``, or ``dy = 0`` and ``dx > 0``.

    Raises:
        ValueError: a negative ``radius``.

    Example:
        >>> from wsss_modules import window_offsets
        >>> window_offsets(1)
        ((0, 1), (1, -1), (1, 0), (1, 1))
    """
    if radius < 0:
        raise ValueError(f"radius: expected at least 0, got {radius}")
    box = range(-radius, radius + 1)
    return tuple((dy, dx) for dy in range(radius + 1) for dx in box if dy > 0 or dx > 0)


def local_window_mask(size: tuple[int, int], radius: int, *, device: torch.device | None = None) -> Tensor:
    """Which pairs of cells are at most ``radius`` apart along both axes.

    Args:
        size: height h and width w of the grid.
        radius: reach of the square window in cells, at least 0; a cell is in its own window.
        device: where the mask is made.

    Returns:
        bool (N, N), N = h w.

    Raises:
        ValueError: a negative ``radius``.

    Paper:
        Ru et al., CVPR 2022, arXiv:2203.02664, section 3.2.

    Example:
        >>> import torch
        >>> from wsss_modules import local_window_mask
        >>> local_window_mask((1, 3), 1).int()
        tensor([[1, 1, 0],
                [1, 1, 1],
                [0, 1, 1]], dtype=torch.int32)
    """
    if radius < 0:
        raise ValueError(f"radius: expected at least 0, got {radius}")
    near = [_band(side, radius, device) for side in size]
    return (near[0][:, None, :, None] & near[1][None, :, None, :]).flatten(2).flatten(0, 1)


def labels_to_affinity(
    mask: Tensor,
    *,
    radius: int | None = 8,
    stride: int = 16,
    size: tuple[int, int] | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """Affinity labels of all pairs of cells: 1 for the same label, 0 for two labels, ``ignore_index`` for unknown.

    The mask is read at the corner of each cell: row ``floor(i H / h)``. Two background cells are alike too. Pairs with
    an ignored cell, or further apart than the window, are unknown.

    Args:
        mask: (B, H, W) integers: 0 background, 1..K classes, ``ignore_index`` unknown.
        radius: reach of the square window in cells; None for all pairs.
        stride: pixels of a cell along each side.
        size: height h and width w of the grid; default (H // stride, W // stride). Give the grid of the affinity where
            the network rounds up.
        ignore_index: label of what says nothing, of pixels as of pairs, at most 255.

    Returns:
        (B, N, N) uint8, symmetric, 1 on the diagonal except for ignored cells.

    Raises:
        TypeError: ``mask`` is not an integer tensor.
        ValueError: a wrong shape, or a ``stride`` or ``radius`` out of range.

    Paper:
        Ru et al., CVPR 2022, arXiv:2203.02664, section 3.2.

    Differences:
        The released grid always rounds down, that of the network up, so that sides which the stride does not divide
        fail there; see ``size``. The nearest resampling of torch computes the place of a cell in single precision: at a
        few such sizes, 234 pixels in 14 cells for one, a cell is read one pixel further up or left there.

    Notes:
        One byte a pair; the released code holds six matrices of N x N numbers of up to 8 bytes. :func:`affinity_labels`
        is PSA's form, over a disc.

    Example:
        >>> import torch
        >>> from wsss_modules import labels_to_affinity
        >>> labels_to_affinity(torch.tensor([[[0, 1, 1, 255]]]), radius=1, stride=1)
        tensor([[[  1,   0, 255, 255],
                 [  0,   1,   1, 255],
                 [255,   1,   1, 255],
                 [255, 255, 255, 255]]], dtype=torch.uint8)
    """
    check_ndim("mask", mask, 3, "(B, H, W)")
    check_integer("mask", mask, "did you pass scores?")
    if stride < 1:
        raise ValueError(f"stride: expected at least 1, got {stride}")
    if not 2 <= ignore_index <= 255:
        raise ValueError(f"ignore_index: expected 2 to 255, to fit beside 0 and 1, got {ignore_index}")
    height, width = size if size is not None else (mask.shape[1] // stride, mask.shape[2] // stride)
    rows, columns = (
        torch.arange(cells, device=mask.device) * pixels // cells
        for cells, pixels in ((height, mask.shape[1]), (width, mask.shape[2]))
    )
    cells = mask[:, rows[:, None], columns].flatten(1)  # (B, N)
    known = cells != ignore_index
    same = (cells[:, :, None] == cells[:, None, :]).to(torch.uint8)
    valid = known[:, :, None] & known[:, None, :]
    if radius is not None:
        valid &= local_window_mask((height, width), radius, device=mask.device)
    return same.masked_fill_(~valid, ignore_index)


def _band(side: int, radius: int, device: torch.device | None) -> Tensor:
    place = torch.arange(side, device=device)
    return (place[:, None] - place).abs() <= radius
