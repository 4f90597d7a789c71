"""Settings of `recipes/bana.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from recipes.pipeline.data.boxes import BoxOrigin
from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import Schedule
from recipes.settings.shared import SEGMENT


@dataclass(frozen=True)
class BoxConfig:
    """The classifier of boxes, and how it labels images."""

    backbone: str = "tf_efficientnet_lite0"
    """timm name; vgg16 has 8 pixels per cell."""
    weights: str = "imagenet"
    """imagenet, random or a file."""
    output_stride: int = 16
    """Pixels per cell of the last map."""
    frozen_stages: int = 3
    """Stem and stages that keep their pretrained weights."""
    channels: int = 0
    """Channels of two further layers, 3 x 3 and 1 x 1, as VGG's fc6 and fc7; 0 leaves them out."""
    dropout: float = 0.0
    """Channel dropout before the pooling."""
    grid: int = 4
    """Background queries a side in training."""
    align_corners: bool = False
    """Read features where the boxes lie; the released code is up to half a cell off."""
    scale: tuple[float, float] = (0.75, 1.5)
    """Range of the random resizing."""
    crop: int = 128
    """Side of the training crops in pixels."""
    jitter: bool = True
    """Jitter the colours."""
    label_scale: float = 2.0
    """Size of images when they are labelled; published: 1."""
    threshold: float = 0.99
    """Share of the greatest background attention below which it counts for nothing."""
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=6, batch_size=16, lr=0.001, head_lr=0.01))
    """Training schedule; ``head_lr`` is that of the new layers."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    boxes: BoxOrigin = "annotations"
    """Boxes of the data set; components_of_masks makes them from ground-truth masks."""
    box: BoxConfig = field(default_factory=BoxConfig)
    seed_threshold: float = 0.25
    """Background score at which the class maps themselves are measured."""
    temperature: float = 20.0
    """Factor of the cosines of the segmentation network."""
    gamma: float = 7.0
    """Exponent of the confidence in labels that only the CRF gives."""
    lam: float = 0.1
    """Weight of these labels."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


PRESETS = {
    # at five times its rates the classifier of boxes lost its features with one seed of three: 99 % of the channels
    # were 0, and the loss ended at .98 in place of .35
    "demo": Config(),
    # about the budget of cam's classifier and segmentation: 5 + 4 epochs of 224 pixels. Photographs vary less in scale
    # than the published 0.5 to 1.5 on 321 pixels would have it, so crops of 224 take the factors of the other recipes.
    "small": Config(
        box=BoxConfig(
            frozen_stages=4,
            scale=(0.5, 1.0),
            crop=224,
            label_scale=1.0,
            schedule=Schedule(epochs=5, batch_size=16, lr=0.005, head_lr=0.05),  # diverged at 0.02 and 0.2
        ),
        # cosines times 20 have steep gradients: at five times these rates the loss rose from .87 to 1.2 and stayed
        segment=replace(SEGMENT["small"], schedule=replace(SEGMENT["small"].schedule, lr=0.002, head_lr=0.02)),
    ),
    "paper": Config(
        box=BoxConfig(
            backbone="vgg16",
            output_stride=8,
            frozen_stages=0,
            channels=1024,
            dropout=0.5,
            scale=(0.5, 1.5),
            crop=321,
            label_scale=1.0,
            schedule=Schedule(epochs=15, batch_size=20, lr=1e-3, head_lr=1e-2, weight_decay=5e-4),
        ),
        segment=replace(
            SEGMENT["paper"],
            architecture="largefov",
            encoder="vgg16",
            schedule=Schedule(epochs=45, batch_size=20, lr=1e-3, head_lr=1e-2, weight_decay=5e-4),
            test_scales=(0.5, 0.75, 1.0, 1.5),
        ),
    ),
    "tiny": Config(
        data="demo:tiny",
        box=BoxConfig(label_scale=1.0, schedule=Schedule(epochs=1, batch_size=4, lr=0.005, head_lr=0.05)),
        segment=SEGMENT["tiny"],
    ),
}
