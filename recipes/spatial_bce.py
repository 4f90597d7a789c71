# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""Spatial-BCE: Adaptive Spatial-BCE Loss for Weakly Supervised Semantic Segmentation (Wu et al., ECCV 2022).

A classifier of pixels, trained on image tags and on a prior of how much of the image each class covers. It pushes the
pixels of a class away from a threshold and learns to predict that threshold for each image and class, so that none has
to be searched. The masks of a phase, refined by a CRF, give the priors of the next.

    python -m recipes run spatial_bce                                   # built-in demo data, two CPU cores
    python -m recipes run spatial_bce --preset paper --data voc:PATH --classify.weights FILE --spatial.weights FILE
    python -m recipes run spatial_bce --preset paper --data voc:PATH --devices 4 ...

The priors of the released first phase come from a file whose making is not documented; here they are those of a plain
classifier's CAMs. The CRF of all masks is IRN's, whose bilateral kernel is 50 pixels wide in place of 40. The released
augmentation is RandAugment on the whole resized image; here it is what keeps the priors exact: mirror images and
changes of colour. The published schedule, with a new head, takes 17,600 steps a phase. In the short phases of the other
presets it ends with all pixels below all thresholds, so that they start from the plain classifier, head and all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.cli import run_recipe
from recipes.pipeline.cams import write_maps
from recipes.pipeline.classification import check_backbones, make_trunk, train_classifier, whole_images
from recipes.pipeline.files import load_arrays
from recipes.pipeline.labels import measure_cams, refine_masks, write_masks
from recipes.pipeline.models import Classifier, Trunk
from recipes.pipeline.ratios import read_ratios, write_ratios
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.training import Moment, fit, two_speed_groups
from recipes.pipeline.views import views
from recipes.settings.spatial_bce import PRESETS, Config, SpatialConfig
from wsss_losses import ForegroundRatioKLLoss, SpatialBCELoss, SpatialBCEThresholdLoss
from wsss_modules import (
    AdaptiveCam,
    AlternatingSchedule,
    SpatialBCEHead,
    SpatialBCEOutput,
    adaptive_cam_threshold,
    cam_to_mask,
    merge_flip,
    multi_scale_cam,
    rank_threshold,
)

__all__ = ["PRESETS", "Config", "main"]


class SpatialNet(nn.Module):
    """Images to scores of pixels and to thresholds."""

    def __init__(self, trunk: Trunk, num_classes: int, config: SpatialConfig) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = SpatialBCEHead(trunk.out_channels, num_classes, config.mid_channels)

    def forward(self, images: Tensor) -> SpatialBCEOutput:
        return self.head(self.trunk(images).final)


class Terms(NamedTuple):
    """The loss of a step: that of the network or of the threshold, and the divergence from the prior."""

    total: Tensor
    spatial: Tensor
    kl: Tensor


def write_priors(run: Run, model: Classifier | SpatialNet, config: Config, folder: str) -> None:
    """Foreground ratios of each training image, from the model's mask after a CRF."""
    mask_of = adaptive_mask
    if isinstance(model, Classifier):
        mask_of, model.trunk = plain_mask, model.trunk.with_output_stride(config.cams.output_stride)
    model.to(run.fabric.device, memory_format=torch.channels_last).eval()
    write_ratios(run, lambda image, labels: mask_of(model, image, labels, config), config.spatial.prior_scale, folder)


def priors_of(run: Run, phase: int, config: SpatialConfig) -> Tensor:
    """Foreground ratios that a phase aims at, 0 for absent classes: (images, K)."""
    priors = read_ratios(run, f"ratios{phase}")
    if config.keep_lost and phase > 1:
        priors = torch.where(priors > 0, priors, priors_of(run, phase - 1, config))
    tagged = torch.from_numpy(run.dataset.all_labels(run.train)) > 0
    return priors.clamp(min=config.least_prior) * tagged


