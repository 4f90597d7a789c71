"""Tokens to maps and back, and position embeddings of another grid.

Axes: B images, P prefix tokens (class tokens and registers), N patches on a grid of h by w, T = P + N tokens, prefix
first, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_ndim
from wsss_modules._precision import at_least_float32

__all__ = ["interpolate_pos_embed", "map_to_tokens", "patch_grid", "tokens_to_map"]


def patch_grid(size: Sequence[int], patch_size: int | tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of whole patches in an image; what is left over at the right and below is not looked at.

    Args:
        size: Height and width of the image in pixels, or the shape of a tensor that ends with them.
        patch_size: Pixels along a side of a patch, or its height and width.

    Returns:
        (h, w) = (floor(H / p), floor(W / p)).

    Raises:
        ValueError: the image is smaller than a patch.

    Example:
        >>> patch_grid((375, 500), 16)
        (23, 31)
    """
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    grid = (int(size[-2]) // height, int(size[-1]) // width)
    if min(grid) < 1:
        raise ValueError(f"size: expected at least one patch of {height} x {width} pixels, got {tuple(size[-2:])}")
    return grid


def tokens_to_map(tokens: Tensor, grid: Sequence[int], num_prefix: int = 0) -> Tensor:
    """Lay the patch tokens of a transformer out on their grid, leaving the tokens before them out.

    Args:
        tokens: (B, P + N, D), prefix tokens first, then the patches row by row.
        grid: (h, w) rows and columns of patches; not square for an image that is not, see `patch_grid`.
        num_prefix: P, how many tokens stand before the patches: none, the class token (1), class and distillation token
            of DeiT (2), class token and registers (1 + their number), or a token for each class (K). timm models say
            so in ``num_prefix_tokens``.

    Returns:
        (B, D, h, w), a view.

    Raises:
        ValueError: a wrong shape. Where the count of tokens does not fit, the message says which prefix or grid would.

    Notes:
        For `(B, T, D)` of a last block, apply the model's final norm first if its classifier sees normed tokens.
        Compiles with ``fullgraph=True``.

    Example:
        >>> tokens = torch.rand(2, 1 + 6, 8)
        >>> tokens_to_map(tokens, (2, 3), num_prefix=1).shape
        torch.Size([2, 8, 2, 3])
        >>> tokens_to_map(tokens, (2, 3))
        Traceback (most recent call last):
            ...
        ValueError: tokens: expected 0 + 2 x 3 = 6 tokens (num_prefix + grid), got 7: there is 1 token before the \
patches; pass num_prefix=1
    """
    check_ndim("tokens", tokens, 3, "(B, P + N, D)")
    height, width = int(grid[0]), int(grid[1])
    count = tokens.shape[1]
    if height < 1 or width < 1 or num_prefix < 0:
        raise ValueError(f"grid, num_prefix: expected (h, w) of at least 1 and at least 0, got {grid} and {num_prefix}")
    if count != num_prefix + height * width:
        raise ValueError(_wrong_count(count, height, width, num_prefix))
    return tokens[:, num_prefix:].mT.unflatten(2, (height, width))


def _wrong_count(count: int, height: int, width: int, num_prefix: int) -> str:
    told = (
        f"tokens: expected {num_prefix} + {height} x {width} = {num_prefix + height * width} tokens "
        f"(num_prefix + grid), got {count}"
    )
    extra = count - height * width
    squares = {prefix: math.isqrt(count - prefix) for prefix in (num_prefix, 0, 1, 2, 5) if count >= prefix}
    fitting = [f"{prefix} + {side} x {side}" for prefix, side in squares.items() if side and side**2 + prefix == count]
    if 0 <= extra <= 16 or (extra > 0 and not fitting):
        there = "is no token" if extra == 0 else "is 1 token" if extra == 1 else f"are {extra} tokens"
        kind = (
            "class and distillation token" if extra == 2 else "class token and registers, or one token for each class"
        )
        told += f": there {there} before the patches; pass num_prefix={extra}"
        return told + (f" ({kind})" if extra > 1 else "")
    if fitting:
        return f"{told} = {' or '.join(fitting)}; is the grid that of the image, divided by the patch size?"
    return f"{told}; the grid is (image height // patch size, image width // patch size)"


def map_to_tokens(features: Tensor) -> Tensor:
    """Read a map off row by row as tokens, the inverse of `tokens_to_map`.

    Args:
        features: (B, D, h, w).

    Returns:
        (B, h * w, D), a view.

    Raises:
        ValueError: a wrong shape.

    Example:
        >>> map_to_tokens(torch.rand(2, 8, 3, 5)).shape
        torch.Size([2, 15, 8])
    """
    check_ndim("features", features, 4, "(B, D, h, w)")
    return features.flatten(2).mT


def interpolate_pos_embed(
    pos_embed: Tensor,
    num_prefix: int,
    grid: Sequence[int],
    *,
    offset: float = 0.1,
    mode: Literal["scale", "size", "nearest"] = "scale",
    source_grid: Sequence[int] | None = None,
    resample_same: bool = False,
) -> Tensor:
    r"""Resample position embeddings to another grid of patches; the rows of prefix tokens stay as they are.

    Bicubic (a = -0.75, half-pixel centres, clamped at the border). With ``mode="scale"``, cell i of the new grid reads
    the stored one at

    .. math:: (i + 1/2) \, h_0 / (h + offset) - 1/2

    The offset was a guard against a rounded-down size, but it moves the samples too: by up to a hundredth in value.

    Args:
        pos_embed: (1, P + N0, D), prefix rows first.
        num_prefix: P, prefix tokens.
        grid: (h, w) wanted.
        offset: In [0, 1): 0.1 in MCTformer V1 and V2, as in DINO; 0 in MCTformer+.
        mode: "scale"; "size", the same without offset; "nearest" copies the nearest row, with which MCTformer+ starts
            from a checkpoint of half its grid.
        source_grid: (h0, w0) stored; default: a square.
        resample_same: Resample although the stored grid is the one wanted, which moves the samples by the offset. The
            released code does so for images that are not square in pixels.

    Returns:
        (1, P + h * w, D), in the dtype of ``pos_embed``; itself if nothing has to be done.

    Raises:
        TypeError: ``pos_embed`` is not floating point.
        ValueError: a wrong shape or option; rows that are no square and no ``source_grid``.

    Paper:
        Xu et al., Multi-class Token Transformer for Weakly Supervised Semantic Segmentation, CVPR 2022,
        arXiv:2203.02891.

    Notes:
        Differentiable. Computed in float32 for half precision.

    Example:
        >>> interpolate_pos_embed(torch.rand(1, 20 + 14 * 14, 8), 20, (23, 31)).shape
        torch.Size([1, 733, 8])
    """
    check_ndim("pos_embed", pos_embed, 3, "(1, P + N0, D)")
    check_floating("pos_embed", pos_embed)
    if mode not in ("scale", "size", "nearest"):
        raise ValueError(f'mode: expected "scale", "size" or "nearest", got {mode!r}')
    if not 0 <= offset < 1:
        raise ValueError(f"offset: expected a number in [0, 1), got {offset}")
    target = (int(grid[0]), int(grid[1]))
    source = grid_of_positions(pos_embed.shape[1], num_prefix, source_grid)
    if min(target) < 1:
        raise ValueError(f"grid: expected (h, w) of at least 1, got {target}")
    if target == source and not resample_same:
        return pos_embed
    rows = at_least_float32(tokens_to_map(pos_embed, source, num_prefix))
    if mode == "nearest":
        moved = F.interpolate(rows, target, mode="nearest-exact")
    elif mode == "size" or offset == 0:
        moved = F.interpolate(rows, target, mode="bicubic", align_corners=False)
    else:
        scale = [(new + offset) / old for new, old in zip(target, source, strict=True)]
        moved = F.interpolate(rows, scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :num_prefix], map_to_tokens(moved).to(pos_embed.dtype)], 1)


def grid_of_positions(rows: int, num_prefix: int, source_grid: Sequence[int] | None) -> tuple[int, int]:
    count = rows - num_prefix
    if source_grid is None:
        side = math.isqrt(max(0, count))
        if count < 1 or side * side != count:
            raise ValueError(
                f"pos_embed: expected {num_prefix} prefix rows and a square number of patch rows, got {rows} rows; "
                "pass source_grid if the stored grid is not square, or another num_prefix"
            )
        return side, side
    source = (int(source_grid[0]), int(source_grid[1]))
    if min(source) < 1 or source[0] * source[1] != count:
        raise ValueError(f"source_grid: expected {count} patch rows beside {num_prefix} of a prefix, got {source}")
    return source
