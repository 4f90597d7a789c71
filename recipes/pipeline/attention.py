"""Transformers as backbones (ViT, MiT, hybrid) whose convolutional part, maps and attention logits can be had apart."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import segmentation_models_pytorch as smp
from torch import Tensor, nn

from recipes.pipeline.models import IMAGENET_MEAN, IMAGENET_STD, keep_statistics, load_weights
from recipes.pipeline.transformers import ConvolutionalPatches, TokenConfig, build_token_trunk
from wsss_modules import MixTransformer, query_key, tokens_to_map

MIT = {  # embed_dims, depths
    "mit_b0": ((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b1": ((64, 128, 320, 512), (2, 2, 2, 2)),
    "mit_b2": ((64, 128, 320, 512), (3, 4, 6, 3)),
}


class Attended(NamedTuple):
    """``levels``: maps from fine to coarse; ``final`` (B, D, h, w); ``attentions``: logits (B, heads, N, N)."""

    levels: tuple[Tensor, ...]
    final: Tensor
    attentions: tuple[Tensor, ...]


class AttendingTrunk(nn.Module):
    """A transformer backbone.

    ``stem(images)`` is what comes before the blocks of a hybrid and is the same in training and evaluation, so that
    two passes over the same images may share it; ``encode`` goes on from there. ViT and MiT have no stem. Images have
    at least ``smallest`` pixels a side.

    Args:
        config: a timm name, hybrid:NAME or mit_b0 to mit_b2.
        export: number of last blocks whose attention logits are given.
        weights: in place of those of ``config``.
    """

    def __init__(self, config: TokenConfig, export: int = 2, weights: str | None = None) -> None:
        super().__init__()
        config = config if weights is None else replace(config, weights=weights)
        self.name, self.export, self.body = config.backbone, export, None
        if config.backbone in MIT:
            self.encoder: nn.Module = _mix_transformer(config, export)
            self.mean, self.std, self.output_stride, self.smallest = IMAGENET_MEAN, IMAGENET_STD, 16, 32
            self.new: list[nn.Module | nn.Parameter] = []
            self.level_channels, self.num_maps = self.encoder.embed_dims, self.encoder.num_maps
        else:
            trunk = build_token_trunk(config)
            self.encoder, self.mean, self.std, self.output_stride = (
                trunk.encoder,
                trunk.mean,
                trunk.std,
                trunk.output_stride,
            )
            self.num_maps, self.new, channels = export * trunk.num_heads, [], ()
            self.smallest = self.output_stride
            if isinstance(trunk.encoder.patch_embed, ConvolutionalPatches):
                patches = trunk.encoder.patch_embed
                self.body, trunk.encoder.patch_embed = patches.trunk, patches.projection
                encoder = trunk.encoder
                self.new = [patches.projection, encoder.blocks, encoder.prefix, encoder.pos_embed, encoder.norm]
                channels = patches.trunk.level_channels[1:-1]  # strides 4 to 16
            self.level_channels = (*channels, trunk.out_channels)
        self.out_channels = self.level_channels[-1]
        self.head_width = self.out_channels * export // self.num_maps

    def train(self, mode: bool = True) -> AttendingTrunk:
        super().train(mode)
        keep_statistics(self)
        return self

    def pretrained(self) -> list[nn.Parameter]:
        """Trained parameters that do not start anew."""
        parts = ([part] if isinstance(part, nn.Parameter) else part.parameters() for part in self.new)
        new = {id(parameter) for part in parts for parameter in part}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in new]

    def stem(self, images: Tensor) -> tuple[Tensor, ...]:
        """Levels of the convolutional part, the last one being what the blocks see; the images if there is none."""
        if self.body is None:
            return (images,)
        features = self.body(images)
        return (*features.levels[1:-1], features.final)

    def encode(self, stem: tuple[Tensor, ...], *, attention: bool = True) -> Attended:
        *levels, last = stem
        if isinstance(self.encoder, MixTransformer):
            out = self.encoder(last)
            return Attended(out.features, out.features[-1], out.attentions)
        logits: list[Tensor] = []

        def visit(layer: int, block: nn.Module, tokens: Tensor) -> None:
            if layer >= len(self.encoder.blocks) - self.export:
                query, key = (x[:, :, self.encoder.num_prefix :] for x in query_key(block, tokens))
                logits.append(query @ key.mT)

        tokens = self.encoder(last, visit=visit if attention else None)
        final = tokens_to_map(tokens.patches, tokens.grid)
        return Attended((*levels, final), final, tuple(logits))

    def forward(self, images: Tensor, *, attention: bool = True) -> Attended:
        return self.encode(self.stem(images), attention=attention)


def _mix_transformer(config: TokenConfig, export: int) -> MixTransformer:
    dims, depths = MIT[config.backbone]
    net = MixTransformer(dims, depths, drop_path=config.drop_path, export=export)
    if config.weights == "imagenet":
        try:
            source = smp.encoders.get_encoder(config.backbone, weights="imagenet")
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"weights: no ImageNet weights of {config.backbone} ({reason}); give a file") from error
        net.load_released_state_dict(source.state_dict())
    elif config.weights != "random":
        load_weights(net, config.backbone, config.weights)
    return net


def freeze_norms(module: nn.Module) -> None:
    """Stop training the norms below ``module``."""
    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm | nn.BatchNorm2d):
            layer.requires_grad_(False)


def freeze_but_last(trunk: AttendingTrunk, blocks: int) -> None:
    """Of a ViT, train the last ``blocks`` and the final norm only."""
    if isinstance(trunk.encoder, MixTransformer):
        raise ValueError(f"trained_blocks: expected None for {trunk.name}; a ViT can be trained in part")
    depth = len(trunk.encoder.blocks)
    if not 0 <= blocks <= depth:
        raise ValueError(f"trained_blocks: expected 0 to {depth}, the blocks of {trunk.name}, got {blocks}")
    trunk.encoder.requires_grad_(False)
    for layer in [*list(trunk.encoder.blocks)[depth - blocks :], trunk.encoder.norm]:
        layer.requires_grad_(True)
