# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""SIPE: Self-supervised Image-specific Prototype Exploration for WSSS (Chen, Yang, Lai, Xie, CVPR 2022).

In each image, cells become seeds of the class whose map best overlaps with what looks like them; the mean features of
the seeds are prototypes of this image's classes and of its background, and their cosine with every cell is a second,
image-specific map. Both maps are trained to agree. The second one has a background of its own and needs no threshold.

    python -m recipes run sipe                                      # built-in demo data, two CPU cores
    python -m recipes run sipe --preset paper --data voc:PATH       # VOC 2012, one GPU
    python -m recipes run sipe --preset paper --data voc:PATH --devices 4

Published with ResNet-50 on VOC 2012 train: seeds 58.9 mIoU (README of the released code). For COCO the released code
leaves IRN out and trains on the confident areas. As in IRN, weight decay takes the place of momentum in the released
optimiser. Its scripts read 1,464 images where IRN's need all 10,582 of train_aug; here every stage reads the same list.
Maps of several scales are joined as all recipes here do it, at a multiple of 16 pixels that is then cut to the image,
and once more at a fourth of that for the walk; the released code brings them to the image and reduces the sum.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes import irn
from recipes.cli import run_recipe
from recipes.pipeline.cams import CamConfig, save_cam, share_of_classes
from recipes.pipeline.classification import ClassifyConfig, make_trunk
from recipes.pipeline.files import load_arrays, save_arrays
from recipes.pipeline.labels import measure_cams, refine_masks, write_masks
from recipes.pipeline.models import Trunk
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.training import FramedCrops, Moment, RandomLongSide, crop_transform, fit, two_speed_groups
from recipes.pipeline.views import views
from recipes.settings.sipe import PRESETS, Config, ExploreConfig
from wsss_losses import sipe_loss
from wsss_modules import (
    IRN_CRF,
    CAMHead,
    DenseCRF,
    Exploration,
    ImageSpecificPrototypeExploration,
    confident_label_from_scores,
    merge_flip,
    multi_scale_cam,
    normalize_cam,
)

__all__ = ["PRESETS", "Config", "main"]


class Output(NamedTuple):
    """``logits`` (B, K) and what was found in the images."""

    logits: Tensor
    found: Exploration


class SIPE(nn.Module):
    """A classifier with, beside it, the feature of all stages that prototypes are taken from: section 3."""

    def __init__(self, trunk: Trunk, num_classes: int, config: ExploreConfig) -> None:
        super().__init__()
        self.trunk, self.head = trunk, CAMHead(trunk.out_channels, num_classes)
        self.stages = len(config.side_channels) - 1  # the last one is what the classifier sees
        channels = (*trunk.level_channels[-self.stages - 1 : -1], trunk.out_channels)
        self.explore = ImageSpecificPrototypeExploration(channels, config.side_channels, bg_weight=config.bg_weight)

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        features = self.trunk(images)
        return [*features.levels[-self.stages - 1 : -1], features.final]

    def forward(self, images: Tensor, labels: Tensor, inside: Tensor) -> Output:
        levels = self.stage_maps(images)
        maps = self.head.class_maps(levels[-1])
        return Output(self.head(levels[-1]).logits, self.explore(maps, levels, labels, inside))

    def read(self, both: Tensor, labels: Tensor) -> Exploration:
        """An image and its mirror image, and labels (1, K): maps of both are added before anything is sought."""
        levels = self.stage_maps(both)
        maps = merge_flip(*self.head.class_maps(levels[-1]))[None]
        return self.explore.read(maps, merge_flip(*self.explore.hierarchy(levels))[None], labels)


def train_sipe(run: Run, classify: ClassifyConfig, config: ExploreConfig) -> SIPE:
    """Section 3.4: the tags, and the agreement of the ordinary with the image-specific maps."""
    model = SIPE(make_trunk(run, classify, classify.output_stride), len(run.dataset.classes), config)

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> NamedTuple:
        logits, found = model(batch["image"], batch["labels"], batch["inside"])
        valid = None if config.count_padding else F.interpolate(batch["inside"].float(), found.scores.shape[2:])
        is_cam = normalize_cam(found.is_cam)
        return sipe_loss(logits, found.scores, is_cam, batch["labels"], valid, gsc_weight=config.gsc_weight)

    groups = two_speed_groups(model, [model.head, model.explore], classify.schedule)
    resize, trunk = RandomLongSide(*classify.long_side), model.trunk
    transform = crop_transform(resize, classify.crop, trunk.mean, trunk.std, jitter=classify.jitter, mask_fill=0)
    crops = FramedCrops(run.dataset, run.train, transform)
    fit(run, "sipe", model, crops, loss_of, groups, classify.schedule, clip=config.clip)
    return model


