"""Settings of `recipes/reviewkd.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from recipes.pipeline.cams import CamConfig
from recipes.pipeline.classification import ClassifyConfig
from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.settings.shared import CAMS, CLASSIFY, SEGMENT


@dataclass(frozen=True)
class StudentConfig:
    """The student and its distillation."""

    network: SegmentConfig = field(default_factory=lambda: replace(SEGMENT["demo"], frozen_stages=0))
    """The student and its training."""
    depth: int = 4
    """Levels of its encoder, 3 to 5; with 4 the last stages are cut off, which hold most of the weights."""
    decoder_channels: int = 64
    """Width of its decoder; the teacher's has 256."""
    mid_channels: int = 64
    """Channels in which maps are fused."""
    weight: float = 1.0
    """Weight of the distillation."""
    warmup: float = 0.05
    """Share of the steps in which it grows."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    classify: ClassifyConfig = field(default_factory=lambda: CLASSIFY["demo"])
    cams: CamConfig = field(default_factory=lambda: CAMS["demo"])
    threshold: float = 0.25
    """Background score: a pixel whose CAMs are all below is background."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])
    """The teacher."""
    student: StudentConfig = field(default_factory=StudentConfig)


# A student whose decoder is as wide as the teacher's would cost as much. It learns all of its layers, since its shallow
# ones would otherwise be the teacher's own: both start from ImageNet with the same backbone in the short presets.
PRESETS = {
    "demo": Config(),
    "small": Config(
        classify=CLASSIFY["small"],
        cams=CAMS["small"],
        segment=SEGMENT["small"],
        student=StudentConfig(network=replace(SEGMENT["small"], frozen_stages=0)),
    ),
    "paper": Config(
        classify=CLASSIFY["paper"],
        cams=CAMS["paper"],
        threshold=0.15,
        segment=SEGMENT["paper"],
        student=StudentConfig(
            network=replace(SEGMENT["paper"], architecture="deeplabv3plus", encoder="resnet18", crop=320, crf=False),
            depth=5,
            mid_channels=256,
        ),
    ),
    "tiny": Config(
        data="demo:tiny",
        classify=CLASSIFY["tiny"],
        cams=CAMS["tiny"],
        segment=SEGMENT["tiny"],
        student=StudentConfig(network=replace(SEGMENT["tiny"], frozen_stages=0), mid_channels=16),
    ),
}
