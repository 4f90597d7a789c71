"""Settings of `recipes/c2am.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from recipes.pipeline.cams import CamConfig
from recipes.pipeline.classification import ClassifyConfig
from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import Schedule
from recipes.settings.shared import CAMS, CLASSIFY, SEGMENT


@dataclass(frozen=True)
class ContrastConfig:
    """The network of the class-agnostic map and its training, without labels."""

    makes_cams: ClassVar[bool] = False  # the classifier does
    backbone: str = "tf_efficientnet_lite0"
    """timm name, or NAME-irn for an undilated stride-16 ResNet; its last two levels are joined."""
    weights: str = "classifier"
    """classifier, imagenet, random or a file, such as the encoder of a self-supervised network."""
    output_stride: int = 32
    """Pixels per cell of the last level while training; it is brought to the cells of the level before."""
    frozen_stages: int | None = None
    """Stem and stages that keep their weights; None: the whole backbone, so that only the map is learnt."""
    side: int = 256
    """The images are resized to squares of so many pixels a side,"""
    crop: int = 224
    """and cropped to this, so that the border of a crop is nearly that of the image."""
    alpha: float = 0.25
    """Decay of the pull with the rank of a neighbour in the batch; smaller for batches with few images of a class."""
    normalize: Literal["n2", "pairs", "weights"] = "weights"
    """How the pull is averaged: as released (n2), or independent of the batch size (weights)."""
    pull_weight: float = 0.035
    """Weight of the pull: 1 for n2; 0.035 for weights, which is the same at the published batch of 128."""
    border: int = 2
    """Width of the border that tells the background, in cells: a seventh of the side, as published."""
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=10, batch_size=32, lr=0.01, head_lr=0.01))
    """Training schedule. The batch is what is contrasted, so it should be large."""


@dataclass(frozen=True)
class CueConfig:
    """From the network to the saliency maps."""

    long_side: int | None = 256
    """Longer side of the image at scale 1 in pixels, about that of the training; None: the image's own."""
    scales: tuple[float, ...] = (1.0, 0.5, 1.5, 2.0)
    """Sizes whose maps are added, each with its mirror image."""
    invert: Literal["one_minus", "negate"] = "negate"
    """How maps that fire on the background are turned round: as released (one_minus), or alike for both polarities."""
    threshold: float = 0.3
    """What exceeds it is foreground for the dense CRF."""
    network: bool = False
    """Train a saliency network on the maps after the CRF, and take its maps."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    classify: ClassifyConfig = field(default_factory=lambda: CLASSIFY["demo"])
    cams: CamConfig = field(default_factory=lambda: CAMS["demo"])
    threshold: float = 0.25
    """Background score at which the CAMs themselves are measured."""
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    cue: CueConfig = field(default_factory=CueConfig)
    saliency: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])
    """The saliency network, where there is one."""
    mask_crf: bool = True
    """Train the segmentation on CRF-refined masks."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


PRESETS = {
    "demo": Config(cue=CueConfig(scales=(1.0,))),
    # The backbone, whose ImageNet weights tell objects from grounds already, stays as it is: a thousand photographs in
    # a hundred steps would rather teach it where objects lie in a picture. So 100 steps of 64 crops cost a third of the
    # classifier's training. With 6 classes such a batch has about as many images of each as 128 have of VOC's 20, which
    # is what a pull of alpha 0.25 reaches; its weight is that of 128.
    "small": Config(
        classify=CLASSIFY["small"],
        cams=CAMS["small"],
        contrast=ContrastConfig(schedule=Schedule(epochs=5, batch_size=64, lr=0.01, head_lr=0.01)),
        cue=CueConfig(scales=CAMS["small"].scales),
        saliency=SEGMENT["small"],
        segment=SEGMENT["small"],
    ),
    "paper": Config(
        classify=CLASSIFY["paper"],
        cams=CAMS["paper"],
        threshold=0.15,
        contrast=ContrastConfig(
            backbone="resnet50-irn",
            weights="imagenet",
            output_stride=16,
            frozen_stages=0,
            side=512,
            crop=448,
            normalize="n2",
            pull_weight=1.0,
            border=4,
            schedule=Schedule(epochs=10, batch_size=128, lr=0.001, head_lr=0.001, momentum=1e-4),
        ),
        cue=CueConfig(long_side=None, invert="one_minus", network=True),
        saliency=SegmentConfig(  # in PoolNet's place, with its backbone and epochs
            encoder="resnet50",
            crop=320,
            schedule=Schedule(epochs=9, batch_size=10, lr=0.001, head_lr=0.01, weight_decay=5e-4),
        ),
        mask_crf=False,
        segment=SEGMENT["paper"],
    ),
    "tiny": Config(
        data="demo:tiny",
        classify=CLASSIFY["tiny"],
        cams=CAMS["tiny"],
        contrast=ContrastConfig(schedule=Schedule(epochs=2, batch_size=8, lr=0.01, head_lr=0.01)),
        cue=CueConfig(scales=(1.0,), network=True),
        saliency=SEGMENT["tiny"],
        segment=SEGMENT["tiny"],
    ),
}
