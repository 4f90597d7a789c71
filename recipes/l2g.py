# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""L2G: Local-to-Global Knowledge Transfer for WSSS (Jiang, Yang, Hou, Wei, CVPR 2022).

A classifier of crops finds more of an object than one of whole images. So one network classifies several crops of a
view, and a second one, which sees the view as a whole, learns in every step to show what the first shows in its crops,
in the shape of the saliency. At test time only the second is run, and its maps need no further refinement.

    python -m recipes run l2g                                       # built-in demo data, two CPU cores
    python -m recipes run l2g --preset small --data voc:PATH --saliency RUN_OF_C2AM
    python -m recipes run l2g --preset paper --data voc:PATH --saliency FOLDER --l2g.weights FILE
    python -m recipes run l2g --preset small --data folder:PHOTOS --labels tags.csv --saliency none

The published networks start from ImageNet and learn for 35,000 steps. In the 120 and 486 of ``demo`` and ``small`` a
network that learns classes from the other's maps alone does not get as far: there both start as a plain classifier.

This is supervision by image tags *and* saliency maps: compare it with systems that use both. The maps come from
``--saliency``, or from the data set; with ``none`` the crops teach their attention alone.

For COCO: ``--l2g.resize square --l2g.no-corners --l2g.crops 4 --l2g.weight 30 --l2g.threshold 0.1 --l2g.background
value --l2g.schedule.epochs 15 --l2g.schedule.batch-size 12 --l2g.schedule.lr 0.1 --l2g.schedule.head-lr 1``, and as in
the released code, which hands the weight decay over as the momentum, ``--l2g.schedule.momentum 5e-4
--l2g.schedule.weight-decay 0``. Published with ResNet-38 for these maps: segmentation of 72.1 mIoU on VOC val and 44.2
on COCO val (README of the released code).

``paper`` trains as published but for the learning rate, which follows the poly schedule of all recipes here instead of
falling to a tenth at epoch 5 of 10, without Nesterov's momentum; images are shuffled, and the view is cut from the
whole image, where the released code takes width and height for each other (`wsss_modules.random_boxes` can do either).
Its segmentation for VOC starts from weights of COCO, here from those of ImageNet unless ``--segment.weights`` names a
file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from recipes.cli import run_recipe
from recipes.pipeline.cams import Maps, write_cams
from recipes.pipeline.classification import classifier_before, make_trunk, stages_before
from recipes.pipeline.labels import masks_by_threshold, measure_cams
from recipes.pipeline.models import Classifier, Trunk
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.saliency import SaliencyCrops, saliency_unless_none
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.training import Moment, RandomLongSide, TaggedCrops, fit, two_speed_groups
from recipes.settings.l2g import PRESETS, Config, L2GConfig
from wsss_losses import L2GLoss
from wsss_modules import (
    PixelCorrelationCAMHead,
    PixelCorrelationCAMOutput,
    corner_and_random_boxes,
    cut_crops,
    random_boxes,
)

__all__ = ["PRESETS", "Config", "main"]


