"""Settings of `recipes/rca.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recipes.pipeline.classification import ClassifyConfig
from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import Schedule
from recipes.settings.shared import CLASSIFY, SEGMENT


@dataclass(frozen=True)
class RCAConfig:
    """The network with its memory, and its training."""

    backbone: str = "tf_efficientnet_lite0"
    """timm name; vgg16 has 8 pixels per cell."""
    weights: str = "classifier"
    """imagenet, random, a file, or classifier, the weights of a plain one."""
    output_stride: int = 16
    """Pixels per cell of the last map."""
    frozen_stages: int = 3
    """Stem and stages that keep their pretrained weights."""
    channels: int = 128
    """D, channels of features, embeddings and heads; another number than the backbone's is reached by a projection."""
    slots: int = 50
    """Slots a class of the memory: about as many as the median class has images, which are 500 on VOC."""
    prototypes: int = 10
    """Prototypes a class that pixels read."""
    read_out: Literal["released", "mean", "softmax"] = "softmax"
    """How pixels read prototypes: a sum as released, which grows with the cube of the features, a mean, a softmax."""
    legacy_memory: bool = False
    """Start the memory from noise and pool over intersections, as the released code does."""
    size: int = 128
    """Images are resized to a square of this side: no crop and no mirror, because cells are accumulated."""
    contrast: float = 0.08
    """Weight of the contrast as mean over images; released: 0.01 of the sum over a batch of 8."""
    read_from: int = 1
    """First epoch, from 0, that has prototypes in the memory and accumulates attention."""
    contrast_from: int = 1
    """First epoch with contrast; published: 2 of 30."""
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=5, batch_size=16, lr=0.005, head_lr=0.05))
    """Training schedule; ``head_lr`` is that of projection, embedding and both heads."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    saliency: str | None = None
    """Saliency maps: a run of c2am or a folder; by default those of the data set; none for masks without."""
    classify: ClassifyConfig = field(default_factory=lambda: CLASSIFY["demo"])
    """The plain classifier, whose weights the network may start from."""
    rca: RCAConfig = field(default_factory=RCAConfig)
    threshold: float = 0.25
    """Background score at which the attention maps are measured, and of masks without saliency."""
    alpha: float = 4.0
    """Exponent of the background score that enters the CRF."""
    mask_crf: bool = False
    """Train the segmentation on the labels made with the CRF, as published, where there is saliency. The maps of a
    short training are broad: a CRF makes them certain, so that more pixels contradict the saliency and are ignored: of
    the demo pictures 52 % in place of 10, of photographs 23 % in place of 7."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


PRESETS = {
    "demo": Config(),
    "small": Config(
        classify=CLASSIFY["small"],
        rca=RCAConfig(
            frozen_stages=4,
            slots=200,
            size=224,
            # twice the demo's rate of the heads, which are three layers deep; the plain classifier's layer takes 0.2
            schedule=Schedule(epochs=5, batch_size=16, lr=0.02, head_lr=0.1),
        ),
        segment=SEGMENT["small"],
    ),
    "paper": Config(
        rca=RCAConfig(
            backbone="vgg16",
            weights="imagenet",
            output_stride=8,
            frozen_stages=0,
            channels=512,
            slots=500,
            read_out="released",
            legacy_memory=True,
            size=368,
            contrast_from=2,
            schedule=Schedule(epochs=30, batch_size=8, lr=0.001, head_lr=0.01, weight_decay=5e-4),
        ),
        mask_crf=True,
        segment=SEGMENT["paper"],
    ),
    "tiny": Config(
        data="demo:tiny",
        classify=CLASSIFY["tiny"],
        rca=RCAConfig(channels=32, slots=8, schedule=Schedule(epochs=2, batch_size=4, lr=0.005, head_lr=0.05)),
        segment=SEGMENT["tiny"],
    ),
}
