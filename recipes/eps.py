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
are the masks; COCO 2014 train 37.2 (README of the released code), with ``--foreground-weight 0.9 --eps.crop 321
--eps.long-side 256 448 --eps.schedule.batch-size 16 --eps.schedule.epochs 50``.

As in the released code, weight decay takes the place of SGD's momentum in ``paper`` (else ``--eps.schedule.momentum
0.9``), and crops larger than the image are padded with background, unless ``--no-padding-is-background``. Saliency maps
are resized to the nearest pixels, not by the filter of the image, which made their edges ring. The published
segmentation network started from weights of COCO, this one from ImageNet's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from recipes.cli import run_recipe
from recipes.pipeline.cams import write_cams
from recipes.pipeline.classification import make_trunk
from recipes.pipeline.labels import masks_by_threshold, measure_cams
from recipes.pipeline.models import Trunk
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.saliency import SaliencyCrops, saliency_source
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.training import Moment, RandomLongSide, crop_transform, fit, two_speed_groups
from recipes.settings.eps import PRESETS, Config
from wsss_losses import EPSLoss, EPSTerms
from wsss_modules import BackgroundAwareCAMHead

__all__ = ["PRESETS", "Config", "main"]

PADDING = -1  # saliency of pixels outside of the image


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


def objective(config: Config) -> EPSLoss:
    """The objective of a run, which refuses options that it can't have."""
    return EPSLoss(threshold=config.overlap, foreground_weight=config.foreground_weight)


def train_eps(run: Run, config: Config, saliency: Callable[[str], np.ndarray]) -> EPSNet:
    """Tags teach the classes; saliency teaches all maps where they belong."""
    options = config.eps
    trunk = make_trunk(run, options, options.output_stride)
    net = EPSNet(trunk, len(run.dataset.classes))
    criterion = objective(config)

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


def main(config: Config) -> dict:
    objective(config)  # refuses options before any work is done
    run = start("eps", config, takes=())
    saliency = saliency_source(run, config.saliency)

    with run.stage("eps", "Classifier with a background, supervised by saliency"):
        net = train_eps(run, config, saliency)

    with run.stage("cams", "Class activation maps"):
        write_cams(run, net, run.train + run.val, config.cams)
        measure_cams(run, config.threshold)

    with run.stage("masks", "Masks: threshold, and a dense CRF"):
        masks_by_threshold(run, config.threshold, config.mask_crf)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
