"""Settings of `recipes/cam.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.pipeline.cams import CamConfig
from recipes.pipeline.classification import ClassifyConfig
from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.settings.shared import CAMS, CLASSIFY, SEGMENT


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    classify: ClassifyConfig = field(default_factory=lambda: CLASSIFY["demo"])
    cams: CamConfig = field(default_factory=lambda: CAMS["demo"])
    threshold: float = 0.25
    """Background score: a pixel whose CAMs are all below is background."""
    mask_crf: bool = True
    """Train the segmentation on CRF-refined masks."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


PRESETS = {
    "demo": Config(),
    "small": Config(classify=CLASSIFY["small"], cams=CAMS["small"], segment=SEGMENT["small"]),
    "paper": Config(
        classify=CLASSIFY["paper"], cams=CAMS["paper"], threshold=0.15, mask_crf=False, segment=SEGMENT["paper"]
    ),
    "tiny": Config(data="demo:tiny", classify=CLASSIFY["tiny"], cams=CAMS["tiny"], segment=SEGMENT["tiny"]),
}
