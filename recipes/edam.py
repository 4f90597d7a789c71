# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""EDAM: Embedded Discriminative Attention Mechanism for WSSS (Wu, Huang, Gao, Wei, Wei, Zhang, Shen, CVPR 2021).

The network puts out a mask for every class itself. What is seen through the mask of a class, in all images of a pair
that share a class, attends to itself and is classified; so a mask learns to cover what makes its class recognisable,
and images help each other. At test time only the masks are left.

    python -m recipes run edam                                      # built-in demo data, two CPU cores
    python -m recipes run edam --preset small --data voc:PATH --saliency RUN_OF_C2AM
    python -m recipes run edam --preset paper --data voc:PATH --saliency FOLDER --edam.weights FILE
    python -m recipes run edam --preset small --data folder:PHOTOS --labels tags.csv --saliency none

This is supervision by image tags *and* saliency maps: compare it with systems that use both. The maps come from
``--saliency``, or from the data set; with ``none`` the masks are those above ``--threshold``, refined by a dense CRF.

Published with ResNet-38 on VOC 2012 train: masks 52.8, with the CRF 58.6, with saliency besides 68.1 mIoU (README of
the released code, which has no code to train on COCO). Pairs were read from a list drawn beforehand; here every image
is the first of one pair an epoch, and its partner is drawn anew: an epoch takes twice the published steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from recipes.cli import run_recipe
from recipes.pipeline.cams import Maps, read_cam, write_cams
from recipes.pipeline.classification import make_trunk
from recipes.pipeline.labels import measure_cams, refine_masks, write_masks
from recipes.pipeline.models import Trunk
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.saliency import saliency_unless_none
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.training import (
    Moment,
    RandomLongSide,
    Schedule,
    TaggedCrops,
    crop_transform,
    fit,
    two_speed_groups,
)
from recipes.settings.edam import PRESETS, Config, EDAMConfig
from wsss_losses import edam_loss
from wsss_modules import (
    PSA_CRF,
    EDAMHead,
    EDAMOutput,
    background_score,
    dense_crf,
    draw_shared_class_pairs,
    edam_pseudo_label,
    sample_class_keys,
    unary_from_scores,
)

__all__ = ["PRESETS", "Config", "main"]

CRF = replace(PSA_CRF, iterations=3)


class EDAM(nn.Module):
    """Images and the classes to ask for -> logits and masks; images alone -> masks. Section 3."""

    def __init__(self, trunk: Trunk, num_classes: int, config: EDAMConfig) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = EDAMHead(
            trunk.out_channels,
            num_classes,
            config.width,
            config.heads,
            config.layers,
            normalization=config.normalization,
            dropout=config.dropout,
        )

    def forward(self, images: Tensor, keys: Tensor) -> EDAMOutput:
        return self.head(self.trunk(images).final, keys)


class Masks(nn.Module):
    """The network at test time: backbone and masks."""

    def __init__(self, net: EDAM) -> None:
        super().__init__()
        self.trunk, self.activation = net.trunk, net.head.activation

    def forward(self, images: Tensor) -> Maps:
        return Maps(self.activation(self.trunk(images).final)[:, 1:])


class PairsOfCrops(Dataset):
    """Two images that share a class: ``image`` (2, 3, crop, crop) and ``labels`` (2, K)."""

    def __init__(self, crops: TaggedCrops) -> None:
        self.crops = crops
        self.labels = torch.from_numpy(crops.dataset.all_labels(crops.names))

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        pair = draw_shared_class_pairs(self.labels, torch.tensor([index]), generator=generator)
        items = [self.crops[index], self.crops[int(pair.second)]]
        return {key: torch.stack([item[key] for item in items]) for key in ("image", "labels")}


def train_edam(run: Run, config: EDAMConfig) -> EDAM:
    """Every pair is asked for the classes that it has and for others that it has not; there is no other loss."""
    trunk = make_trunk(run, config, config.output_stride)
    model = EDAM(trunk, len(run.dataset.classes), config)
    transform = crop_transform(RandomLongSide(*config.long_side), config.crop, trunk.mean, trunk.std, jitter=True)
    pairs = PairsOfCrops(TaggedCrops(run.dataset, run.train, transform))

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
        keys = sample_class_keys(batch["labels"], config.classes)  # (G, S)
        images, labels = batch["image"].flatten(0, 1), batch["labels"].flatten(0, 1)
        return edam_loss(model(images, keys).logits, labels, keys)

    groups = parameter_groups(model, config.schedule)
    fit(run, "edam", model, pairs, loss_of, groups, config.schedule, warmup=config.warmup)
    return model


def parameter_groups(model: EDAM, schedule: Schedule) -> list[dict[str, Any]]:
    """Masks, projection and classifiers are fast, biases twice as fast as weights and without decay.

    Embedding and transformers learn as slowly as the backbone, and all of them decay, biases too.
    """
    head = model.head
    fast = [head.activation, head.project, nn.ParameterList([head.attention.classifier])]
    plain = [*head.attention.embedding.parameters(), *head.attention.blocks.parameters()]
    apart = {id(parameter) for parameter in plain}
    groups = two_speed_groups(model, fast, schedule, double_biases=True)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in apart]
    return [*groups, {"params": plain, "lr": schedule.lr, "weight_decay": schedule.weight_decay}]


def write_labels(run: Run, config: Config, saliency: Callable[[str], np.ndarray] | None) -> None:
    """``mask``: the masks with saliency, where there is any; ``mask_crf``: the same of the scores of a dense CRF."""

    def label(name: str, refine: bool) -> Tensor:
        cam, keys = read_cam(run, name).tensors(run.fabric.device)
        if refine:
            scores = torch.cat([background_score(cam, 1), cam], 1)
            scores = dense_crf(run.image(name)[None], unary_from_scores(scores), CRF)
            if saliency is None:
                return torch.cat([keys.new_zeros(1), keys])[scores[0].argmax(0)]
            cam = scores[:, 1:]
        salient = None if saliency is None else torch.from_numpy(saliency(name))[None, None].to(cam.device)
        options = {"salient": config.salient, "alpha": config.alpha, "beta": config.beta}
        return edam_pseudo_label(cam, salient, keys=keys, threshold=config.threshold, **options)[0]

    write_masks(run, run.train, lambda name: label(name, refine=False))
    refine_masks(run, config.mask_crf or saliency is None, lambda name: label(name, refine=True))


def check(config: Config) -> None:
    """Refuse what the network or its labels would stumble over, before saliency maps are read and anything learns."""
    edam = config.edam
    EDAMHead(1, 1, edam.width, edam.heads, edam.layers, normalization=edam.normalization)
    edam_pseudo_label(torch.zeros(1, 0, 1, 1), torch.zeros(1, 1, 1, 1), alpha=config.alpha, beta=config.beta)


def main(config: Config) -> dict:
    check(config)
    run = start("edam", config, takes=())
    sample_class_keys(torch.zeros(0, 2, len(run.dataset.classes)), config.edam.classes)  # or a word on its number
    saliency = saliency_unless_none(run, config.saliency)

    with run.stage("edam", "Class masks from pairs of images"):
        net = train_edam(run, config.edam)

    with run.stage("cams", "Masks at several scales"):
        write_cams(run, Masks(net), run.train + run.val, config.cams)
        measure_cams(run, config.threshold)

    with run.stage("masks", "Labels: masks and saliency, with a dense CRF"):
        write_labels(run, config, saliency)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf or saliency is None else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
