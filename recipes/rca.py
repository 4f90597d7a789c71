# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""RCA: Regional Semantic Contrast and Aggregation for WSSS (Zhou, Zhang, Zhao, Li, CVPR 2022, arXiv:2203.09653).

A memory of region embeddings of the whole data set shapes the features twice: regions are contrasted with it, and
pixels read its prototypes. The attention of all epochs is accumulated, and joined with saliency to masks.

    python -m recipes run rca                                       # built-in demo data, two CPU cores
    python -m recipes run rca --preset small --data voc:PATH --saliency RUN_OF_C2AM
    python -m recipes run rca --preset paper --data voc:PATH --saliency FOLDER
    python -m recipes run rca --preset small --data folder:PHOTOS --labels tags.csv --saliency none

This is supervision by image tags *and* saliency maps: compare it with systems that use both. The maps come from
``--saliency``, or from the data set; with ``none`` the masks are the attention maps above ``--threshold``.

``paper`` trains as published but for the learning rate, which follows the poly schedule of all recipes here instead of
falling to a tenth at epochs 5 and 10 of 30, without Nesterov's momentum; images are shuffled; and the logarithm of the
contrast is exact.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.cli import run_recipe
from recipes.pipeline.cams import read_cam, write_maps
from recipes.pipeline.classification import classifier_before, make_trunk, stages_before, whole_images
from recipes.pipeline.labels import masks_by_threshold, measure_cams, refine_masks, write_masks
from recipes.pipeline.models import Classifier, Trunk
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.saliency import saliency_unless_none
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.training import Moment, fit, two_speed_groups
from recipes.pipeline.views import view
from recipes.settings.rca import PRESETS, Config, RCAConfig
from wsss_losses import RegionalContrastLoss
from wsss_modules import (
    PSA_CRF,
    OnlineAttentionAccumulator,
    RegionMemoryBank,
    SemanticAggregation,
    background_score,
    dense_crf,
    fuse_saliency_labels,
    kmeans_prototypes,
    multi_scale_cam,
    unary_from_scores,
)

__all__ = ["PRESETS", "Config", "main"]


class RCAOutput(NamedTuple):
    """``logits`` and ``cam`` of the fine head, ``coarse`` maps; maps are signed. ``features`` is what memory stores."""

    logits: Tensor
    cam: Tensor
    coarse: Tensor
    features: Tensor
    embedding: Tensor