def plain_mask(classifier: Classifier, image: Tensor, labels: Tensor, config: Config) -> Tensor:
    """Mask (H, W) of the plain classifier's CAMs."""
    cams = [classifier(both).cam for both in views(image, classifier.trunk, config.spatial.prior_views)]
    maps = [merge_flip(plain, mirrored)[None] for plain, mirrored in cams]
    merged = multi_scale_cam(maps, labels[None], tuple(image.shape[-2:]))
    return cam_to_mask(merged.cam[None], config.threshold, keys=merged.keys)[0]


def adaptive_mask(net: SpatialNet, image: Tensor, labels: Tensor, config: Config) -> Tensor:
    """Mask (H, W) of the network's maps at the thresholds that it predicts."""
    keys = labels.nonzero()[:, 0] + 1
    out = adaptive_cam(net, image, keys, config.spatial.prior_views, released=config.spatial.released_maps)
    return cam_to_mask(out.scores, 0.0, keys=keys)[0]


def adaptive_cam(
    net: SpatialNet,
    image: Tensor,
    keys: Tensor,
    scales: Sequence[float],
    long_side: int | None = None,
    released: bool = False,
) -> AdaptiveCam:
    """Maps and thresholds of the classes ``keys`` (k,) 1..K: means over ``scales`` and mirror images."""
    maps, levels = [], []
    for both in views(image, net.trunk, scales, long_side=long_side):
        out = net(both)
        plain, mirrored = (out.cam if released else out.logits)[:, keys - 1]
        merged = merge_flip(plain, mirrored, reduce="mean")[:, None]  # (k, 1, h, w)
        maps.append(F.interpolate(merged, image.shape[-2:], mode="bilinear", align_corners=False))
        levels.append(out.threshold_logits[:, keys - 1].mean((0, 2, 3)))
    cam, threshold = torch.stack(maps).mean(0)[:, 0], torch.stack(levels).mean(0).sigmoid()
    temperature = net.head.temperature[keys - 1] * float(released)
    every = torch.ones_like(threshold)
    return adaptive_cam_threshold(cam[None], every[None], threshold[None], temperature, normalize=released)


def build_net(run: Run, config: Config, before: Classifier | SpatialNet) -> SpatialNet:
    """The network of a phase, which goes on from the one before."""
    trunk = make_trunk(run, config.spatial, config.spatial.output_stride, before.trunk)
    net = SpatialNet(trunk, len(run.dataset.classes), config.spatial)
    if isinstance(before, SpatialNet):
        net.load_state_dict(before.state_dict())
    elif config.spatial.weights == "classifier":
        start_as_classifier(net.head, before.head.classifier.weight)
    return net


@torch.no_grad()
def start_as_classifier(head: SpatialBCEHead, weight: Tensor) -> None:
    """Let the scores of pixels be the plain classifier's maps before their ReLU: weight (K, D, 1, 1)."""
    classes = len(weight)
    head.reduce.weight[:classes] = weight.to(head.reduce.weight.device) / head.temperature.exp().view(-1, 1, 1, 1)
    head.classifier.weight.zero_()
    head.classifier.weight[:, :classes, 0, 0] = torch.eye(classes)


def train_phase(run: Run, stage: str, before: Classifier | SpatialNet, priors: Tensor, config: Config) -> SpatialNet:
    """Steps of the network and of the threshold in turn, counted from 0 in each phase."""
    options, sync, priors = config.spatial, run.fabric.world_size > 1, priors.to(run.fabric.device)
    net = build_net(run, config, before)
    alternation = AlternatingSchedule(options.cycle, options.network_steps)
    network_loss, threshold_loss = SpatialBCELoss(), SpatialBCEThresholdLoss(sync=sync)
    ratio_loss = ForegroundRatioKLLoss(sync=sync)

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Terms:
        out, labels, prior = model(batch["image"]), batch["labels"], priors[batch["index"]]
        kl = ratio_loss(out.logits, labels, prior)
        if alternation.is_network_step(at.step):
            spatial = network_loss(out.logits, labels, rank_threshold(out.logits.sigmoid(), prior))
            spatial = spatial + 0 * out.threshold_logits.mean()  # DDP wants to see all parameters in each step
        else:
            spatial = threshold_loss(out.threshold_logits, labels, out.logits)
        return Terms(spatial + options.kl_weight * kl, spatial, kl)

    crops = whole_images(run, net.trunk, options.size, flip=True)
    fit(run, stage, net, crops, loss_of, groups_of(net, options), options.schedule)
    return net


