"""Tokens of vision transformers: to maps and back, positions, blocks, and queries and keys of any backbone's blocks.

Axes: B images, P prefix tokens (class tokens and registers), N patches on a grid of h by w, T = P + N tokens, prefix
first, D channels, L blocks, J heads of d channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32

__all__ = [
    "QueryKey",
    "TokenEncoder",
    "Tokens",
    "TransformerBlock",
    "attention_probabilities",
    "interpolate_pos_embed",
    "map_to_tokens",
    "patch_grid",
    "query_key",
    "token_encoder_from_vit",
    "tokens_to_map",
]

Visit = Callable[[int, nn.Module, Tensor], None]


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
        num_prefix: P.
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
    source = _source_grid(pos_embed.shape[1], num_prefix, source_grid)
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


def _source_grid(rows: int, num_prefix: int, source_grid: Sequence[int] | None) -> tuple[int, int]:
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


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim = {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = _split_heads(self.qkv(x), 3, self.num_heads)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TransformerBlock(nn.Module):
    """Pre-norm block of a vision transformer: self-attention, then an MLP with GELU, each added to its input.

    Its parameters have the names of timm's and DeiT's blocks. Attention is computed without its T x T matrix
    (``scaled_dot_product_attention``); `query_key` gives what the matrix is made of, for those who want to see it.

    Args:
        dim: D.
        num_heads: J, a divisor of D.
        mlp_ratio: Width of the MLP by D.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_path: Probability with which a branch is dropped for an image, in training.

    Shapes:
        (B, T, D) -> (B, T, D).

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or ``drop_path`` outside [0, 1).

    Paper:
        Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, arXiv:2010.11929.

    Notes:
        Linear layers start from a normal distribution of deviation 0.02, cut off at 2, biases from 0.

    Example:
        >>> TransformerBlock(24, num_heads=3)(torch.rand(2, 5, 24)).shape
        torch.Size([2, 5, 24])
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, *, qkv_bias: bool = True, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path: expected a probability in [0, 1), got {drop_path}")
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = _MLP(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Pass tokens on, see the class."""
        x = x + self._branch(self.attn(self.norm1(x)))
        return x + self._branch(self.mlp(self.norm2(x)))

    def _branch(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * keep.to(x.dtype) / (1 - self.drop_path)

    def extra_repr(self) -> str:
        """Show the option."""
        return f"drop_path={self.drop_path}"


class QueryKey(NamedTuple):
    """Queries and keys (B, J, T, d) of a block, before the scale."""

    query: Tensor
    key: Tensor


def query_key(block: nn.Module, tokens: Tensor) -> QueryKey:
    """Compute the queries and keys that a transformer block makes of its input.

    The block is only read: nothing is hooked into it or changed, so that several threads may do this at once.
    ``query @ key.mT`` are the raw attention logits (AFA); `attention_probabilities` are what the block weighs with.

    Args:
        block: A block with ``norm1`` and an ``attn`` that has ``num_heads`` and one linear layer ``qkv`` (ours, timm's
            ViT and DeiT; norms of queries and keys are applied) or two, ``q`` and ``kv`` (MiT, only stages whose keys
            are not spatially reduced).
        tokens: (B, T, D), what the block gets.

    Returns:
        ``query`` and ``key``, (B, J, T, d) each, differentiable.

    Raises:
        TypeError: the block is of another kind, or its attention is more than products of queries and keys: relative
            or rotary positions (BEiT, Swin, EVA, DINOv3), mixed heads (CaiT), channels (XCiT).

    Notes:
        Costs a sixth of the block once more. Outside of this the block runs as its author made it, fused attention
        included.

    Example:
        >>> block = TransformerBlock(24, num_heads=3)
        >>> query, key = query_key(block, torch.rand(2, 5, 24))
        >>> (query @ key.mT).shape
        torch.Size([2, 3, 5, 5])
    """
    check_ndim("tokens", tokens, 3, "(B, T, D)")
    attn: Any = getattr(block, "attn", None)
    norm: Any = getattr(block, "norm1", None)
    heads = getattr(attn, "num_heads", None)
    fused, apart = getattr(attn, "qkv", None), (getattr(attn, "q", None), getattr(attn, "kv", None))
    reduced = max(getattr(attn, "sr_ratio", 1), getattr(attn, "reduction", 1))
    if norm is None or heads is None or reduced != 1 or (fused is None and None in apart):
        raise TypeError(
            "block: expected norm1 and an attn with num_heads and qkv, or q and kv without spatial reduction, got "
            f"{type(block).__name__} with attn {type(attn).__name__}"
        )
    more = sorted({name.partition(".")[0] for name, _ in attn.named_parameters()} - _PARTS)
    if hasattr(attn, "rotate_half"):  # as timm marks rotary positions, which the model itself hands to the block
        more.append("rotary positions")
    if more:
        raise TypeError(
            f"block: expected attention by products of queries and keys alone, got {type(attn).__name__} with "
            + ", ".join(more)
        )
    normed = norm(tokens)
    if fused is not None:
        query, key = _split_heads(_first_two_thirds(fused, normed), 2, heads)
    else:
        (query,) = _split_heads(attn.q(normed), 1, heads)
        key, _ = _split_heads(attn.kv(normed), 2, heads)
    if getattr(attn, "q_norm", None) is not None:
        query, key = attn.q_norm(query), attn.k_norm(key)
    return QueryKey(query, key)


# What the attention of a plain transformer is made of.
_PARTS = {"qkv", "q", "kv", "q_norm", "k_norm", "norm", "proj"}


def _first_two_thirds(linear: Any, x: Tensor) -> Tensor:
    if not isinstance(linear, nn.Linear):  # wrapped, by LoRA for example
        fused = linear(x)
        return fused[..., : 2 * (fused.shape[-1] // 3)]
    wanted = 2 * (linear.out_features // 3)
    return F.linear(x, linear.weight[:wanted], None if linear.bias is None else linear.bias[:wanted])


def _split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """``parts`` tensors (B, J, T, d) of (B, T, parts * J * d)."""
    return x.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attention_probabilities(query: Tensor, key: Tensor) -> Tensor:
    r"""Attention as weights: :math:`softmax(q k^T / \sqrt{d})` over the keys.

    Args:
        query: (..., T, d), of all tokens or some.
        key: (..., S, d).

    Returns:
        (..., T, S) in at least float32; rows sum to 1.

    Raises:
        ValueError: shapes don't match.

    Example:
        >>> attention_probabilities(torch.zeros(1, 1, 2), torch.rand(1, 4, 2))
        tensor([[[0.2500, 0.2500, 0.2500, 0.2500]]])
    """
    check_shape("key", key, (*query.shape[:-2], None, query.shape[-1]), "to match query")
    with torch.autocast(query.device.type, enabled=False):
        scaled = at_least_float32(query) * query.shape[-1] ** -0.5
        return torch.softmax(scaled @ at_least_float32(key).mT, -1)


class Tokens(NamedTuple):
    """What `TokenEncoder` returns.

    Attributes:
        prefix: (B, P, D) class tokens (and registers) after the last block.
        patches: (B, N, D) patch tokens; `tokens_to_map(out.patches, out.grid)` is the feature map.
        grid: (h, w) of the patches.
        layers: (L, B, P, D) prefix tokens after each block, if they were asked for, else None.
    """

    prefix: Tensor
    patches: Tensor
    grid: tuple[int, int]
    layers: Tensor | None = None


class TokenEncoder(nn.Module):
    """Vision transformer made of given parts: patches of any kind, prefix tokens of any number, any blocks.

    The patches may come from a strided convolution (ViT), or from a pretrained convolutional network and a projection
    (a hybrid). `token_encoder_from_vit` makes one of a timm ViT or DeiT. Images of any size and shape pass.

    Args:
        patch_embed: Images (B, 3, H, W) to features (B, D, h, w).
        blocks: Blocks (B, T, D) to (B, T, D), such as `TransformerBlock` or timm's.
        dim: D.
        num_prefix: P tokens before the patches; 0 is possible.
        grid: (h, w) of the stored position embeddings.
        norm: Applied to the tokens after the last block; MCTformer has none.
        norm_pre: Applied to the tokens before the first block (CLIP).
        pos_offset: See `interpolate_pos_embed`; 0.1 for MCTformer V1 and V2.
        drop: Probability with which a value of the tokens is dropped before the first block.

    Shapes:
        images (B, 3, H, W) -> `Tokens`.

    Attributes:
        prefix: (1, P, D) the prefix tokens.
        pos_embed: (1, P + N0, D) a position for each of them and of the patches.

    Notes:
        ``forward(images, visit=...)`` calls ``visit(layer, block, tokens)`` with the input of every block: that is
        where `query_key`, or a class such as `AttentionSums`, reads the attention. Without it nothing of size T x T
        exists. Both parameters start from a normal distribution of deviation 0.02, cut off at 2.

    Example:
        >>> patches = nn.Conv2d(3, 24, 16, stride=16)
        >>> encoder = TokenEncoder(patches, [TransformerBlock(24, 3) for _ in range(2)], 24, num_prefix=1, grid=(2, 2))
        >>> out = encoder(torch.rand(2, 3, 40, 64))
        >>> out.prefix.shape, tokens_to_map(out.patches, out.grid).shape
        (torch.Size([2, 1, 24]), torch.Size([2, 24, 2, 4]))
    """

    def __init__(
        self,
        patch_embed: nn.Module,
        blocks: Iterable[nn.Module],
        dim: int,
        *,
        num_prefix: int,
        grid: tuple[int, int],
        norm: nn.Module | None = None,
        norm_pre: nn.Module | None = None,
        pos_offset: float = 0.0,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if num_prefix < 0 or min(grid) < 1:
            raise ValueError(f"num_prefix, grid: expected at least 0 and (h, w) >= 1, got {num_prefix} and {grid}")
        self.num_prefix, self.grid, self.pos_offset = num_prefix, (int(grid[0]), int(grid[1])), pos_offset
        self.patch_embed = patch_embed
        self.prefix = nn.Parameter(torch.zeros(1, num_prefix, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_prefix + grid[0] * grid[1], dim))
        self.drop = nn.Dropout(drop)
        self.norm_pre = nn.Identity() if norm_pre is None else norm_pre
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Identity() if norm is None else norm
        for parameter in (self.prefix, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor, *, visit: Visit | None = None, layers: bool = False) -> Tokens:
        """Encode images, see the class; ``layers`` also returns the prefix tokens after each block."""
        check_ndim("images", images, 4, "(B, 3, H, W)")
        if isinstance(self.patch_embed, nn.Conv2d):
            height, width = self.patch_embed.kernel_size
            patch_grid(images.shape, (height, width))  # says what is wrong with an image smaller than a patch
        features = self.patch_embed(images)  # (B, D, h, w)
        check_shape("patch_embed(images)", features, (len(images), self.pos_embed.shape[2], None, None), "(B, D, h, w)")
        grid = (features.shape[2], features.shape[3])
        position = interpolate_pos_embed(
            self.pos_embed,
            self.num_prefix,
            grid,
            offset=self.pos_offset,
            source_grid=self.grid,
            resample_same=self.pos_offset > 0 and images.shape[2] != images.shape[3],
        )
        tokens = torch.cat([self.prefix.expand(len(images), -1, -1), map_to_tokens(features)], 1) + position
        tokens = self.norm_pre(self.drop(tokens))
        prefixes = []
        for layer, block in enumerate(self.blocks):
            if visit is not None:
                visit(layer, block, tokens)
            tokens = block(tokens)
            if layers:
                prefixes.append(tokens[:, : self.num_prefix])
        tokens = self.norm(tokens)
        stacked = torch.stack(prefixes) if layers else None
        return Tokens(tokens[:, : self.num_prefix], tokens[:, self.num_prefix :], grid, stacked)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"num_prefix={self.num_prefix}, grid={self.grid}, pos_offset={self.pos_offset}"


def token_encoder_from_vit(
    vit: nn.Module,
    num_class_tokens: int | None = None,
    *,
    final_norm: bool = True,
    pos_offset: float = 0.0,
    drop: float = 0.0,
) -> TokenEncoder:
    """Make a `TokenEncoder` of a vision transformer as timm builds them (ViT, DeiT, distilled or with registers).

    The blocks, the patch convolution and the norms are those of ``vit`` itself, which is not changed; its class token
    and positions are copied. Class tokens of several classes start as copies of the pretrained one and its position, so
    that all classes start alike and only the loss tells them apart.

    Args:
        vit: The model, with ``patch_embed.proj``, ``cls_token``, ``pos_embed`` and ``blocks``.
        num_class_tokens: None keeps the tokens before the patches as they are; K puts K class tokens in the place of
            the class (and distillation) token. Registers stay behind them.
        final_norm: Whether the model's last norm is applied; MCTformer leaves it out.
        pos_offset: See `interpolate_pos_embed`.
        drop: See `TokenEncoder`.

    Returns:
        The encoder. ``num_prefix`` is the number of tokens before the patches.

    Raises:
        TypeError: the model is of another kind: windows, rotary positions, no single patch convolution.
        ValueError: ``num_class_tokens`` is below 1.

    Example:
        >>> vit = nn.Module()  # what timm.create_model("deit_small_patch16_224", pretrained=True) has, but smaller
        >>> vit.patch_embed = nn.Module()
        >>> vit.patch_embed.proj, vit.patch_embed.grid_size = nn.Conv2d(3, 24, 16, stride=16), (2, 2)
        >>> vit.cls_token, vit.pos_embed = nn.Parameter(torch.rand(1, 1, 24)), nn.Parameter(torch.rand(1, 5, 24))
        >>> vit.blocks, vit.norm = nn.Sequential(TransformerBlock(24, 3)), nn.LayerNorm(24)
        >>> token_encoder_from_vit(vit, num_class_tokens=20)(torch.rand(1, 3, 48, 32)).prefix.shape
        torch.Size([1, 20, 24])
    """
    patch_embed: Any = getattr(vit, "patch_embed", None)
    convolution, positions = getattr(patch_embed, "proj", None), getattr(vit, "pos_embed", None)
    blocks: Any = getattr(vit, "blocks", None)
    if not isinstance(convolution, nn.Conv2d) or not isinstance(positions, Tensor) or blocks is None:
        raise TypeError(
            "vit: expected a plain vision transformer with patch_embed.proj (a convolution), pos_embed and blocks, got "
            f"{type(vit).__name__}"
        )
    if getattr(vit, "rope", None) is not None:
        raise TypeError(f"vit: expected learnt positions only, got {type(vit).__name__} with rotary ones")
    if num_class_tokens is not None and num_class_tokens < 1:
        raise ValueError(f"num_class_tokens: expected at least 1, or None for the model's own, got {num_class_tokens}")
    tokens = [getattr(vit, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    own = [token.detach() for token in tokens if isinstance(token, Tensor)]
    num_own = sum(token.shape[1] for token in own)
    grid = getattr(patch_embed, "grid_size", None) or _source_grid(positions.shape[1], num_own, None)
    width, patches = positions.shape[2], grid[0] * grid[1]
    rows = positions.detach()
    if rows.shape[1] == patches:  # no_embed_class: positions of the patches alone
        rows = torch.cat([rows.new_zeros(1, num_own, width), rows], 1)
    prefix = torch.cat(own, 1) if own else rows.new_zeros(1, 0, width)
    if num_class_tokens is not None:
        if not isinstance(tokens[0], Tensor):
            raise TypeError(f"vit: expected a class token to copy, {type(vit).__name__} has none")
        registers = tokens[2].shape[1] if isinstance(tokens[2], Tensor) else 0
        keep = num_own - registers
        prefix = torch.cat([prefix[:, :1].expand(-1, num_class_tokens, -1), prefix[:, keep:]], 1)
        rows = torch.cat([rows[:, :1].expand(-1, num_class_tokens, -1), rows[:, keep:]], 1)
    norm = getattr(patch_embed, "norm", None)
    projection = convolution if norm is None or isinstance(norm, nn.Identity) else _NormedPatches(convolution, norm)
    encoder = TokenEncoder(
        projection,
        blocks,
        width,
        num_prefix=prefix.shape[1],
        grid=(grid[0], grid[1]),
        norm=getattr(vit, "norm", None) if final_norm else None,
        norm_pre=getattr(vit, "norm_pre", None),
        pos_offset=pos_offset,
        drop=drop,
    )
    encoder.prefix, encoder.pos_embed = nn.Parameter(prefix.clone()), nn.Parameter(rows.clone())
    return encoder


class _NormedPatches(nn.Module):
    """Patch convolution whose tokens are normed (CLIP variants, FlexiViT)."""

    def __init__(self, convolution: nn.Conv2d, norm: nn.Module) -> None:
        super().__init__()
        self.convolution, self.norm = convolution, norm

    def forward(self, images: Tensor) -> Tensor:
        features = self.convolution(images)
        normed: Tensor = self.norm(map_to_tokens(features))
        return normed.mT.unflatten(2, features.shape[2:])