class RCA(nn.Module):
    """Coarse class maps of the features, fine ones of the features that have read the prototypes.

    Memory, prototypes and accumulated attention are buffers, so that a checkpoint holds all that training has gathered.
    """

    def __init__(self, trunk: Trunk, config: RCAConfig, labels: Tensor) -> None:
        super().__init__()
        num_classes, channels = labels.shape[1], config.channels
        self.trunk = trunk
        self.project: nn.Module = nn.Identity()
        if trunk.out_channels != channels:
            self.project = nn.Sequential(nn.Conv2d(trunk.out_channels, channels, 1), nn.ReLU())
        self.embed = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.aggregate = read_out(config)
        self.coarse = class_maps(channels, num_classes, stacks=1)
        self.fine = class_maps(channels, num_classes, stacks=num_classes)
        self.memory = region_memory(config, num_classes)
        nothing = torch.zeros(num_classes, config.prototypes, channels)
        self.register_buffer("prototypes", torch.randn_like(nothing) if config.legacy_memory else nothing)
        cells = -(-config.size // trunk.output_stride)
        self.attention = OnlineAttentionAccumulator(labels, (cells, cells))

    def forward(self, images: Tensor) -> RCAOutput:
        features = self.project(self.trunk(images).final)
        fine = self.fine(self.aggregate(features, self.prototypes))
        return RCAOutput(fine.mean((2, 3)), fine, self.coarse(features), features, self.embed(features))

    def renew_prototypes(self) -> None:
        slots, filled = self.memory.slots, self.memory.filled
        self.prototypes.copy_(kmeans_prototypes(slots, self.prototypes.shape[1], filled))


def read_out(config: RCAConfig) -> SemanticAggregation:
    softmax = config.read_out == "softmax"
    scale = config.channels**-0.5 if softmax else config.read_out
    return SemanticAggregation(config.channels, config.prototypes, scale=scale, softmax=softmax)


def region_memory(config: RCAConfig, num_classes: int) -> RegionMemoryBank:
    legacy = config.legacy_memory
    return RegionMemoryBank(num_classes, config.slots, config.channels, legacy_init=legacy, legacy_intersection=legacy)


def class_maps(channels: int, num_classes: int, stacks: int) -> nn.Sequential:
    """Three 3 x 3 layers and a 1 x 1; ``stacks`` = K gives each class layers of its own (grouped)."""
    width = channels * stacks
    layers: list[nn.Module] = []
    for channels_in, groups in ((channels, 1), (width, stacks), (width, stacks)):
        layer = nn.Conv2d(channels_in, width, 3, padding=1, groups=groups)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # nothing is pretrained here, and epochs are few
        layers += [layer, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(width, num_classes, 1, groups=stacks))


class RCATerms(NamedTuple):
    total: Tensor
    fine: Tensor
    coarse: Tensor
    contrast: Tensor


def train_rca(run: Run, classifier: Classifier | None, config: RCAConfig) -> RCA:
    """Two multi-label losses and the contrast; the memory fills from the start, prototypes are renewed every epoch."""
    labels = torch.from_numpy(run.dataset.all_labels(run.train))
    trunk = make_trunk(run, config, config.output_stride, classifier and classifier.trunk)
    net = RCA(trunk, config, labels)
    images = whole_images(run, net.trunk, config.size)
    per_epoch = max(1, len(images) // config.schedule.batch_size)
    contrast_of, sync = RegionalContrastLoss(reduction="mean"), run.fabric.world_size > 1

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> RCATerms:
        labels = batch["labels"]
        if at.epoch >= config.read_from and at.step % per_epoch == 0:
            net.renew_prototypes()
        out = model(batch["image"])
        fine = F.multilabel_soft_margin_loss(out.logits, labels)
        coarse = F.multilabel_soft_margin_loss(out.coarse.mean((2, 3)), labels)
        # also while it weighs nothing: DDP wants to see the embedding's parameters in each step
        contrast = contrast_of(out.embedding, out.coarse, labels, net.memory.slots, net.memory.filled)
        weight = config.contrast if at.epoch >= config.contrast_from else 0.0
        probability, last = out.logits.sigmoid(), at.step + per_epoch >= at.steps
        net.memory.update(out.features, out.coarse, labels, probability, sync=sync)
        if at.epoch >= config.read_from or last:
            net.attention.update(batch["index"], out.cam, probability, last=last, sync=sync)
        return RCATerms(fine + 0.4 * coarse + weight * contrast, fine, coarse, contrast)

    groups = two_speed_groups(net, [net.project, net.embed, net.coarse, net.fine], config.schedule, double_biases=True)
    fit(run, "rca", net, images, loss_of, groups, config.schedule)
    return net


def write_attention(run: Run, net: RCA, size: int) -> None:
    """``cam/IMAGE.npz``: the accumulated maps of training images; val images have those of the trained network."""
    place = {name: index for index, name in enumerate(run.train)}
    device = run.fabric.device
    net.to(device, memory_format=torch.channels_last).eval()

    def maps_of(name: str) -> dict[str, Tensor]:
        image = run.image(name)
        if name in place:
            maps = net.attention(torch.tensor([place[name]], device=device))
        else:
            square = view(image, (size, size), net.trunk.mean, net.trunk.std, flip=False)
            maps = net(square).cam.relu()
        labels = torch.from_numpy(run.dataset.labels(name)).to(device)
        # the map covers the image whatever its shape, so there is no margin to cut off
        scaled = multi_scale_cam(
            [maps], labels[None], tuple(image.shape[-2:]), stride=4, round_to=1, eps=1e-8, subtract_min=True
        )
        return {"keys": scaled.keys, "cam": scaled.high_res, "coarse": scaled.cam}

    write_maps(run, run.train + run.val, maps_of)


def write_fused_masks(run: Run, saliency: Callable[[str], np.ndarray], config: Config) -> None:
    """``mask_crf``: CRF scores of the attention maps joined with saliency; ``mask``: the same without the CRF."""

    def mask_of(name: str, refine: bool) -> Tensor:
        cam, keys = read_cam(run, name).tensors(run.fabric.device)
        scores = torch.cat([background_score(cam, config.alpha), cam], 1)
        if refine:
            scores = dense_crf(run.image(name)[None], unary_from_scores(scores), PSA_CRF)
        salient = torch.from_numpy(saliency(name))[None, None].to(cam.device)
        return fuse_saliency_labels(scores, salient, keys=keys)[0]

    write_masks(run, run.train, lambda name: mask_of(name, refine=False))
    refine_masks(run, config.mask_crf, lambda name: mask_of(name, refine=True))


def check(config: RCAConfig) -> None:
    """Refuse what the network would stumble over, which comes after the training of the plain classifier."""
    region_memory(config, num_classes=1)
    read_out(config)
    if config.size < 1:
        raise ValueError(f"rca.size: expected at least 1 pixel, got {config.size}")


def main(config: Config) -> dict:
    check(config.rca)
    run = start("rca", config, takes=stages_before(config.rca))
    if len(run.dataset.classes) < 2:
        raise ValueError(
            "classes: expected at least 2, since a region is where a class has more than its mean share, got 1"
        )
    saliency = saliency_unless_none(run, config.saliency)
    classifier = classifier_before(run, config.rca, config.classify)

    with run.stage("rca", "Network with a memory of regions"):
        net = train_rca(run, classifier, config.rca)

    with run.stage("cams", "Attention maps accumulated in training"):
        write_attention(run, net, config.rca.size)
        measure_cams(run, config.threshold)

    with run.stage("masks", "Masks: attention and saliency, with a dense CRF"):
        if saliency is None:
            masks_by_threshold(run, config.threshold, everywhere=True)
        else:
            write_fused_masks(run, saliency, config)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf or saliency is None else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
