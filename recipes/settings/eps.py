"""Settings of `recipes/eps.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from recipes.pipeline.cams import CamConfig
from recipes.pipeline.classification import ClassifyConfig
from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import Schedule
from recipes.settings.shared import CAMS, CLASSIFY, SEGMENT


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    saliency: str | None = None
    """Saliency maps: a run of c2am or a folder; by default those of the data set."""
    eps: ClassifyConfig = field(default_factory=lambda: replace(CLASSIFY["demo"], output_stride=16, jitter=True))
    """The network and its training."""
    overlap: float = 0.4
    """Share of a class's area that must be salient for the class to be foreground."""
    foreground_weight: float = 0.5
    """Weight of the foreground in the estimated saliency, the complement being the background's; 0.9 for COCO."""
    padding_is_background: bool = True
    """What pads a crop is supervised as background, as released, or left out."""
    cams: CamConfig = field(default_factory=lambda: CAMS["demo"])
    threshold: float = 0.2
    """Background score of the masks."""
    mask_crf: bool = False
    """Train the segmentation on CRF-refined masks; the published system does not."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


PRESETS = {
    "demo": Config(),
    # The plain classifier's schedule and rates; cells of 16 pixels, since maps are compared with saliency on their
    # grid, 14 x 14 for 7 x 7 of the plain classifier (the published system has 56 x 56).
    "small": Config(
        eps=replace(CLASSIFY["small"], output_stride=16, jitter=True),
        cams=replace(CAMS["small"], output_stride=16),
        segment=SEGMENT["small"],
    ),
    "paper": Config(
        eps=ClassifyConfig(
            backbone="resnet38",
            output_stride=8,
            frozen_stages=2,
            long_side=(256, 512),
            crop=448,
            jitter=True,
            double_biases=True,
            # 19,830 steps; published: 20,000
            schedule=Schedule(epochs=15, batch_size=8, lr=0.01, head_lr=0.1, weight_decay=5e-4, momentum=5e-4),
        ),
        cams=CAMS["paper"],
        segment=SEGMENT["paper"],
    ),
    "tiny": Config(
        data="demo:tiny",
        eps=replace(CLASSIFY["tiny"], output_stride=16),
        cams=CAMS["tiny"],
        segment=SEGMENT["tiny"],
    ),
}
