# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""PPC: Weakly Supervised Semantic Segmentation by Pixel-to-Prototype Contrast (Du, Fu, Liu, Wang, CVPR 2022).

Of each class a batch has a prototype, the mean feature where its map is surest, and every pixel is pulled to that of
its class and pushed from the others: within a view of the image, and across two views that differ in size. It is added
to the training of another system, on whose maps it stands: SEAM (image tags) or EPS (tags and saliency maps).

    python -m recipes run ppc                                       # on SEAM, built-in demo data, two CPU cores
    python -m recipes run ppc --variant eps                         # on EPS, with the saliency of the demo data
    python -m recipes run ppc --preset paper --data voc:PATH --ppc.weights FILE --affinity.weights FILE
    python -m recipes run ppc --preset paper --data voc:PATH --ppc.weights FILE --variant eps --saliency DIR ...

On SEAM the maps are the refined ones and PSA's random walk makes the masks; on EPS they are the softmax over classes
and background, whose masks need but a CRF. Published for VOC 2012 train: maps of 61.5 mIoU on SEAM, 69.2 after the
walk; maps of 70.5 on EPS, which is to be compared with systems that use saliency, and whose published training is that
of ``paper`` with ``--contrast.no-full-size --ppc.dropout 0 --ppc.schedule.epochs 15``.

Unlike the released code, the EPS-based variant knows which channel is the background everywhere and takes one step on a
batch, not two. As there, weight decay takes the place of SGD's momentum in ``paper``, and a constant background score
of 0.27 walks, 64 steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from recipes import rw
from recipes.cli import run_recipe
from recipes.pipeline.cams import write_cams
from recipes.pipeline.classification import make_trunk, tagged_crops
from recipes.pipeline.labels import masks_by_threshold, measure_cams
from recipes.pipeline.models import Trunk
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.saliency import SaliencyCrops, saliency_source
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.training import Moment, RandomLongSide, crop_transform, fit, two_speed_groups
from recipes.settings.ppc import BASES, PRESETS, Config
from wsss_losses import PixelToPrototypeContrastLoss, SaliencyGuidedMapLoss, SEAMLoss
from wsss_modules import SEAMHead, SEAMOutput

__all__ = ["PRESETS", "Config", "main"]


class Output(NamedTuple):
    """``cam`` (B, K, h, w) in [0, 1], the maps to use; everything of the ``first`` view, and of the ``second``."""

    cam: Tensor
    first: SEAMOutput
    second: SEAMOutput | None


class PPCNet(nn.Module):
    """Class maps, refined maps and projected features of one or two views."""

    def __init__(self, trunk: Trunk, num_classes: int, dropout: float, variant: str) -> None:
        super().__init__()
        self.trunk, self.variant = trunk, variant
        sides = trunk.level_channels[-3:-1]
        self.head = SEAMHead(trunk.out_channels, num_classes, side_channels=sides, dropout=dropout)

    def forward(self, images: Tensor, reduced: Tensor | None = None) -> Output:
        """With ``reduced``, also pass the second view: one call of two passes, as DDP wants it."""
        first = self.view(images)
        maps = first.refined if self.variant == "seam" else first.scores.softmax(1)
        return Output(maps[:, 1:], first, None if reduced is None else self.view(reduced))

    def view(self, images: Tensor) -> SEAMOutput:
        features = self.trunk(images)
        return self.head(features.final, *features.levels[-3:-1], images)


class Terms(NamedTuple):
    total: Tensor
    classification: Tensor
    min_pooling: Tensor
    er: Tensor
    ecr: Tensor
    contrast: Tensor
    saliency: Tensor


def train_ppc(run: Run, config: Config, saliency: Callable[[str], np.ndarray] | None) -> PPCNet:
    """The losses of the base for both views, and the contrast of both."""
    options, base = config.contrast, BASES[config.variant]
    trunk = make_trunk(run, config.ppc, config.ppc.output_stride)
    net = PPCNet(trunk, len(run.dataset.classes), config.ppc.dropout, config.variant)
    seam_of, saliency_of = SEAMLoss(), SaliencyGuidedMapLoss()
    contrast_of = PixelToPrototypeContrastLoss(
        background=base.background,
        confident=base.confident,
        mask_by_label=options.present_only,
        background_prototype="low_foreground" if options.present_only else "constant",
        drop_absent=options.present_only,
        sync=run.fabric.world_size > 1,
    )

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Terms:
        images, labels = batch["image"], batch["labels"]
        reduced = reduce_to(images, options.reduced)
        _, first, second = model(images, reduced)
        plain, refined = (first.scores, second.scores), (first.refined, second.refined)
        compared = (plain, refined)
        if options.full_size:
            sizes = (images.shape[-1], options.reduced)
            compared = tuple(tuple(map(reduce_to, maps, sizes)) for maps in compared)
        cam1, cam2 = (scores[:, 1:] for scores in compared[0])
        seam = seam_of(cam1, cam2, *compared[1], labels)
        contrast = contrast_of(first.projected, second.projected, *(maps[:, 1:] for maps in refined), labels).total
        contrast = contrast * (options.weight if at.epoch >= options.contrast_from else 0.0)
        guided = contrast.new_zeros(())
        if saliency is not None:
            truths = batch["saliency"], reduce_to(batch["saliency"], options.reduced)
            # the refined maps lie in [0, 1], so that their softmax is nearly flat; kept as published
            guided = sum(saliency_of(maps, truths[i % 2], labels) for i, maps in enumerate((*plain, *refined))) / 2
        return Terms(seam.total + contrast + guided, *seam[1:], contrast, guided)

    crops = tagged_crops(run, config.ppc, trunk)
    if saliency is not None:
        resize = RandomLongSide(*config.ppc.long_side)
        transform = crop_transform(
            resize, config.ppc.crop, trunk.mean, trunk.std, jitter=config.ppc.jitter, mask_fill=0
        )
        crops = SaliencyCrops(run.dataset, run.train, saliency, transform)
    schedule = config.ppc.schedule
    groups = two_speed_groups(net, [net.head], schedule, double_biases=config.ppc.double_biases)
    fit(run, "ppc", net, crops, loss_of, groups, schedule)
    return net


def reduce_to(maps: Tensor, size: int) -> Tensor:
    return F.interpolate(maps, (size, size), mode="bilinear", align_corners=True)


def check(config: Config) -> None:
    """Refuse what would go unread, or only stop the run after the training of the network."""
    if config.variant == "seam":
        if config.saliency is not None:
            raise ValueError(f"saliency: only --variant eps reads it, got {config.saliency} with --variant seam")
        rw.check(config.affinity, config.walk, config.ppc.backbone)


def main(config: Config) -> dict:
    check(config)
    run = start("ppc", config, takes=())
    saliency = saliency_source(run, config.saliency) if config.variant == "eps" else None
    threshold = BASES[config.variant].threshold if config.threshold is None else config.threshold

    with run.stage("ppc", f"Network with pixel-to-prototype contrast, on {config.variant.upper()}"):
        net = train_ppc(run, config, saliency)

    with run.stage("cams", "Class activation maps"):
        write_cams(run, net, run.train + run.val, config.cams, stretch=config.variant == "seam")
        measure_cams(run, threshold)

    if config.variant == "seam":
        rw.refine_with_rw(run, net.trunk, config.affinity, config.walk, config.mask_crf)
    else:
        with run.stage("masks", "Masks: threshold, and a dense CRF"):
            masks_by_threshold(run, threshold, config.mask_crf)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
