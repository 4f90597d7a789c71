"""The segmentation network, DeepLab in three forms on any backbone, and heads for networks of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.pipeline.models import Features, build_trunk, freeze_stages, keep_statistics, load_weights
from recipes.pipeline.training import Schedule


@dataclass(frozen=True)
class SegmentConfig:
    """The segmentation network, its training and its test."""

    architecture: str = "deeplabv3plus"
    """deeplabv3plus, deeplabv2 or largefov."""
    encoder: str = "tf_efficientnet_lite0"
    """timm backbone (deeplabv2 and largefov: also resnet38)."""
    weights: str = "imagenet"
    """imagenet, random or a file."""
    output_stride: int = 16
    """Pixels per cell of the encoder's last map."""
    frozen_stages: int = 0
    """Stem and stages that keep their pretrained weights."""
    scale: tuple[float, float] = (0.5, 1.5)
    """Range of the random resizing."""
    crop: int = 256
    """Side of the training crops in pixels."""
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=5, batch_size=16, lr=0.01, head_lr=0.1))
    """Training schedule."""
    test_scales: tuple[float, ...] = (0.75, 1.0, 1.25)
    """Sizes averaged at test time, each with its mirror image."""
    crf: bool = False
    """Also refine the probabilities with a dense CRF."""


DEEPLAB_RATES = {"deeplabv2": (6, 12, 18, 24), "largefov": (12,)}


class DeepLabHead(nn.Module):
    """Sum of parallel dilated 3 x 3 convolutions (DeepLabV2's ASPP); one of rate 12 is DeepLab-LargeFOV.

    Paper: Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and
    Fully Connected CRFs", TPAMI 2018, arXiv:1606.00915.
    """

    def __init__(self, in_channels: int, num_classes: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, num_classes, 3, padding=rate, dilation=rate) for rate in rates
        )
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def forward(self, features: Features) -> Tensor:
        return sum(branch(features.final) for branch in self.branches)


class SegFormerHead(nn.Module):
    """Each level brought to one width, enlarged to the finest and mixed: levels to logits (B, classes, h, w).

    Paper: Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers", NeurIPS
    2021, arXiv:2105.15203, whose batch norm, synchronised there, is a group norm here, for small batches.
    """

    def __init__(self, channels: Sequence[int], dim: int, classes: int) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in channels)
        self.mix = nn.Sequential(
            nn.Conv2d(dim * len(channels), dim, 1, bias=False),
            nn.GroupNorm(min(8, dim), dim),
            nn.ReLU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(dim, classes, 1),
        )

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        size = levels[0].shape[-2:]
        maps = [project(level) for project, level in zip(self.project, levels, strict=True)]
        large = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in maps]
        return self.mix(torch.cat(large[::-1], 1))


class Segmenter(nn.Module):
    """Images (B, 3, H, W) to logits (B, 1 + K, h, w), with a backbone whose batch norm keeps its stored statistics.

    ``head_modules`` are the layers without pretrained weights; ``mean`` and ``std`` normalise images in [0, 1]. With
    DeepLabV3+, ``depth`` (3 to 5) is the number of levels of the encoder, the rest of which is cut off, and
    ``decoder_channels`` the width of the decoder.
    """

    def __init__(self, config: SegmentConfig, num_classes: int, *, depth: int = 5, decoder_channels: int = 256) -> None:
        super().__init__()
        self.depth, self.decoder_channels = depth, decoder_channels
        self.encoder: nn.Module
        if config.architecture == "deeplabv3plus":
            self.net = smp.DeepLabV3Plus(
                f"tu-{config.encoder}",
                encoder_weights=None,
                encoder_depth=depth,
                encoder_output_stride=config.output_stride,
                decoder_channels=decoder_channels,
                classes=num_classes,
            )
            self.encoder = self.net.encoder
            body = self.encoder.model
            if depth < 5:
                cut_off(body)
            load_weights(body, config.encoder, config.weights)
            freeze_stages(body, config.frozen_stages)
            self.head_modules = [self.net.decoder, self.net.segmentation_head]
            pretrained = timm.get_pretrained_cfg(config.encoder)
            self.mean, self.std = pretrained.mean, pretrained.std
        elif config.architecture in DEEPLAB_RATES:
            self.encoder = build_trunk(config.encoder, config.weights, config.output_stride)
            freeze_stages(self.encoder.body, config.frozen_stages)
            head = DeepLabHead(self.encoder.out_channels, num_classes, DEEPLAB_RATES[config.architecture])
            self.net = nn.Sequential(self.encoder, head)
            self.head_modules = [head]
            self.mean, self.std = self.encoder.mean, self.encoder.std
        else:
            raise ValueError(
                f"architecture: expected deeplabv3plus, {', '.join(DEEPLAB_RATES)}, got {config.architecture!r}"
            )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def with_levels(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The logits, and the maps of the encoder from fine to coarse."""
        features = self.encoder(images)
        if isinstance(features, Features):
            return self.head_modules[0](features), features.levels
        logits = self.net.segmentation_head(self.net.decoder(features))
        return logits, tuple(features[1:])  # the first is the image itself

    def train(self, mode: bool = True) -> Segmenter:
        super().train(mode)
        keep_statistics(self.encoder)
        return self


def cut_off(body: nn.Module) -> None:
    """Leave out the blocks of an EfficientNet or MobileNet behind its last level; of other networks timm does so."""
    stages = [info["stage"] for info in body.feature_info.get_dicts() if "stage" in info]
    if stages and isinstance(getattr(body, "blocks", None), nn.Sequential):
        body.blocks = body.blocks[: max(stages)]
