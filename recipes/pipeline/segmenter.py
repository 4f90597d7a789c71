"""Segmentation networks: DeepLab in three forms on any backbone, with logits or cosines, and SegFormer's decoder.

Each gives the ``probabilities`` (1 + K, H, W) of an image (3, H, W) uint8 seen at several scales, has the ``mean`` and
``std`` by which images in [0, 1] are normalised, the settings of the dense CRF that refines its masks, and in ``net``
all of its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.pipeline.attention import AttendingTrunk
from recipes.pipeline.models import Features, build_trunk, freeze_stages, keep_statistics, load_weights
from recipes.pipeline.training import Schedule
from recipes.pipeline.transformers import TokenConfig
from recipes.pipeline.views import views
from wsss_modules import DEEPLAB_CRF, CosineClassifier


@dataclass(frozen=True)
class SegmentConfig:
    """The segmentation network, its training and its test."""

    architecture: Literal["deeplabv3plus", "deeplabv2", "largefov"] = "deeplabv3plus"
    """DeepLabV3+ with a decoder; the four dilated branches of DeepLabV2; or DeepLab-LargeFOV, one branch."""
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

    ``head_modules`` are the layers without pretrained weights. With DeepLabV3+, ``depth`` (3 to 5) is the number of
    levels of the encoder, the rest of which is cut off, and ``decoder_channels`` the width of the decoder.
    """

    crf_settings = DEEPLAB_CRF

    def __init__(self, config: SegmentConfig, num_classes: int, *, depth: int = 5, decoder_channels: int = 256) -> None:
        super().__init__()
        self.shape: dict[str, float] = {"depth": depth, "decoder_channels": decoder_channels}
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
            load_weights(body, config.encoder, config.weights)
            if depth < 5:
                cut_off(body)
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

    def probabilities(self, image: Tensor, scales: Sequence[float]) -> Tensor:
        """Softmax averaged over scales and mirror images."""
        total = image.new_zeros((), dtype=torch.float32)
        for both in views(image, self, scales, multiple=16):
            plain, mirrored = self(both)
            logits = torch.stack([plain, mirrored.flip(-1)]).float()
            up = F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)
            total = total + up.softmax(1).mean(0)
        return total / len(scales)

    def train(self, mode: bool = True) -> Segmenter:
        super().train(mode)
        keep_statistics(self.encoder)
        return self


class CosineSegmenter(Segmenter):
    """The network with cosines times a temperature in place of its last layer, as BANA has it.

    DeepLab-LargeFOV, BANA's form with VGG-16, has the CRF published with it; that of its ResNet-101 is DeepLab's.
    """

    def __init__(self, config: SegmentConfig, num_classes: int, *, temperature: float) -> None:
        super().__init__(config, num_classes)
        self.temperature, self.shape = temperature, {"temperature": temperature}
        if config.architecture == "deeplabv3plus":
            channels = self.net.segmentation_head[0].in_channels
            self.net.segmentation_head = CosineClassifier(channels, num_classes)
            self.head_modules = [self.net.decoder, self.net.segmentation_head]
        else:
            if config.architecture == "largefov":
                self.crf_settings = replace(DEEPLAB_CRF, gaussian_sxy=3.0, bilateral_sxy=121.0, bilateral_srgb=5.0)
            rate = DEEPLAB_RATES[config.architecture][0]
            head = CosineHead(self.encoder.out_channels, num_classes, rate)
            self.net, self.head_modules = nn.Sequential(self.encoder, head), [head]

    def forward(self, images: Tensor) -> Tensor:
        return self.temperature * self.net(images)


class CosineHead(nn.Module):
    """DeepLab's fc6, dilated, its fc7, and cosines with the weight of each class."""

    def __init__(self, in_channels: int, num_classes: int, rate: int, channels: int = 1024) -> None:
        super().__init__()
        self.fc6 = nn.Conv2d(in_channels, channels, 3, padding=rate, dilation=rate)
        self.fc7 = nn.Conv2d(channels, channels, 1)
        self.classifier = CosineClassifier(channels, num_classes)

    def forward(self, features: Features) -> Tensor:
        return self.classifier(self.fc7(self.fc6(features.final).relu()).relu())


@dataclass(frozen=True)
class SegFormerConfig:
    """A transformer with SegFormer's decoder, and its test."""

    tokens: TokenConfig
    """The transformer."""
    dim: int
    """Width of the decoder."""
    test_scales: tuple[float, ...]
    """Sizes of which the largest scores are taken at test time, each with its mirror image."""
    crf: bool
    """Also refine the probabilities with a dense CRF."""


class SegFormer(nn.Module):
    """A transformer and SegFormer's decoder, as AFA has them: images (B, 3, H, W) to logits (B, 1 + K, h, w)."""

    crf_settings = replace(DEEPLAB_CRF, gaussian_sxy=3.0, bilateral_sxy=64.0, bilateral_srgb=5.0)  # AFA's

    def __init__(self, trunk: AttendingTrunk, decoder: SegFormerHead) -> None:
        super().__init__()
        self.net, self.mean, self.std = nn.Sequential(trunk, decoder), trunk.mean, trunk.std
        self.shape: dict[str, float] = {}

    def forward(self, images: Tensor) -> Tensor:
        trunk, decoder = self.net
        return decoder(trunk(images, attention=False).levels)

    def probabilities(self, image: Tensor, scales: Sequence[float]) -> Tensor:
        """Softmax of the largest scores over all scales."""
        trunk = self.net[0]
        seen = views(image, self, scales, multiple=trunk.output_stride, smallest=trunk.smallest)
        merged = merge_views([self(both) for both in seen])
        return F.interpolate(merged, image.shape[-2:], mode="bilinear", align_corners=False)[0].softmax(0)


def merge_views(logits: Sequence[Tensor]) -> Tensor:
    """Segmentations (2B, C, h, w) of images, then their mirror images, at several scales: averaged, the largest taken.

    Returns (B, C, h, w) at the size of the first.
    """
    size = logits[0].shape[-2:]
    large = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in logits]
    halves = [x.chunk(2) for x in large]
    return torch.stack([(plain + mirrored.flip(-1)) / 2 for plain, mirrored in halves]).amax(0)


def cut_off(body: nn.Module) -> None:
    """Leave out the blocks of an EfficientNet or MobileNet behind its last level; of other networks timm does so."""
    stages = [info["stage"] for info in body.feature_info.get_dicts() if "stage" in info]
    if stages and isinstance(getattr(body, "blocks", None), nn.Sequential):
        body.blocks = body.blocks[: max(stages)]
