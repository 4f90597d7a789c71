"""Backbones that give tokens: a ViT or DeiT of timm, or a pretrained convolutional network followed by a few blocks.

Both are a :class:`wsss_modules.TokenEncoder`, so that what reads tokens, class tokens or attention works on either.
"""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

from recipes.pipeline.models import Trunk, build_trunk, check_name, freeze_stages, load_weights
from wsss_modules import TokenEncoder, Tokens, TransformerBlock, token_encoder_from_vit

HYBRID = "hybrid:"


@dataclass(frozen=True)
class TokenConfig:
    """A backbone that gives tokens."""

    backbone: str = "hybrid:tf_efficientnet_lite0"
    """timm name of a ViT or DeiT; or hybrid:NAME, whose features at stride 16 are the patches of new blocks."""
    weights: str = "imagenet"
    """imagenet, random or a file; of a hybrid, those of its convolutional network."""
    frozen_stages: int = 4
    """Hybrid: stem and stages that keep their pretrained weights."""
    dim: int = 192
    """Hybrid: width of the tokens."""
    depth: int = 4
    """Hybrid: number of blocks."""
    heads: int = 6
    """Hybrid: heads of a block."""
    grid: int = 14
    """Hybrid: side of the grid of position embeddings, that of the training crops."""
    similar: bool = True
    """Hybrid: new blocks begin with queries equal to keys, so that patches attend to what looks like them, as in a
    pretrained transformer; else with attention that is the same everywhere."""
    drop_path: float = 0.0
    """Probability with which a branch of the last block is dropped; it grows with depth."""


class TokenTrunk(nn.Module):
    """Images to tokens. ``trunk(images, visit=..., layers=...)`` is :meth:`wsss_modules.TokenEncoder.forward`.

    Args:
        encoder: the encoder.
        name: the name it was made by.
        output_stride: pixels per patch.
        mean, std: normalisation of images in [0, 1].
    """

    def __init__(
        self,
        encoder: TokenEncoder,
        name: str,
        output_stride: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.encoder, self.name, self.output_stride, self.mean, self.std = encoder, name, output_stride, mean, std
        self.out_channels, self.depth = encoder.pos_embed.shape[2], len(encoder.blocks)
        self.num_heads = encoder.blocks[0].attn.num_heads

    def forward(self, images: Tensor, **options: object) -> Tokens:
        return self.encoder(images, **options)

    def with_output_stride(self, output_stride: int) -> TokenTrunk:
        """Itself: patches have one size, a larger image has more of them."""
        if output_stride != self.output_stride:
            raise ValueError(
                f"output_stride: {self.name} has patches of {self.output_stride} pixels, got {output_stride}; "
                "enlarge the image for more of them"
            )
        return self

    @property
    def convolutional(self) -> Trunk | None:
        """The convolutional part of a hybrid."""
        patches = self.encoder.patch_embed
        return patches.trunk if isinstance(patches, ConvolutionalPatches) else None


class ConvolutionalPatches(nn.Module):
    """Images to features of a convolutional network, projected to the width of the tokens: (B, dim, h, w)."""

    def __init__(self, trunk: Trunk, dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.projection = nn.Conv2d(trunk.out_channels, dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.trunk(images).final)


@torch.no_grad()
def attend_to_similar(block: TransformerBlock) -> None:
    """Make queries and keys the same random projection, under which products of tokens are about what they were.

    Of normed tokens it has values of deviation 1: with heads of d channels, a token's logit for itself is sqrt(d), for
    an unrelated one 0 with deviation 1.
    """
    dim = block.attn.qkv.in_features
    query, key, _ = block.attn.qkv.weight.split(dim)
    nn.init.normal_(query, std=dim**-0.5)
    key.copy_(query)


def build_token_trunk(
    config: TokenConfig, class_tokens: int | None = None, *, final_norm: bool = True, pos_offset: float = 0.0
) -> TokenTrunk:
    """Make a backbone that gives tokens.

    Args:
        config: which.
        class_tokens: number of class tokens; None: the ViT's own, and none before the patches of a hybrid.
        final_norm: norm after the last block.
        pos_offset: see :func:`wsss_modules.interpolate_pos_embed`.
    """
    if config.backbone.startswith(HYBRID):
        return _hybrid(config, class_tokens or 0, final_norm, pos_offset)
    name = config.backbone
    check_name(name)
    vit = timm.create_model(name, num_classes=0, drop_path_rate=config.drop_path)
    load_weights(vit, name, config.weights)
    encoder = token_encoder_from_vit(vit, class_tokens, final_norm=final_norm, pos_offset=pos_offset)
    cfg, (stride, _) = vit.pretrained_cfg, vit.patch_embed.patch_size
    return TokenTrunk(encoder, name, stride, tuple(cfg["mean"]), tuple(cfg["std"]))


def _hybrid(config: TokenConfig, class_tokens: int, final_norm: bool, pos_offset: float) -> TokenTrunk:
    trunk = build_trunk(config.backbone.removeprefix(HYBRID), config.weights, output_stride=16)
    freeze_stages(trunk.body, config.frozen_stages)
    rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
    blocks = [TransformerBlock(config.dim, config.heads, drop_path=rate) for rate in rates]
    if config.similar:
        for block in blocks:
            attend_to_similar(block)
    encoder = TokenEncoder(
        ConvolutionalPatches(trunk, config.dim),
        blocks,
        config.dim,
        num_prefix=class_tokens,
        grid=(config.grid, config.grid),
        norm=nn.LayerNorm(config.dim, eps=1e-6) if final_norm else None,
        pos_offset=pos_offset,
    )
    return TokenTrunk(encoder, config.backbone, 16, trunk.mean, trunk.std)
