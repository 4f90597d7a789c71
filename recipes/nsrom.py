# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""NSROM: Non-Salient Region Object Mining for WSSS (Yao, Chen, Xie, Zhang, Shen, Wu, Tang, Zhang, CVPR 2021).

Saliency tells objects from background but misses those that nobody looks at. Here a classifier reasons over the whole
image, so that plain parts of objects fire too, and its attention is accumulated over the epochs; a second classifier
regresses that. Where the first one hints at an object that saliency misses, the label is left open, and so is all that
lies far from any object once a first segmentation network has looked at images with several classes.

    python -m recipes run nsrom                                     # built-in demo data, two CPU cores
    python -m recipes run nsrom --preset small --data voc:PATH --saliency RUN_OF_C2AM
    python -m recipes run nsrom --preset paper --data voc:PATH --saliency FOLDER

This is supervision by image tags *and* saliency maps: compare it with systems that use both. The maps come from
``--saliency``, or from the data set. Nothing but the photographs is needed at test time.

Segmentation is trained twice, and both times it starts from the initial weights, with a fresh optimiser and the whole
schedule, as the released code does: the first network only labels the training images. ``--warm-start``, which is not
in the original, lets the second go on from the first.

``paper`` trains as published but for the learning rate, which follows the poly schedule of all recipes here instead of
falling to a tenth at epochs 5 and 10 of 15, without Nesterov's momentum, and biases, which have no weight decay; images
are shuffled. The three layers of either classifier start Kaiming normal, the others as torch has them; the released
code does the former for all layers of the first classifier and the latter for the second. Its segmentation starts from
weights of COCO, here from those of ImageNet unless ``--segment.weights`` names a file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.cli import run_recipe
from recipes.pipeline.cams import read_cam, write_maps
from recipes.pipeline.classification import make_trunk, whole_images
from recipes.pipeline.labels import measure_cams, measure_masks, read_mask, write_masks
from recipes.pipeline.models import Trunk
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.saliency import saliency_source
from recipes.pipeline.segmentation import segment, segmentation_from_masks, train_segmentation
from recipes.pipeline.segmenter import Segmenter
from recipes.pipeline.training import Moment, fit, two_speed_groups
from recipes.pipeline.views import view
from recipes.settings.nsrom import PRESETS, Config, NSROMConfig
from wsss_losses import AttentionRegressionLoss
from wsss_modules import (
    GlobalReasoningUnit,
    OnlineAttentionAccumulator,
    attention_to_uint8,
    background_extraction_label,
    non_salient_region_masking,
    potential_object_mining,
)

__all__ = ["PRESETS", "Config", "main"]

FIRST = "cam_first"  # folder of the first classifier's maps; those of the second are in cam


class Maps(NamedTuple):
    """``logits`` (B, K) and the signed maps ``cam`` (B, K, h, w) that they are the means of."""

    logits: Tensor
    cam: Tensor


class Reasoner(nn.Module):
    """Backbone, three layers, reasoning over the whole image, class maps.

    The second classifier has its last ReLU before the reasoning, the first one after it.
    """

    def __init__(self, trunk: Trunk, num_classes: int, config: NSROMConfig, *, second: bool = False) -> None:
        super().__init__()
        self.trunk = trunk
        layers: list[nn.Module] = []
        for channels in (trunk.out_channels, config.channels, config.channels):
            layer = nn.Conv2d(channels, config.channels, 3, padding=1)
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            layers += [layer, nn.ReLU()]
        unit = GlobalReasoningUnit(config.channels, config.nodes, normalize=config.normalize)
        layers.insert(6 if second else 5, unit)
        self.head = nn.Sequential(*layers, nn.Conv2d(config.channels, num_classes, 1))

    def forward(self, images: Tensor) -> Maps:
        maps = self.head(self.trunk(images).final)
        return Maps(maps.mean((2, 3)), maps)


