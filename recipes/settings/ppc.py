"""Settings of `recipes/ppc.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from recipes.pipeline.cams import CamConfig
from recipes.pipeline.classification import ClassifyConfig
from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import Schedule
from recipes.settings import rw
from recipes.settings.shared import CAMS, CLASSIFY, SEGMENT


class Base(NamedTuple):
    """What PPC publishes for the system that it stands on."""

    background: float
    """Background score of the pseudo labels that the contrast reads."""
    confident: float
    """Pixels a prototype, as share of those of a reduced view."""
    threshold: float
    """Background score of the masks."""


BASES = {"seam": Base(0.2, 1 / 8, 0.26), "eps": Base(0.1, 1 / 16, 0.22)}


@dataclass(frozen=True)
class ContrastConfig:
    """The second view and the contrast."""

    reduced: int = 96
    """Side of the second view in pixels; of the first it is the crop."""
    weight: float = 1.0
    """Weight of the contrast, whose three terms have a weight of 0.1 each as published."""
    contrast_from: int = 1
    """First epoch, from 0, with contrast: before that the maps of a new head mean nothing. Published: 0."""
    present_only: bool = True
    """Prototypes only from images that show the class, that of the background where no class is; absent classes out."""
    full_size: bool = False
    """Compare maps at the size of the views, as the released SEAM-based code does, and not as they are."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    variant: Literal["seam", "eps"] = "seam"
    """System that it stands on: seam, from tags, or eps, from tags and saliency."""
    saliency: str | None = None
    """eps: saliency maps, a run of c2am or a folder; by default those of the data set."""
    ppc: ClassifyConfig = field(default_factory=lambda: replace(CLASSIFY["demo"], output_stride=16))
    """The network and its training."""
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    cams: CamConfig = field(default_factory=lambda: CAMS["demo"])
    threshold: float | None = None
    """Background score of the maps; by default as published, 0.26 on SEAM and 0.22 on EPS."""
    affinity: rw.AffinityConfig = field(default_factory=lambda: rw.PRESETS["demo"].affinity)
    """seam: PSA's affinity network."""
    walk: rw.WalkConfig = field(default_factory=lambda: rw.PRESETS["demo"].walk)
    """seam: PSA's random walk."""
    mask_crf: bool = True
    """Train the segmentation on CRF-refined masks."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


PRESETS = {
    "demo": Config(),
    # The plain classifier's schedule: as many images, at its rates, since the classification loss is the mean of both
    # views. Cells of 16 pixels, 14 and 8 on a side: at 32 pixels the second view would have 4 x 4.
    "small": Config(
        ppc=replace(CLASSIFY["small"], output_stride=16),
        contrast=ContrastConfig(reduced=128),
        cams=replace(CAMS["small"], output_stride=16),
        affinity=rw.PRESETS["small"].affinity,
        walk=rw.PRESETS["small"].walk,
        segment=SEGMENT["small"],
    ),
    "paper": Config(
        ppc=ClassifyConfig(
            backbone="resnet38",
            output_stride=8,
            frozen_stages=2,
            dropout=0.5,
            long_side=(448, 768),
            crop=448,
            jitter=True,
            double_biases=True,
            schedule=Schedule(epochs=8, batch_size=8, lr=0.01, head_lr=0.1, weight_decay=5e-4, momentum=5e-4),
        ),
        contrast=ContrastConfig(reduced=128, contrast_from=0, present_only=False, full_size=True),
        cams=CAMS["paper"],
        affinity=replace(
            rw.PRESETS["paper"].affinity,
            schedule=replace(rw.PRESETS["paper"].affinity.schedule, lr=0.01, head_lr=0.1),
        ),
        walk=replace(rw.PRESETS["paper"].walk, background=0.27, steps=64),
        segment=SEGMENT["paper"],
    ),
    "tiny": Config(
        data="demo:tiny",
        ppc=replace(CLASSIFY["tiny"], output_stride=16),
        contrast=ContrastConfig(contrast_from=0),
        cams=CAMS["tiny"],
        affinity=rw.PRESETS["tiny"].affinity,
        walk=rw.PRESETS["tiny"].walk,
        segment=SEGMENT["tiny"],
    ),
}
