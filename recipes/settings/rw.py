"""Settings of `recipes/rw.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recipes.pipeline.cams import CamConfig
from recipes.pipeline.classification import ClassifyConfig
from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import Schedule
from recipes.settings.shared import CAMS, CLASSIFY, SEGMENT


@dataclass(frozen=True)
class AffinityConfig:
    """The affinity network and its training."""

    backbone: str = "tf_efficientnet_lite0"
    """timm name or resnet38; its last three maps are compared at stride 8."""
    weights: str = "classifier"
    """classifier (where its backbone is the same), imagenet, random or a file."""
    frozen_stages: int = 0
    """Stem and stages that keep their weights."""
    radius: int = 5
    """Reach of the affinities in cells."""
    border: Literal["full", "released"] = "full"
    """full: all pairs; released: the crop of the released code, which leaves some pixels without any pair."""
    low_alpha: float = 4.0
    """Exponent of the strong background: what is foreground even so is trusted."""
    high_alpha: float = 24.0
    """Exponent of the weak background: what is background even so is trusted."""
    crop: int = 128
    """Side of the training crops in pixels."""
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=3, batch_size=8, lr=0.01, head_lr=0.1))
    """Training schedule."""


@dataclass(frozen=True)
class WalkConfig:
    """The random walk of CAMs and background score."""

    alpha: float = 16.0
    """Exponent of the background score that walks with the CAMs."""
    background: float | None = None
    """A constant background score in the place of the power (MCTformer)."""
    beta: float = 8.0
    """Exponent that sharpens the affinities."""
    steps: int = 256
    """Number of steps."""
    method: Literal["power", "chebyshev"] = "chebyshev"
    """power, or chebyshev, which gives the same result to 1e-6 with a third of the products."""


# A walk of n steps reaches about sqrt(n) cells: 256 steps for photographs of 60 cells are 16 for pictures of 16.
DEMO_WALK = WalkConfig(steps=16)


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    classify: ClassifyConfig = field(default_factory=lambda: CLASSIFY["demo"])
    cams: CamConfig = field(default_factory=lambda: CAMS["demo"])
    threshold: float = 0.25
    """Background score at which the CAMs themselves are measured."""
    affinity: AffinityConfig = field(default_factory=AffinityConfig)
    walk: WalkConfig = field(default_factory=lambda: DEMO_WALK)
    mask_crf: bool = True
    """Train the segmentation on CRF-refined masks."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


PRESETS = {
    "demo": Config(),
    "small": Config(
        classify=CLASSIFY["small"],
        cams=CAMS["small"],
        affinity=AffinityConfig(
            frozen_stages=4, crop=256, schedule=Schedule(epochs=3, batch_size=8, lr=0.01, head_lr=0.1)
        ),
        walk=WalkConfig(),
        segment=SEGMENT["small"],
    ),
    "paper": Config(
        classify=ClassifyConfig(
            backbone="resnet38",
            output_stride=8,
            frozen_stages=2,
            dropout=0.5,
            long_side=(256, 512),
            crop=448,
            jitter=True,
            double_biases=True,
            schedule=Schedule(epochs=15, batch_size=16, lr=0.1, head_lr=1.0, weight_decay=5e-4, momentum=5e-4),
        ),
        cams=CAMS["paper"],
        threshold=0.2,
        affinity=AffinityConfig(
            backbone="resnet38",
            frozen_stages=2,
            border="released",
            high_alpha=32.0,
            crop=448,
            schedule=Schedule(epochs=8, batch_size=8, lr=0.1, head_lr=1.0, weight_decay=5e-4, momentum=5e-4),
        ),
        walk=WalkConfig(),
        segment=SEGMENT["paper"],
    ),
    "tiny": Config(
        data="demo:tiny",
        classify=CLASSIFY["tiny"],
        cams=CAMS["tiny"],
        affinity=AffinityConfig(schedule=Schedule(epochs=1, batch_size=4, lr=0.01, head_lr=0.1)),
        segment=SEGMENT["tiny"],
    ),
}
