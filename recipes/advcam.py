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
step: with the published 27 steps at four scales about 50 times the plain CAMs, for each class of an image. In the
released code the factor that is to make up for the fewer steps of the half scale stays on for the others; ``paper``
does the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import nn

from recipes import irn
from recipes.cli import run_recipe
from recipes.pipeline.cams import CamConfig, save_cam
from recipes.pipeline.classification import train_classifier
from recipes.pipeline.labels import measure_cams
from recipes.pipeline.models import Classifier
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.views import views
from recipes.settings.advcam import PRESETS, ClimbConfig, Config
from wsss_modules import AdvCAM

__all__ = ["PRESETS", "Config", "main"]


def climber(model: Callable, head: nn.Module | None, climb: ClimbConfig) -> AdvCAM:
    """Section 3.2 and 3.3: the climb of images towards classes of ``model``, whose class maps ``head`` makes."""
    return AdvCAM(
        model,
        head,
        steps=climb.steps,
        step_size=climb.step_size,
        ad_coeff=climb.ad_coeff,
        threshold=climb.threshold,
        clamp=climb.clamp,
        legacy_scale_weight=climb.legacy_scale_weight,
        chunk=climb.chunk,
    )


def write_climbed_cams(
    run: Run, classifier: Classifier, names: Sequence[str], cams: CamConfig, climb: ClimbConfig
) -> None:
    """Section 3: all tagged classes of an image climb together, at one scale after the other."""
    classifier.trunk = classifier.trunk.with_output_stride(cams.output_stride)
    device = run.fabric.device
    classifier.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # threads share it
    advcam = climber(classifier, classifier.head.classifier, climb)

    def work(name: str) -> None:
        image = run.image(name)
        labels = torch.from_numpy(run.dataset.labels(name)).to(device)
        both = views(image, classifier.trunk, cams.scales, long_side=cams.long_side)
        pairs = {scale: pair[None] for scale, pair in zip(cams.scales, both, strict=True)}
        out = advcam(pairs, labels[None], tuple(image.shape[-2:]))
        save_cam(run, name, out.keys, out.high_res, out.cam)

    run.for_each(names, lambda name: run.path("cam", f"{name}.npz"), work)


def main(config: Config) -> dict:
    climber(nn.Identity(), None, config.climb)  # or a word on what is wrong with it, before the classifier is trained
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