def groups_of(net: SpatialNet, config: SpatialConfig) -> list[dict[str, Any]]:
    """Two speeds, and those of the temperature, without weight decay, and of the thresholds."""
    schedule, apart = config.schedule, (net.head.temperature, net.head.threshold.weight)
    groups = two_speed_groups(net, [net.head], schedule)
    rest = [{**group, "params": [p for p in group["params"] if all(p is not q for q in apart)]} for group in groups]
    return [
        *rest,
        {"params": [apart[0]], "lr": schedule.head_lr, "weight_decay": 0.0},
        {"params": [apart[1]], "lr": config.threshold_lr, "weight_decay": schedule.weight_decay},
    ]


def write_adaptive_cams(run: Run, net: SpatialNet, names: Sequence[str], config: Config) -> None:
    """``cam/IMAGE.npz`` as :func:`write_cams` makes it, and in it ``threshold`` (k,), the learnt ones."""
    net.to(run.fabric.device, memory_format=torch.channels_last).eval()

    def maps_of(name: str) -> dict[str, Tensor]:
        image = run.image(name)
        keys = torch.from_numpy(run.dataset.labels(name)).to(image.device).nonzero()[:, 0] + 1
        cams, released = config.cams, config.spatial.released_maps
        out = adaptive_cam(net, image, keys, cams.scales, cams.long_side, released)
        return {"keys": keys, "cam": out.cam[0], "threshold": out.threshold[0]}

    write_maps(run, names, maps_of)


def learnt_mask(run: Run, name: str) -> Tensor:
    """The map of an image as a mask, at the thresholds that the network predicts for it."""
    stored = load_arrays(run.path("cam", f"{name}.npz"))
    above = torch.from_numpy(stored["cam"].astype(np.float32) - stored["threshold"][:, None, None])
    return cam_to_mask(above[None], 0.0, keys=torch.from_numpy(stored["keys"]))[0]


def main(config: Config) -> dict:
    if config.spatial.weights == "classifier":
        check_backbones(config.spatial.backbone, config.classify.backbone)
    AlternatingSchedule(config.spatial.cycle, config.spatial.network_steps)  # which refuses impossible cycles
    if config.spatial.phases < 1:
        raise ValueError(f"spatial.phases: expected at least 1, got {config.spatial.phases}")
    run = start("spatial_bce", config, takes=("classify",))
    classes, middle = len(run.dataset.classes), config.spatial.mid_channels
    if config.spatial.weights == "classifier" and middle < classes:
        raise ValueError(f"spatial.mid_channels: expected at least the {classes} classes, got {middle}")

    with run.stage("classify", "Classifier from tags"):
        model: Classifier | SpatialNet = train_classifier(run, config.classify)

    for phase in range(1, 1 + config.spatial.phases):
        with run.stage(f"ratios{phase}", f"Phase {phase}: foreground ratios of the masks so far"):
            write_priors(run, model, config, f"ratios{phase}")

        with run.stage(f"phase{phase}", f"Phase {phase}: network and thresholds in turn"):
            model = train_phase(run, f"phase{phase}", model, priors_of(run, phase, config.spatial), config)

    with run.stage("cams", "Maps and their thresholds"):
        write_adaptive_cams(run, model, run.train + run.val, config)
        measure_cams(run, config.threshold)

    with run.stage("masks", "Masks: learnt thresholds, and a dense CRF"):
        write_masks(run, run.train, lambda name: learnt_mask(run, name))
        refine_masks(run, config.mask_crf)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
