"""Images to tokens: a transformer made of given parts, or of those of a timm ViT or DeiT.

Axes: B images, P prefix tokens (class tokens and registers), N patches on a grid of h by w, D channels, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wsss_modules._checks import check_ndim, check_shape
from wsss_modules.tokens.grid import grid_of_positions, interpolate_pos_embed, map_to_tokens, patch_grid

__all__ = ["TokenEncoder", "Tokens", "token_encoder_from_vit"]

Visit = Callable[[int, nn.Module, Tensor], None]


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
        dim: D, width of the tokens.
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
        >>> from wsss_modules import TransformerBlock, tokens_to_map
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
        >>> from wsss_modules import TransformerBlock
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
    grid = getattr(patch_embed, "grid_size", None) or grid_of_positions(positions.shape[1], num_own, None)
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
