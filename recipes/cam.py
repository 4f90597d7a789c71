# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""CAM: Learning Deep Features for Discriminative Localization (Zhou et al., CVPR 2016, arXiv:1512.04150).

The plain baseline of all systems: a classifier trained on image tags, its class activation maps over scales and mirror
images, thresholded into masks and refined by a dense CRF, and a segmentation network trained on these.

    python -m recipes run cam                                       # built-in demo data, two CPU cores
    python -m recipes run cam --preset paper --data voc:PATH        # VOC 2012, one GPU
    python -m recipes run cam --preset paper --data voc:PATH --devices 8

With the published settings of IRN's classifier, CAMs of ResNet-50 reach about 48 mIoU on VOC 2012 train (Ahn et al.,
CVPR 2019); docs/results.md has what was measured here.
"""

from __future__ import annotations

import sys

from recipes.cli import run_recipe
from recipes.pipeline.cams import write_cams
from recipes.pipeline.classification import train_classifier
from recipes.pipeline.labels import masks_by_threshold, measure_cams
from recipes.pipeline.report import finish
from recipes.pipeline.run import start
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.settings.cam import PRESETS, Config

__all__ = ["PRESETS", "Config", "main"]


def main(config: Config) -> dict:
    run = start("cam", config)

    with run.stage("classify", "Classifier from tags"):
        classifier = train_classifier(run, config.classify)

    with run.stage("cams", "Class activation maps"):
        write_cams(run, classifier, run.train + run.val, config.cams)
        measure_cams(run, config.threshold)

    with run.stage("masks", "Masks: threshold, and a dense CRF"):
        masks_by_threshold(run, config.threshold, config.mask_crf)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
