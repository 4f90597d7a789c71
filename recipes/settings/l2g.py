"""Settings of `recipes/l2g.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from recipes.pipeline.cams import CamConfig
from recipes.pipeline.classification import ClassifyConfig
from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import Schedule
from recipes.settings.shared import CAMS, CLASSIFY, SEGMENT


@dataclass(frozen=True)
class L2GConfig:
    """Both networks and their training."""

    backbone: str = "tf_efficientnet_lite0"
    """timm name or resnet38, of both networks."""
    weights: str = "classifier"
    """classifier, the weights of a plain one, heads and all; or imagenet, random or a file."""
    output_stride: int = 16
    """Pixels per cell of the last maps (resnet38: always 8)."""
    frozen_stages: int = 3
    """Stem and stages that keep their pretrained weights."""
    resize: Literal["long", "short", "square"] = "long"
    """Resize the longer side to a random length, the shorter to a fixed one, or to a square of the view's size."""
    side: tuple[int, int] = (112, 160)
    """Range of the longer side in pixels; with short, its first number is the shorter side."""
    view: int = 128
    """Side of the view in pixels, which is cut from the resized image."""
    mirror: bool = True
    """Mirror half of the images; published: none."""
    jitter: bool = False
    """Jitter brightness, contrast, saturation (0.3) and hue (0.1)."""
    crop: int = 96
    """Side of the crops of a view in pixels."""
    crops: int = 4
    """Crops of a view."""
    corners: bool = True
    """The first four crops lie in the corners of the view; all are drawn otherwise (COCO)."""
    weight: float = 3.5
    """Weight of the transfer: 10 for VOC's 21 channels, 30 for COCO's 81, so about half of their number."""
    threshold: float = 1e-3
    """Least attention that is taught: 0.001 for VOC, 0.1 for COCO."""
    background: Literal["binary", "value"] = "binary"
    """Background taught as 0 and 1 (VOC) or as its attention (COCO)."""
    empty_saliency: Literal["zero", "attention"] = "zero"
    """What a crop without any saliency teaches of its classes."""
    stretch_saliency: bool = False
    """Divide the saliency of a view by its maximum, as published: a faint map then counts as a clear one."""
    aligned: bool = True
    """Read the global map without the released shift by half a cell, which is 4 pixels of 448 there, 8 of 224 here."""
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=4, batch_size=8, lr=0.0025, head_lr=0.0125))
    """Training schedule; a batch is of as many views; ``head_lr`` is that of both heads."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    saliency: str | None = None
    """Saliency maps: a run of c2am or a folder; by default those of the data set; none for attention alone."""
    classify: ClassifyConfig = field(default_factory=lambda: CLASSIFY["demo"])
    """The plain classifier, whose weights both networks may start from."""
    l2g: L2GConfig = field(default_factory=L2GConfig)
    cams: CamConfig = field(default_factory=lambda: CAMS["demo"])
    threshold: float = 0.25
    """Background score of the maps."""
    mask_crf: bool = True
    """Train the segmentation on CRF-refined masks."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


PRESETS = {
    "demo": Config(),
    # The plain classifier takes 405 steps of 16 crops of 224 pixels. Here a step has 8 views and 16 crops of half their
    # area, which make 16 such crops together, and three epochs are 486 steps. Crops are drawn, as for COCO, so that two
    # a view reach everywhere in the course of the training; they have the published 5/7 of the view's side. The scores
    # of this head are about twice those of its classifier, u + P(u), so that a step at the plain classifier's rates
    # would move the logits four times as far through the classifier and twice through the backbone: those rates are
    # divided by 4 and 2. In `demo` too, where without that the loss of the tags stayed at that of a guess.
    "small": Config(
        classify=CLASSIFY["small"],
        l2g=L2GConfig(
            frozen_stages=4,
            side=(256, 400),
            view=224,
            crop=160,
            crops=2,
            corners=False,
            schedule=Schedule(epochs=3, batch_size=8, lr=0.01, head_lr=0.05),
        ),
        cams=replace(CAMS["small"], output_stride=16),
        segment=SEGMENT["small"],
    ),
    "paper": Config(
        l2g=L2GConfig(
            backbone="resnet38",
            weights="imagenet",
            output_stride=8,
            frozen_stages=0,
            resize="short",
            side=(512, 512),
            view=448,
            mirror=False,
            jitter=True,
            crop=320,
            crops=6,
            weight=10.0,
            stretch_saliency=True,
            aligned=False,
            schedule=Schedule(epochs=10, batch_size=3, lr=0.001, head_lr=0.01, weight_decay=5e-4),
        ),
        cams=replace(CAMS["paper"], output_stride=8),
        mask_crf=False,
        segment=SEGMENT["paper"],
    ),
    "tiny": Config(
        data="demo:tiny",
        classify=CLASSIFY["tiny"],
        l2g=L2GConfig(schedule=Schedule(epochs=1, batch_size=4, lr=0.005, head_lr=0.05)),
        cams=CAMS["tiny"],
        segment=SEGMENT["tiny"],
    ),
}
