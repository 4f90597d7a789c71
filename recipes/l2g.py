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
    python -m recipes run l2g --data folder:PHOTOS --labels tags.csv --saliency none

This is supervision by image tags *and* saliency maps: compare it with systems that use both. The maps come from
``--saliency``, or from the data set; with ``none`` the crops teach their attention alone.

For COCO: ``--l2g.resize square --l2g.no-corners --l2g.crops 4 --l2g.weight 30 --l2g.threshold 0.1 --l2g.background
value --l2g.schedule.epochs 15 --l2g.schedule.batch-size 12 --l2g.schedule.lr 0.1 ...``. Published with ResNet-38 for
these maps: segmentation of 72.1 mIoU on VOC val and 44.2 on COCO val (README of the released code).

``paper`` trains as published but for the learning rate, which follows the poly schedule of all recipes here instead of
falling to a tenth at epoch 5 of 10, without Nesterov's momentum; images are shuffled, and the view is cut from the
whole image, where the released code takes width and height for each other (`wsss_modules.random_boxes` can do either).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from recipes.cli import run_recipe
from recipes.pipeline.cams import CamConfig, write_cams
from recipes.pipeline.classification import make_trunk
from recipes.pipeline.labels import measure_cams, refine_masks, threshold_mask, write_masks
from recipes.pipeline.models import Trunk
from recipes.pipeline.presets import CAMS, SEGMENT
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, RunConfig, start
from recipes.pipeline.saliency import SaliencyCrops, saliency_source
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import Moment, RandomLongSide, Schedule, TaggedCrops, fit, two_speed_groups
from wsss_losses import L2GLoss
from wsss_modules import (
    PixelCorrelationCAMHead,
    PixelCorrelationCAMOutput,
    corner_and_random_boxes,
    cut_crops,
    random_boxes,
)


@dataclass(frozen=True)
class L2GConfig:
    """Both networks and their training."""

    backbone: str = "tf_efficientnet_lite0"
    """timm name or resnet38, of both networks."""
    weights: str = "imagenet"
    """imagenet, random or a file."""
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
    l2g: L2GConfig = field(default_factory=L2GConfig)
    cams: CamConfig = field(default_factory=lambda: CAMS["demo"])
    threshold: float = 0.25
    """Background score of the maps."""
    mask_crf: bool = True
    """Train the segmentation on CRF-refined masks."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


class Mapper(nn.Module):
    """A backbone and a head of class maps that pixels which look alike share."""

    def __init__(self, trunk: Trunk, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = PixelCorrelationCAMHead(trunk.out_channels, num_classes, side_channels=trunk.level_channels[-3:-1])

    def forward(self, images: Tensor) -> PixelCorrelationCAMOutput:
        features = self.trunk(images)
        return self.head(features.final, *features.levels[-3:-1], images)


class L2GNet(nn.Module):
    """The network of crops and that of whole views, in one call as DDP wants it."""

    def __init__(self, local: Mapper, whole: Mapper) -> None:
        super().__init__()
        self.local, self.whole = local, whole

    def forward(self, views: Tensor, crops: Tensor) -> tuple[PixelCorrelationCAMOutput, PixelCorrelationCAMOutput]:
        return self.whole(views), self.local(crops)


class Maps(NamedTuple):
    """``cam`` (B, K, h, w), signed."""

    cam: Tensor


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


def train_l2g(run: Run, config: L2GConfig, saliency: Callable[[str], np.ndarray] | None) -> L2GNet:
    """Crops are classified, and in the same step the network of whole views learns their maps."""
    local, whole = (Mapper(make_trunk(run, config, config.output_stride), len(run.dataset.classes)) for _ in range(2))
    net = L2GNet(local, whole)
    transform = view_transform(config, whole.trunk)
    views: Dataset = TaggedCrops(run.dataset, run.train, transform)
    if saliency is not None:
        views = SaliencyCrops(run.dataset, run.train, saliency, transform)
    criterion = L2GLoss(
        weight=config.weight,
        threshold=config.threshold,
        background=config.background,
        empty_saliency=config.empty_saliency,
        stride=whole.trunk.output_stride,
        aligned=config.aligned,
    )

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


PRESETS = {
    "demo": Config(),
    # The plain classifier takes 405 steps of 16 crops of 224 pixels. Here a step has 8 views and 16 crops of half their
    # area, which make 16 such crops together, and three epochs are 486 steps. Crops are drawn, as for COCO, so that two
    # a view reach everywhere in the course of the training; they have the published 5/7 of the view's side. The scores
    # of this head are about twice those of its classifier, u + P(u), so that a step at the plain classifier's rates
    # would move the logits four times as far through the classifier and twice through the backbone: those rates are
    # divided by 4 and 2. In `demo` too, where without that the loss of the tags stayed at that of a guess.
    "small": Config(
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
        l2g=L2GConfig(schedule=Schedule(epochs=1, batch_size=4, lr=0.005, head_lr=0.05)),
        cams=CAMS["tiny"],
        segment=SEGMENT["tiny"],
    ),
}


def main(config: Config) -> dict:
    run = start("l2g", config, takes=())
    saliency = None if config.saliency == "none" else saliency_source(run, config.saliency)

    with run.stage("l2g", "Network of crops, and that of whole views which learns from it"):
        net = train_l2g(run, config.l2g, saliency)

    with run.stage("cams", "Maps of the global network"):
        write_cams(run, GlobalMaps(net), run.train + run.val, config.cams, signed="sum")
        measure_cams(run, config.threshold)

    with run.stage("masks", "Masks: threshold, and a dense CRF"):
        write_masks(run, run.train, lambda name: threshold_mask(run, name, config.threshold))
        refine_masks(run, config.mask_crf)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
