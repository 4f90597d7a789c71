"""Settings of `recipes/occse.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from recipes.pipeline.cams import CamConfig
from recipes.pipeline.classification import ClassifyConfig
from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import Schedule
from recipes.settings import rw
from recipes.settings.shared import CAMS, CLASSIFY, SEGMENT


@dataclass(frozen=True)
class ErasingConfig:
    """Class-specific erasing."""

    first_weight: float = 0.3
    """Weight of the judge's loss in the first epoch; it grows in equal steps."""
    last_weight: float = 1.0
    """Weight of the judge's loss in the last epoch."""
    normalise: Literal["batch", "image"] = "batch"
    """What divides the map that erases: its maximum over the batch, as released, or over the image."""
    parts: int | None = None
    """Save memory: recompute the judge's activations for so many parts of the batch, one after the other."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    classify: ClassifyConfig = field(default_factory=lambda: CLASSIFY["demo"])
    """The ordinary classifier, which becomes the judge."""
    learner: ClassifyConfig = field(default_factory=lambda: replace(CLASSIFY["demo"], weights="classifier"))
    """The network whose maps erase."""
    erasing: ErasingConfig = field(default_factory=ErasingConfig)
    cams: CamConfig = field(default_factory=lambda: CAMS["demo"])
    threshold: float = 0.25
    """Background score at which the CAMs themselves are measured."""
    affinity: rw.AffinityConfig = field(default_factory=lambda: affinity_of("demo"))
    walk: rw.WalkConfig = field(default_factory=lambda: rw.PRESETS["demo"].walk)
    mask_crf: bool = True
    """Train the segmentation on CRF-refined masks."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


def affinity_of(preset: str) -> rw.AffinityConfig:
    """PSA's affinity network, its labels from backgrounds of OC-CSE's, which refines CAMs under 6, 10 and 24."""
    return replace(rw.PRESETS[preset].affinity, low_alpha=6.0, high_alpha=24.0)


# Published are 20,000 steps. In a few hundred a new network would only just learn the classes (its own classification
# loss ends well above the classifier's), so in short schedules it takes over what that one knows and learns extent.
PRESETS = {
    "demo": Config(),
    # As many epochs for the learner as for the classifier; each of its steps costs about twice as much.
    "small": Config(
        classify=CLASSIFY["small"],
        learner=replace(CLASSIFY["small"], weights="classifier"),
        cams=CAMS["small"],
        affinity=affinity_of("small"),
        walk=rw.PRESETS["small"].walk,
        segment=SEGMENT["small"],
    ),
    # The classifier is PSA's: how the authors trained theirs is not part of the released code.
    "paper": Config(
        classify=rw.PRESETS["paper"].classify,
        learner=replace(
            rw.PRESETS["paper"].classify,
            dropout=0.0,
            long_side=(256, 448),
            crop=384,
            double_biases=False,
            schedule=Schedule(epochs=15, batch_size=8, lr=0.01, head_lr=0.01, weight_decay=5e-4, momentum=5e-4),
        ),
        cams=CAMS["paper"],
        threshold=0.2,
        affinity=affinity_of("paper"),
        walk=rw.PRESETS["paper"].walk,
        segment=SEGMENT["paper"],
    ),
    "tiny": Config(
        data="demo:tiny",
        classify=CLASSIFY["tiny"],
        learner=replace(CLASSIFY["tiny"], weights="classifier"),
        cams=CAMS["tiny"],
        affinity=affinity_of("tiny"),
        walk=rw.PRESETS["tiny"].walk,
        segment=SEGMENT["tiny"],
    ),
}
