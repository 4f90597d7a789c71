# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""EPS: Railroad is not a Train: Saliency as Pseudo-pixel Supervision for WSSS (Lee, Lee, Lee, Shim, CVPR 2021).

The classifier has a map for the background beside those of the classes, and what all of them together say of saliency
is held against a saliency map. A class that lies on salient pixels belongs to the foreground, another (the railroad of
a train, or an object that nobody looks at) to the background; so objects get outlines, and context loses its label.

    python -m recipes run eps                                       # built-in demo data, two CPU cores
    python -m recipes run eps --preset small --data voc:PATH --saliency RUN_OF_C2AM
    python -m recipes run eps --preset paper --data voc:PATH --saliency FOLDER --eps.weights FILE

This is supervision by image tags *and* saliency maps: compare it with systems that use both. The maps come from
``--saliency``, or from the data set. Published for VOC 2012 train: maps of 69.2 mIoU (47.1 without saliency), which
are the masks; COCO 2014 train 37.2 with a foreground weight of 0.9 (README of the released code).

As in the released code, weight decay takes the place of SGD's momentum in ``paper``, and crops larger than the image
are padded with background, unless ``--no-padding-is-background``. Saliency maps are resized to the nearest pixels, not
by the filter of the image, which made their edges ring.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from recipes.cli import run_recipe
from recipes.pipeline.cams import CamConfig, write_cams
from recipes.pipeline.classification import ClassifyConfig, make_trunk
from recipes.pipeline.labels import measure_cams, refine_masks, threshold_mask, write_masks
from recipes.pipeline.models import Trunk
from recipes.pipeline.presets import CAMS, CLASSIFY, SEGMENT
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, RunConfig, start
from recipes.pipeline.saliency import SaliencyCrops, saliency_source
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import Moment, RandomLongSide, Schedule, crop_transform, fit, two_speed_groups
from wsss_losses import EPSLoss, EPSTerms
from wsss_modules import BackgroundAwareCAMHead

PADDING = -1  # saliency of pixels outside of the image


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


class EPSOutput(NamedTuple):
    """``logits`` (B, K); ``cam`` (B, K, h, w), what the softmax leaves to the classes; ``scores`` with background."""

    logits: Tensor
    cam: Tensor
    scores: Tensor


class EPSNet(nn.Module):
    """A classifier with a map for the background."""

    def __init__(self, trunk: Trunk, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = BackgroundAwareCAMHead(trunk.out_channels, num_classes)

    def forward(self, images: Tensor) -> EPSOutput:
        logits, scores = self.head(self.trunk(images).final)
        return EPSOutput(logits, scores.softmax(1)[:, 1:], scores)


def train_eps(run: Run, config: Config, saliency: Callable[[str], np.ndarray]) -> EPSNet:
    """Tags teach the classes; saliency teaches all maps where they belong."""
    options = config.eps
    trunk = make_trunk(run, options, options.output_stride)
    net = EPSNet(trunk, len(run.dataset.classes))
    criterion = EPSLoss(threshold=config.overlap, foreground_weight=config.foreground_weight)

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> EPSTerms:
        out, salient = model(batch["image"]), batch["saliency"]
        valid = None if config.padding_is_background else salient != PADDING
        return criterion(out.logits, out.scores, salient.clamp(min=0), batch["labels"], valid)

    resize = RandomLongSide(*options.long_side)
    transform = crop_transform(resize, options.crop, trunk.mean, trunk.std, jitter=options.jitter, mask_fill=PADDING)
    crops = SaliencyCrops(run.dataset, run.train, saliency, transform)
    groups = two_speed_groups(net, [net.head], options.schedule, double_biases=options.double_biases)
    fit(run, "eps", net, crops, loss_of, groups, options.schedule)
    return net


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
            # 20,000 steps
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


def main(config: Config) -> dict:
    run = start("eps", config, takes=())
    saliency = saliency_source(run, config.saliency)

    with run.stage("eps", "Classifier with a background, supervised by saliency"):
        net = train_eps(run, config, saliency)

    with run.stage("cams", "Class activation maps"):
        write_cams(run, net, run.train + run.val, config.cams)
        measure_cams(run, config.threshold)

    with run.stage("masks", "Masks: threshold, and a dense CRF"):
        write_masks(run, run.train, lambda name: threshold_mask(run, name, config.threshold))
        refine_masks(run, config.mask_crf)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