class Mapper(nn.Module):
    """A backbone and a head of class maps that pixels which look alike share."""

    def __init__(self, trunk: Trunk, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = PixelCorrelationCAMHead(trunk.out_channels, num_classes, side_channels=trunk.level_channels[-3:-1])

    def forward(self, images: Tensor) -> PixelCorrelationCAMOutput:
        features = self.trunk(images)
        return self.head(features.final, *features.levels[-3:-1], images)


@torch.no_grad()
def start_as_classifier(head: PixelCorrelationCAMHead, weight: Tensor) -> None:
    """Show the maps of a plain classifier, of weight (K, D, 1, 1): the head gives u + P(u), of which u is half."""
    head.classifier.weight[1:] = weight.to(head.classifier.weight.device) / 2


class L2GNet(nn.Module):
    """The network of crops and that of whole views, in one call as DDP wants it."""

    def __init__(self, local: Mapper, whole: Mapper) -> None:
        super().__init__()
        self.local, self.whole = local, whole

    def forward(self, views: Tensor, crops: Tensor) -> tuple[PixelCorrelationCAMOutput, PixelCorrelationCAMOutput]:
        return self.whole(views), self.local(crops)


class GlobalMaps(nn.Module):
    """The network at test time."""

    def __init__(self, net: L2GNet) -> None:
        super().__init__()
        self.trunk, self.head = net.whole.trunk, net.whole.head

    def forward(self, images: Tensor) -> Maps:
        features = self.trunk(images)
        return Maps(self.head(features.final, *features.levels[-3:-1], images).scores[:, 1:])


def view_transform(config: L2GConfig, trunk: Trunk) -> v2.Compose:
    """Image, and saliency if there is any, to a view; what is padded has no saliency."""
    sizes = {"short": config.side[0], "square": (config.view, config.view)}
    bicubic = v2.InterpolationMode.BICUBIC
    resize = RandomLongSide(*config.side) if config.resize == "long" else v2.Resize(sizes[config.resize], bicubic)
    return v2.Compose(
        [
            resize,
            *([v2.RandomHorizontalFlip()] if config.mirror else []),
            *([v2.ColorJitter(0.3, 0.3, 0.3, 0.1)] if config.jitter else []),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(list(trunk.mean), list(trunk.std)),
            v2.RandomCrop(config.view, pad_if_needed=True, fill={tv_tensors.Image: 0.0, tv_tensors.Mask: 0.0}),
        ]
    )


def draw_boxes(config: L2GConfig, images: int) -> Tensor:
    draw = corner_and_random_boxes if config.corners else random_boxes
    return draw((config.view, config.view), config.crop, config.crops, images=images)


def objective(config: L2GConfig, stride: int) -> L2GLoss:
    return L2GLoss(
        weight=config.weight,
        threshold=config.threshold,
        background=config.background,
        empty_saliency=config.empty_saliency,
        stride=stride,
        aligned=config.aligned,
    )


def check(config: L2GConfig) -> None:
    """Refuse what the first step would stumble over, which comes after the training of the plain classifier."""
    if config.crops < 1:
        raise ValueError(f"l2g.crops: expected at least 1, got {config.crops}")
    draw_boxes(config, images=0)
    objective(config, config.output_stride)


def train_l2g(
    run: Run, classifier: Classifier | None, config: L2GConfig, saliency: Callable[[str], np.ndarray] | None
) -> L2GNet:
    """Crops are classified, and in the same step the network of whole views learns their maps."""
    trunks = (make_trunk(run, config, config.output_stride, classifier and classifier.trunk) for _ in range(2))
    local, whole = (Mapper(trunk, len(run.dataset.classes)) for trunk in trunks)
    if classifier is not None:
        for mapper in (local, whole):
            start_as_classifier(mapper.head, classifier.head.classifier.weight)
    net = L2GNet(local, whole)
    transform = view_transform(config, whole.trunk)
    views: Dataset = TaggedCrops(run.dataset, run.train, transform)
    if saliency is not None:
        views = SaliencyCrops(run.dataset, run.train, saliency, transform)
    criterion = objective(config, whole.trunk.output_stride)

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> NamedTuple:
        images = batch["image"]
        boxes = draw_boxes(config, len(images)).to(images.device)
        of_whole, of_crops = model(images, cut_crops(images, boxes, config.crop))
        shape = None
        if saliency is not None:
            shape = cut_crops(stretched(batch["saliency"], config.stretch_saliency), boxes, config.crop)
        return criterion(of_whole.scores, of_crops.logits, of_crops.scores, batch["labels"], boxes, shape)

    groups = two_speed_groups(net, [local.head, whole.head], config.schedule)
    fit(run, "l2g", net, views, loss_of, groups, config.schedule)
    return net


def stretched(saliency: Tensor, stretch: bool) -> Tensor:
    return saliency / (saliency.amax((2, 3), keepdim=True) + 1e-10) if stretch else saliency


def main(config: Config) -> dict:
    check(config.l2g)
    run = start("l2g", config, takes=stages_before(config.l2g))
    saliency = saliency_unless_none(run, config.saliency)
    classifier = classifier_before(run, config.l2g, config.classify)

    with run.stage("l2g", "Network of crops, and that of whole views which learns from it"):
        net = train_l2g(run, classifier, config.l2g, saliency)

    with run.stage("cams", "Maps of the global network"):
        write_cams(run, GlobalMaps(net), run.train + run.val, config.cams, signed="sum")
        measure_cams(run, config.threshold)

    with run.stage("masks", "Masks: threshold, and a dense CRF"):
        masks_by_threshold(run, config.threshold, config.mask_crf)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
