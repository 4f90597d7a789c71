"""Settings of `recipes/irn.py`."""

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
class RelationConfig:
    """The inter-pixel relation network and its training."""

    backbone: str = "tf_efficientnet_lite0"
    """timm name of the frozen backbone; NAME-irn for an undilated stride-16 ResNet."""
    weights: str = "imagenet"
    """imagenet, random or a file."""
    foreground: float = 0.30
    """Background score under which an area is trusted to be foreground."""
    background: float = 0.05
    """Background score under which an area is trusted to be background."""
    radius: int = 10
    """Reach of the training pairs in cells of 4 pixels."""
    zoom: float = 2.0
    """Enlargement of the images for this network; the published 1 suits photographs, 2 the small demo pictures."""
    scale: tuple[float, float] = (1.5, 2.5)
    """Range of the random resizing."""
    crop: int = 192
    """Side of the training crops in pixels."""
    schedule: Schedule = field(
        default_factory=lambda: Schedule(epochs=4, batch_size=8, lr=0.1, head_lr=1.0, momentum=1e-4)
    )
    """Training schedule; ``lr`` is that of the boundary branch, ``head_lr`` that of the displacement branch."""


@dataclass(frozen=True)
class WalkConfig:
    """The random walk of the CAMs between boundaries."""

    radius: int = 5
    """Reach of a step in cells of 4 pixels."""
    beta: float = 10.0
    """Exponent that sharpens the affinities."""
    steps: int = 256
    """Number of steps."""
    method: Literal["power", "chebyshev"] = "chebyshev"
    """power, or chebyshev, which gives the same result to 1e-6 with a third of the products."""
    cam_power: float = 1.0
    """Exponent of the CAMs before the walk."""
    threshold: float = 0.25
    """Background score after the walk."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    classify: ClassifyConfig = field(default_factory=lambda: CLASSIFY["demo"])
    cams: CamConfig = field(default_factory=lambda: CAMS["demo"])
    threshold: float = 0.25
    """Background score at which the CAMs themselves are measured."""
    relation: RelationConfig = field(default_factory=RelationConfig)
    walk: WalkConfig = field(default_factory=WalkConfig)
    mask_crf: bool = True
    """Train the segmentation on CRF-refined masks."""
    instances: bool = False
    """Also write instance detections, instances/IMAGE.npz."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


PRESETS = {
    "demo": Config(walk=WalkConfig(steps=32)),  # 256 steps cross pictures of 128 pixels many times over
    "small": Config(
        classify=CLASSIFY["small"],
        cams=CAMS["small"],
        relation=RelationConfig(
            zoom=1.0,
            scale=(0.5, 1.5),
            crop=256,
            schedule=Schedule(epochs=3, batch_size=16, lr=0.1, head_lr=1.0, momentum=1e-4),
        ),
        segment=SEGMENT["small"],
    ),
    "paper": Config(
        classify=CLASSIFY["paper"],
        cams=CAMS["paper"],
        threshold=0.15,
        relation=RelationConfig(
            backbone="resnet50-irn",
            zoom=1.0,
            scale=(0.5, 1.5),
            crop=512,
            schedule=Schedule(epochs=3, batch_size=32, lr=0.1, head_lr=1.0, momentum=1e-4),
        ),
        mask_crf=False,
        instances=True,
        segment=SEGMENT["paper"],
    ),
    "tiny": Config(
        data="demo:tiny",
        classify=CLASSIFY["tiny"],
        cams=CAMS["tiny"],
        relation=RelationConfig(schedule=Schedule(epochs=1, batch_size=4, lr=0.1, head_lr=1.0)),
        instances=True,
        segment=SEGMENT["tiny"],
    ),
}
