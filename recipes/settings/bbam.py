"""Settings of `recipes/bbam.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.pipeline.data.boxes import BoxOrigin
from recipes.pipeline.detection import DetectConfig
from recipes.pipeline.instances import MaskHeadConfig
from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import AdamSchedule, Schedule
from recipes.settings.shared import SEGMENT


@dataclass(frozen=True)
class ExplainConfig:
    """How the part of an image that an object needs is sought."""

    steps: int = 20
    """Steps of Adam; published: 300."""
    lr: float = 0.1
    """Its rate, about how far a cell moves in a step; published: 0.02."""
    area: float = 0.007
    """Price of a cell that stays."""
    tv: float = 1e-4
    """Weight of the roughness."""
    stride: tuple[float, float] = (6.0, 10.0)
    """Pixels a side of a cell, and how many more for an object as large as the image; published: 16 and 48."""
    proposals: int = 200
    """Proposals around each box; published: 1000."""
    positives: int = 20
    """Of these, as many explain the object together; published: 100."""
    at_once: int = 8
    """Objects of an image in one batch."""


@dataclass(frozen=True)
class MaskConfig:
    """How attribution maps become masks of instances."""

    strict: float = 0.85
    """Share of a box that is not certain in strict masks."""
    loose: float = 0.2
    """The same of loose masks; what lies between them is left open."""
    blur: tuple[float, float] = (3.0, 8.0)
    """Radius of the blur in pixels, and how much more for a box as large as the image; published: 16 and 48."""
    stretch: bool = True
    """Let the values of a map go from 0 to 1; the released code leaves boxes that cover the image without a mask."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    boxes: BoxOrigin = "annotations"
    """Boxes of the data set; components_of_masks makes them from ground-truth masks."""
    detect: DetectConfig = field(default_factory=DetectConfig)
    explain: ExplainConfig = field(default_factory=ExplainConfig)
    seed_threshold: float = 0.25
    """Background score at which the attribution maps themselves are measured."""
    masks: MaskConfig = field(default_factory=MaskConfig)
    mask_head: MaskHeadConfig = field(default_factory=MaskHeadConfig)
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


PRESETS = {
    "demo": Config(),
    # Images of 224 pixels, as cam's classifier sees them, and cam's segmentation; cells and blur shrink from the short
    # side of 800 pixels that they were published for to 224 and to VOC's 375. Of 103 objects of VOC's training images
    # the detector found 25 % after 162 steps of SGD at 0.005 and 0.01, 42 % after as many of AdamW, and after these 8
    # epochs 64 % of 59; at 0.01 and 0.05 the units of its second stage died.
    "small": Config(
        detect=DetectConfig(
            frozen_stages=4,
            anchors=(28, 70, 140),
            size=224,
            schedule=AdamSchedule(epochs=8, batch_size=16, lr=2e-4, head_lr=1e-3),
        ),
        explain=ExplainConfig(stride=(7.0, 14.0)),
        masks=MaskConfig(blur=(16.0, 48.0)),
        segment=SEGMENT["small"],
    ),
    "paper": Config(
        detect=DetectConfig(
            backbone="resnet101",
            frozen_stages=2,
            strides=(4, 8, 16, 32),
            anchors=(32, 64, 128, 256),
            channels=256,
            hidden=1024,
            size=800,
            schedule=Schedule(epochs=27, batch_size=16, lr=0.01, head_lr=0.01),
        ),
        explain=ExplainConfig(steps=300, lr=0.02, stride=(16.0, 48.0), proposals=1000, positives=100, at_once=4),
        masks=MaskConfig(blur=(16.0, 48.0), stretch=False),
        mask_head=MaskHeadConfig(
            channels=256, schedule=Schedule(epochs=15, batch_size=8, lr=0.008, head_lr=0.008, weight_decay=1e-4)
        ),
        segment=SEGMENT["paper"],
    ),
    "tiny": Config(
        data="demo:tiny",
        detect=DetectConfig(size=96, schedule=Schedule(epochs=1, batch_size=4, lr=0.005, head_lr=0.02)),
        explain=ExplainConfig(steps=3, lr=0.3, proposals=20, positives=5),
        mask_head=MaskHeadConfig(schedule=Schedule(epochs=1, batch_size=4, lr=0.02, head_lr=0.02)),
        segment=SEGMENT["tiny"],
    ),
}