def write_maps(run: Run, model: SIPE, names: tuple[str, ...], config: CamConfig) -> None:
    """Section 3.3 at several scales: ``is_cam/IMAGE.npz`` with the background, and ``cam/IMAGE.npz`` for classes.

    The class of the highest of all maps is also that of the highest ``f / (f + b)``, with f the map of a class and b
    the background's, where that exceeds one half: so the maps in ``cam/`` have the threshold that other recipes search.
    """
    model.trunk = model.trunk.with_output_stride(config.output_stride)
    device = run.fabric.device
    model.to(device, memory_format=torch.channels_last).eval()

    @torch.no_grad()
    def work(name: str) -> None:
        image = run.image(name)
        labels = torch.from_numpy(run.dataset.labels(name)).to(device)[None]
        both_at_each = views(image, model.trunk, config.scales, long_side=config.long_side)
        maps = [model.read(both, labels).is_cam for both in both_at_each]
        size = tuple(image.shape[-2:])
        merged = multi_scale_cam(maps, F.pad(labels, (1, 0), value=1), size, stride=4, round_to=16)
        keys = merged.keys[1:] - 1  # of the classes; channel 0 is the background
        fine, coarse = (x.half().cpu().numpy() for x in (merged.high_res, merged.cam))
        save_arrays(run.path("is_cam", f"{name}.npz"), keys=keys.cpu().numpy(), scores=fine, coarse=coarse)
        save_cam(run, name, keys, share_of_classes(merged.high_res), share_of_classes(merged.cam))

    run.for_each(names, lambda name: run.path("cam", f"{name}.npz"), work)


def read_maps(run: Run, name: str, what: str = "scores") -> tuple[Tensor, Tensor]:
    """Classes (k,) and maps (1, 1+k, H, W) of an image: ``scores`` at its size or ``coarse``."""
    stored = load_arrays(run.path("is_cam", f"{name}.npz"))
    return torch.from_numpy(stored["keys"]), torch.from_numpy(stored[what].astype(np.float32))[None]


def refine(run: Run, config: Config) -> None:
    """IRN on maps with a background of their own: it is trusted by a weight, walks along, and needs no threshold."""
    crf = DenseCRF(IRN_CRF)

    def confident(name: str) -> Tensor:
        keys, scores = (part.to(run.fabric.device) for part in read_maps(run, name))
        return confident_label_from_scores(scores, run.image(name)[None], config.bg_doubt, crf=crf, keys=keys)[0]

    with run.stage("labels", "Confident areas"):
        write_masks(run, run.train, confident, "ir_label")

    with run.stage("relations", "Inter-pixel relation network"):
        net = irn.train_relations(run, config.relation)

    def walked(name: str) -> Tensor:
        edge = irn.relations_of(run, net, name, config.relation.zoom).edge
        keys, maps = read_maps(run, name, "coarse")
        if maps.shape[-2:] != edge.shape[-2:]:
            maps = F.interpolate(maps, edge.shape[-2:], mode="bilinear", align_corners=False)
        maps = maps.to(edge.device) ** config.walk.cam_power
        best = irn.walked_scores(run, name, maps, edge, config.walk, config.relation.zoom)[0].argmax(0)
        return F.pad(keys, (1, 0))[best.cpu()]

    with run.stage("masks", "Masks: random walk between boundaries, and a dense CRF"):
        write_masks(run, run.train, walked)
        refine_masks(run, config.mask_crf)


def main(config: Config) -> dict:
    if not 0 <= config.bg_doubt <= 1:
        raise ValueError(f"bg_doubt: expected a number in [0, 1], got {config.bg_doubt}")
    irn.check(config.relation, config.walk)
    run = start("sipe", config, takes=())

    with run.stage("sipe", "Classifier and image-specific prototypes"):
        model = train_sipe(run, config.classify, config.explore)

    with run.stage("cams", "Image-specific class activation maps"):
        write_maps(run, model, run.train + run.val, config.cams)
        measure_cams(run, 0.5)  # the argmax, see write_maps

    refine(run, config)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
