"""Settings of `recipes/sipe.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from recipes.pipeline.cams import CamConfig
from recipes.pipeline.classification import ClassifyConfig
from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.settings import irn
from recipes.settings.shared import CAMS, CLASSIFY, SEGMENT


@dataclass(frozen=True)
class ExploreConfig:
    """Image-specific prototypes."""

    side_channels: tuple[int, ...] = (128, 128, 256, 256)
    """Channels that the last stages of the backbone are projected to, as many stages as numbers."""
    bg_weight: float = 1.0
    """Weight of the background's overlap where seeds are found; 1 counts it like a class. Released: 0.5, under which
    most of the background is taken for objects here (42 photographs: recall of the background 41 % in place of 74)."""
    gsc_weight: float = 1.0
    """Weight of the agreement of both kinds of maps."""
    count_padding: bool = True
    """Compare the maps in the padding of the crops too, as released."""
    clip: float = 1.0
    """Longest gradient of a step."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    classify: ClassifyConfig = field(default_factory=lambda: fine(CLASSIFY["demo"]))
    explore: ExploreConfig = field(default_factory=ExploreConfig)
    cams: CamConfig = field(default_factory=lambda: CAMS["demo"])
    bg_doubt: float = 0.5
    """Weight of the background where it is to be trusted."""
    relation: irn.RelationConfig = field(default_factory=lambda: irn.PRESETS["demo"].relation)
    walk: irn.WalkConfig = field(default_factory=lambda: sharpened(irn.PRESETS["demo"].walk))
    mask_crf: bool = True
    """Train the segmentation on CRF-refined masks."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


def fine(classify: ClassifyConfig) -> ClassifyConfig:
    """Prototypes are taken from cells of 16 pixels, in training too."""
    return replace(classify, output_stride=16)


def sharpened(walk: irn.WalkConfig) -> irn.WalkConfig:
    """Cosines are flat: the published walk starts from their power 1.5."""
    return replace(walk, cam_power=1.5)


PRESETS = {
    "demo": Config(),
    # The classifier's settings at cells of 16 pixels. The published clip of the gradient's length is kept: it is what
    # holds the rates of the new layers.
    "small": Config(
        classify=fine(CLASSIFY["small"]),
        cams=replace(CAMS["small"], output_stride=16),
        relation=irn.PRESETS["small"].relation,
        walk=sharpened(irn.PRESETS["small"].walk),
        segment=SEGMENT["small"],
    ),
    "paper": Config(
        classify=CLASSIFY["paper"],
        explore=ExploreConfig(bg_weight=0.5),
        cams=CAMS["paper"],
        relation=irn.PRESETS["paper"].relation,
        walk=sharpened(irn.PRESETS["paper"].walk),
        mask_crf=False,
        segment=SEGMENT["paper"],
    ),
    "tiny": Config(
        data="demo:tiny",
        classify=fine(CLASSIFY["tiny"]),
        cams=CAMS["tiny"],
        relation=irn.PRESETS["tiny"].relation,
        walk=sharpened(irn.PRESETS["tiny"].walk),
        segment=SEGMENT["tiny"],
    ),
}