class FirstClassifier(Reasoner):
    """The first one also holds the attention of all training images, so that a checkpoint has it."""

    def __init__(self, trunk: Trunk, config: NSROMConfig, labels: Tensor) -> None:
        super().__init__(trunk, labels.shape[1], config)
        cells = -(-config.size // trunk.output_stride)
        self.attention = OnlineAttentionAccumulator(labels, (cells, cells))


def train_first(run: Run, config: NSROMConfig) -> FirstClassifier:
    """A classifier whose attention is accumulated while it learns."""
    labels = torch.from_numpy(run.dataset.all_labels(run.train))
    net = FirstClassifier(make_trunk(run, config, config.output_stride), config, labels)
    squares = whole_images(run, net.trunk, config.size)
    per_epoch, sync = max(1, len(squares) // config.schedule.batch_size), run.fabric.world_size > 1

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
        out, last = model(batch["image"]), at.step + per_epoch >= at.steps
        if at.epoch >= config.accumulate_from or last:
            net.attention.update(batch["index"], out.cam, last=last, sync=sync)
        return F.multilabel_soft_margin_loss(out.logits, batch["labels"])

    groups = two_speed_groups(net, [net.head], config.schedule, double_biases=True)
    fit(run, "classify", net, squares, loss_of, groups, config.schedule)
    return net


def train_second(run: Run, config: NSROMConfig, attention: OnlineAttentionAccumulator) -> Reasoner:
    """A fresh classifier that regresses the accumulated attention; there is no other loss."""
    trunk = make_trunk(run, config, config.output_stride)
    net = Reasoner(trunk, len(run.dataset.classes), config, second=True)
    squares = whole_images(run, trunk, config.size)
    criterion = AttentionRegressionLoss(sync=run.fabric.world_size > 1)
    attention.to(run.fabric.device)

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
        return criterion(model(batch["image"]).cam, attention(batch["index"]))

    groups = two_speed_groups(net, [net.head], config.schedule, double_biases=True)
    fit(run, "integral", net, squares, loss_of, groups, config.schedule)
    return net


def write_attention(run: Run, net: Reasoner, size: int, names: Sequence[str], folder: str = "cam") -> None:
    """``FOLDER/IMAGE.npz``: maps of the tagged classes, in 8-bit steps, from the image as a square."""
    device = run.fabric.device
    net.to(device, memory_format=torch.channels_last).eval()

    def maps_of(name: str) -> dict[str, Tensor]:
        image = run.image(name)
        square = view(image, (size, size), net.trunk.mean, net.trunk.std, flip=False)
        present = torch.from_numpy(run.dataset.labels(name)).nonzero()[:, 0]
        maps = net(square).cam[:, present.to(device)]
        attention = attention_to_uint8(maps, tuple(image.shape[-2:]))[0].float() / 255
        return {"keys": present + 1, "cam": attention}

    write_maps(run, names, maps_of, folder)


def first_label(run: Run, name: str, saliency: Callable[[str], np.ndarray]) -> Tensor:
    """Objects by attention, background by saliency; open where the first classifier hints at more objects."""
    second, first = read_cam(run, name), read_cam(run, name, FIRST)
    (attention, keys), (hints, _) = second.tensors(), first.tensors()
    label = background_extraction_label(attention, torch.from_numpy(saliency(name))[None, None], keys=keys)
    return potential_object_mining(label, hints, keys=keys)[0]


def second_label(run: Run, name: str, saliency: Callable[[str], np.ndarray], dilation: int) -> Tensor:
    """What the first network sees; in images with several classes open where that is far from all objects."""
    seen, label = (torch.from_numpy(read_mask(run, name, folder)).long()[None] for folder in ("first_crf", "mask"))
    salient, labels = torch.from_numpy(saliency(name))[None, None], torch.from_numpy(run.dataset.labels(name))[None]
    return non_salient_region_masking(seen, label, salient, labels, dilation=dilation)[0]


def first_segmentation(run: Run, config: Config) -> Segmenter:
    """Train on ``mask`` and label the training images: ``first``, and ``first_crf`` with a dense CRF."""
    network = train_segmentation(run, lambda name: read_mask(run, name), config.segment, stage="segment_first")
    segment(run, network, run.train, replace(config.segment, test_scales=config.first_scales, crf=True), "first")
    measure_masks(run, "first_crf", "first segmentation+crf")
    return network


def main(config: Config) -> dict:
    if config.dilation < 1:
        raise ValueError(f"dilation: expected at least 1 pixel, got {config.dilation}")
    run = start("nsrom", config, takes=())
    saliency = saliency_source(run, config.saliency)

    with run.stage("classify", "Classifier that reasons, its attention accumulated"):
        first = train_first(run, config.nsrom)

    with run.stage("integral", "Classifier that regresses the attention"):
        second = train_second(run, config.nsrom, first.attention)

    with run.stage("cams", "Attention maps of both"):
        write_attention(run, first, config.nsrom.size, run.train, FIRST)
        write_attention(run, second, config.nsrom.size, run.train + run.val)
        measure_cams(run, config.threshold, FIRST, "first seed")
        measure_cams(run, config.threshold)

    with run.stage("masks", "Labels: attention and saliency, objects mined"):
        write_masks(run, run.train, lambda name: first_label(run, name, saliency))
        measure_masks(run)

    with run.stage("segment_first", "First segmentation network, which labels the training images"):
        network = first_segmentation(run, config)

    with run.stage("masks_second", "Labels: first segmentation with a dense CRF, non-salient regions open"):
        write_masks(run, run.train, lambda name: second_label(run, name, saliency, config.dilation), "mask_crf")
        measure_masks(run, "mask_crf", "mask+crf")

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf", config.segment, start_from=network if config.warm_start else None)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
