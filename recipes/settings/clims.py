"""Settings of `recipes/clims.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from recipes.pipeline.cams import CamConfig
from recipes.pipeline.classification import ClassifyConfig
from recipes.pipeline.image_text import CriticConfig
from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import Schedule
from recipes.settings import irn
from recipes.settings.shared import CAMS, CLASSIFY, SEGMENT

# Weights of OTM, BTM, CBS and REG for VOC.
PUBLISHED = {"root": (10.0, 24.0, 1.0, 0.2), "camera_ready": (10.0, 25.0, 29.5, 1.15)}


@dataclass(frozen=True)
class MatchingConfig:
    """The objective and the training."""

    objective: Literal["root", "camera_ready"] = "root"
    """The released version, or that of the paper: backgrounds of single classes of VOC, some of its classes thrice."""
    weights: tuple[float, float, float, float] | None = None
    """Of what the maps show (OTM), of what they leave (BTM), of the suppression of backgrounds (CBS) and of the area
    (REG); by default as published for VOC. COCO: 2 14 1.25 0.2."""
    threshold: float | None = None
    """Similarity from which a background is suppressed: 0.26 for VOC and 0.285 for COCO with CLIP; by default how
    well, on average, whole training images match the texts of their tags. camera_ready has none."""
    backgrounds: tuple[str, ...] | None = None
    """Texts of backgrounds in place of the published ones; camera_ready has its own."""
    positive: bool = False
    """Match with (s + 1) / 2 in place of s, for models whose similarities are often negative and else teach nothing."""
    leak: float = 0.0
    """Slope of the loss for a similarity that is negative; published: 0."""
    double_resize: bool = False
    """Resize each image at random twice, as the released code does: the second draw decides its size, both blur it."""
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=6, batch_size=16, lr=1e-4, head_lr=1e-3))
    """Training schedule."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    classify: ClassifyConfig = field(default_factory=lambda: CLASSIFY["demo"])
    critic: CriticConfig = field(default_factory=CriticConfig)
    clims: MatchingConfig = field(
        default_factory=lambda: MatchingConfig(
            backgrounds=("lake", "meadow", "forest", "mountains", "field", "railway tracks"), positive=True
        )
    )
    cams: CamConfig = field(default_factory=lambda: CAMS["demo"])
    threshold: float = 0.15
    """Background score at which the maps themselves are measured."""
    relation: irn.RelationConfig = field(default_factory=lambda: trusted(irn.PRESETS["demo"].relation))
    walk: irn.WalkConfig = field(default_factory=lambda: bounded(irn.PRESETS["demo"].walk))
    mask_crf: bool = True
    """Train the segmentation on CRF-refined masks."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


def trusted(relation: irn.RelationConfig) -> irn.RelationConfig:
    """IRN's network on the areas that CLIMS trusts."""
    return replace(relation, foreground=0.3, background=0.1)


def bounded(walk: irn.WalkConfig) -> irn.WalkConfig:
    """IRN's walk with CLIMS' background score after it; 0.25 for COCO."""
    return replace(walk, threshold=0.2)


# Published: 9,900 steps at 2.5e-4 and 2.5e-3 without momentum. Rates that give `small` and `demo` the same sum over
# their 162 and 90 steps are too high: on the demo set the sigmoid was saturated after ten steps, the area of the maps
# constant at 0.667 from there on. With a momentum of 0.9, those here are, a step, four times the published ones. A step
# of `small` costs three of the plain classifier: the image-text model sees each pair of an image and a class twice.
PRESETS = {
    "demo": Config(),
    "small": Config(
        classify=CLASSIFY["small"],
        critic=CriticConfig(model="conse"),
        clims=MatchingConfig(schedule=Schedule(epochs=2, batch_size=16, lr=1e-4, head_lr=1e-3)),
        cams=CAMS["small"],
        relation=trusted(irn.PRESETS["small"].relation),
        walk=bounded(irn.PRESETS["small"].walk),
        segment=SEGMENT["small"],
    ),
    "paper": Config(
        classify=CLASSIFY["paper"],
        critic=CriticConfig(model="ViT-B-32-quickgelu", weights="openai", renormalize=False),
        clims=MatchingConfig(
            threshold=0.26,
            schedule=Schedule(epochs=15, batch_size=16, lr=2.5e-4, head_lr=2.5e-3, momentum=1e-4),
        ),
        cams=CAMS["paper"],
        relation=trusted(irn.PRESETS["paper"].relation),
        walk=bounded(irn.PRESETS["paper"].walk),
        mask_crf=False,
        segment=SEGMENT["paper"],
    ),
    "tiny": Config(
        data="demo:tiny",
        classify=CLASSIFY["tiny"],
        critic=CriticConfig(size=64, schedule=Schedule(epochs=1, batch_size=4, lr=0.005, head_lr=0.05)),
        clims=MatchingConfig(
            backgrounds=("lake", "meadow"),
            positive=True,
            schedule=Schedule(epochs=1, batch_size=4, lr=1e-4, head_lr=1e-3),
        ),
        cams=CAMS["tiny"],
        relation=trusted(irn.PRESETS["tiny"].relation),
        walk=bounded(irn.PRESETS["tiny"].walk),
        segment=SEGMENT["tiny"],
    ),
}
