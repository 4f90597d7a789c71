# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""AdvCAM: Anti-Adversarially Manipulated Attributions for Semantic Segmentation (Lee, Kim, Yoon, CVPR 2021).

Nothing is trained anew: at test time the image itself climbs towards each of its classes, step by step, and the maps of
all steps are added. Parts of an object that speak for its class only weakly join in as the score rises. The scores of
other classes are pushed down meanwhile, and entries that are high already are held in place. IRN makes masks of the
maps.

    python -m recipes run advcam                                    # built-in demo data, two CPU cores
    python -m recipes run advcam --reuse runs/cam-demo-s0           # with the classifier of a finished run
    python -m recipes run advcam --preset paper --data voc:PATH
    python -m recipes run advcam --climb.steps 1                    # the plain CAM, for comparison

Works on any classifier with a CAM. A step costs a pass forward and one back to the pixels, for every class, scale and
step: with the published 27 steps at four scales about 90 times the plain CAMs. In the released code the factor that is
to make up for the fewer steps of the half scale stays on for the others; ``paper`` does the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from recipes import irn
from recipes.cli import run_recipe
from recipes.pipeline.cams import CamConfig, save_cam
from recipes.pipeline.classification import ClassifyConfig, train_classifier
from recipes.pipeline.labels import measure_cams
from recipes.pipeline.models import Classifier
from recipes.pipeline.presets import CAMS, CLASSIFY, SEGMENT
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, RunConfig, start
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.views import image_tensor, views
from wsss_modules import AdvCAM


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


def write_climbed_cams(
    run: Run, classifier: Classifier, names: Sequence[str], cams: CamConfig, climb: ClimbConfig
) -> None:
    """Section 3: all tagged classes of an image climb together, at one scale after the other."""
    classifier.trunk = classifier.trunk.with_output_stride(cams.output_stride)
    device = run.fabric.device
    classifier.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # threads share it
    advcam = AdvCAM(
        classifier,
        classifier.head.classifier,
        steps=climb.steps,
        step_size=climb.step_size,
        ad_coeff=climb.ad_coeff,
        threshold=climb.threshold,
        clamp=climb.clamp,
        legacy_scale_weight=climb.legacy_scale_weight,
        chunk=climb.chunk,
    )

    def work(name: str) -> None:
        image = image_tensor(run.dataset.image(name)).to(device)
        labels = torch.from_numpy(run.dataset.labels(name)).to(device)
        both = views(image, classifier.trunk, cams.scales, long_side=cams.long_side)
        pairs = {scale: pair[None] for scale, pair in zip(cams.scales, both, strict=True)}
        out = advcam(pairs, labels[None], tuple(image.shape[-2:]))
        save_cam(run, name, out.keys, out.high_res, out.cam)

    run.for_each(names, lambda name: run.path("cam", f"{name}.npz"), work)


# A CPU has no time for 27 steps at four scales; `demo` shows that it works rather than how well. With networks other
# than their own the authors took about 8 steps; the scales kept in `small` are the image's own, at which it is as
# large as the crops that the classifier learnt from, and the half one, at which a step costs a quarter.
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


def main(config: Config) -> dict:
    run = start("advcam", config, takes=("classify",))

    with run.stage("classify", "Classifier from tags"):
        classifier = train_classifier(run, config.classify)

    with run.stage("cams", "Maps of images that climb towards their classes"):
        write_climbed_cams(run, classifier, run.train + run.val, config.cams, config.climb)
        measure_cams(run, config.threshold)

    irn.refine_with_irn(run, config.relation, config.walk, config.mask_crf)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
