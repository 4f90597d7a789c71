# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""CAM: Learning Deep Features for Discriminative Localization (Zhou et al., CVPR 2016, arXiv:1512.04150).

The plain baseline of all systems: a classifier trained on image tags, its class activation maps over scales and mirror
images, thresholded into masks, and a segmentation network trained on these.

    python -m recipes run cam                                       # built-in demo data, two CPU cores
    python -m recipes run cam --preset paper --data voc:PATH        # VOC 2012, one GPU
    python -m recipes run cam --preset paper --data voc:PATH --devices 8

With the published settings of IRN's classifier, CAMs of ResNet-50 reach about 48 mIoU on VOC 2012 train (Ahn et al.,
CVPR 2019); docs/results.md has what was measured here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from recipes.cli import run_recipe
from recipes.pipeline.cams import CamConfig, write_cams
from recipes.pipeline.classification import ClassifyConfig, train_classifier
from recipes.pipeline.labels import crf_mask, measure_cams, measure_masks, read_mask, threshold_mask, write_masks
from recipes.pipeline.presets import CAMS, CLASSIFY, SEGMENT
from recipes.pipeline.report import finish
from recipes.pipeline.run import RunConfig, start
from recipes.pipeline.segmentation import SegmentConfig, segment, train_segmentation


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    classify: ClassifyConfig = field(default_factory=lambda: CLASSIFY["demo"])
    cams: CamConfig = field(default_factory=lambda: CAMS["demo"])
    threshold: float = 0.15
    """Background score: a pixel whose CAMs are all below is background."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


PRESETS = {
    "demo": Config(),
    "small": Config(classify=CLASSIFY["small"], cams=CAMS["small"], threshold=0.25, segment=SEGMENT["small"]),
    "paper": Config(classify=CLASSIFY["paper"], cams=CAMS["paper"], segment=SEGMENT["paper"]),
    "tiny": Config(data="demo:tiny", classify=CLASSIFY["tiny"], cams=CAMS["tiny"], segment=SEGMENT["tiny"]),
}


def main(config: Config) -> dict:
    run = start("cam", config)

    with run.stage("classify", "1  Classifier from tags"):
        classifier = train_classifier(run, config.classify)

    with run.stage("cams", "2  Class activation maps"):
        write_cams(run, classifier, run.train + run.val, config.cams)
        measure_cams(run, config.threshold)

    with run.stage("masks", "3  Masks: threshold, and a dense CRF for comparison"):
        write_masks(run, run.train, lambda name: threshold_mask(run, name, config.threshold))
        measure_masks(run)
        write_masks(run, run.seeds, lambda name: crf_mask(run, name), "mask_crf")
        measure_masks(run, "mask_crf", "mask+crf")

    with run.stage("segment", "4  Segmentation network from the masks"):
        network = train_segmentation(run, lambda name: read_mask(run, name), config.segment)
        segment(run, network, run.val or run.train, config.segment)
        measure_masks(run, "segmentation", "segmentation")

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
