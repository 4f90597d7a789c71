"""Settings of `recipes/advcam.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from recipes.pipeline.cams import CamConfig
from recipes.pipeline.classification import ClassifyConfig
from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.settings import irn
from recipes.settings.shared import CAMS, CLASSIFY, SEGMENT


@dataclass(frozen=True)
class ClimbConfig:
    """The climb of the images."""

    steps: int = 27
    """Maps that are added at each scale; the half scale takes about half as many."""
    step_size: float = 0.08
    """Largest move of a pixel in a step, in units of the normalised pixels."""
    ad_coeff: float = 7.0
    """Weight that holds entries of the map which are high already."""
    threshold: float = 0.5
    """Share of a map's maximum above which an entry is high."""
    clamp: Literal["pair", "channel", "none"] = "pair"
    """Keep to the range of the pixels of the image, of each of its channels, or of nothing."""
    legacy_scale_weight: bool = False
    """Weigh the scales as the released code does, where the half scale counts half."""
    chunk: int | None = None
    """At most so many classes of an image climb at once, to save memory."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    classify: ClassifyConfig = field(default_factory=lambda: CLASSIFY["demo"])
    cams: CamConfig = field(default_factory=lambda: replace(CAMS["demo"], scales=(1.5,)))
    climb: ClimbConfig = field(default_factory=lambda: ClimbConfig(steps=4))
    threshold: float = 0.25
    """Background score at which the maps themselves are measured."""
    relation: irn.RelationConfig = field(default_factory=lambda: trusted(irn.PRESETS["demo"].relation))
    walk: irn.WalkConfig = field(default_factory=lambda: sharpened(irn.PRESETS["demo"].walk))
    mask_crf: bool = True
    """Train the segmentation on CRF-refined masks."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


def trusted(relation: irn.RelationConfig) -> irn.RelationConfig:
    """IRN's network on the areas that AdvCAM trusts; its maps are fuller and call for higher background scores."""
    return replace(relation, foreground=0.35, background=0.15)


def sharpened(walk: irn.WalkConfig) -> irn.WalkConfig:
    """IRN's walk of maps to the power of 1.5, which AdvCAM adds."""
    return replace(walk, cam_power=1.5)


# A CPU has no time for 27 steps at four scales; `demo` shows that it works rather than how well. The 8 steps of `small`
# are about those that an author recalls for other networks, SEAM and SC-CAM on ResNet-38, there with an `ad_coeff` of
# about 2. The scales kept in `small` are the image's own, at which it is as large as the crops that the classifier
# learnt from, and the half one, at which a step costs a quarter.
PRESETS = {
    "demo": Config(),
    "small": Config(
        classify=CLASSIFY["small"],
        cams=replace(CAMS["small"], long_side=288, scales=(1.0, 0.5)),
        climb=ClimbConfig(steps=8),
        relation=trusted(irn.PRESETS["small"].relation),
        walk=sharpened(irn.PRESETS["small"].walk),
        segment=SEGMENT["small"],
    ),
    "paper": Config(
        classify=CLASSIFY["paper"],
        cams=CAMS["paper"],
        climb=ClimbConfig(legacy_scale_weight=True),
        relation=trusted(irn.PRESETS["paper"].relation),
        walk=sharpened(irn.PRESETS["paper"].walk),
        mask_crf=False,
        segment=SEGMENT["paper"],
    ),
    "tiny": Config(
        data="demo:tiny",
        classify=CLASSIFY["tiny"],
        cams=CAMS["tiny"],
        climb=ClimbConfig(steps=2),
        relation=trusted(irn.PRESETS["tiny"].relation),
        walk=sharpened(irn.PRESETS["tiny"].walk),
        segment=SEGMENT["tiny"],
    ),
}
