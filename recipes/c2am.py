# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""C2AM: Contrastive Learning of Class-Agnostic Activation Map (Xie et al., CVPR 2022, arXiv:2203.13505).

A second network learns, without any label, to split photographs into two regions so that the regions of one kind are
alike over the batch and those of different kinds are not. The one that keeps off the borders is the foreground. Its map
replaces the constant background score when the CAMs of a plain classifier become masks.

    python -m recipes run c2am                                      # built-in demo data, two CPU cores
    python -m recipes run c2am --reuse runs/cam-demo-s0             # with classifier and CAMs of a finished run
    python -m recipes run c2am --preset paper --data voc:PATH --contrast.weights MOCO_FILE
    python -m recipes run c2am --preset paper --data voc:PATH --devices 8 ...

The maps are left in saliency/ (8-bit grey, white is foreground), where recipes that need saliency find them. The paper
starts from a self-supervised ResNet-50 (MoCo v2): give the state dict of its encoder. By default the backbone has
weights of ImageNet's labels, so that the maps are learnt without labels of these photographs, not without any.

Unlike the released training, batch norms keep the statistics of the pretraining (but for the one on the map), batches
are always full, and the side of the foreground is told from all batches of the last epoch instead of one of the first.
The released inversion of a map that fires on the background moves its threshold; only ``paper`` does the same. Masks go
to the segmentation as they are, where the paper first hands them to the affinity network of the method whose CAMs they
are from, and another network takes PoolNet's place.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from recipes.cli import run_recipe
from recipes.pipeline.cams import read_cam, write_cams
from recipes.pipeline.classification import check_backbones, make_trunk, train_classifier
from recipes.pipeline.files import load_tensors
from recipes.pipeline.labels import measure_cams, refine_masks, write_masks
from recipes.pipeline.models import Classifier, Trunk
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.saliency import is_object, measure_saliency, read_saliency, save_saliency
from recipes.pipeline.segmentation import segmentation_from_masks, train_segmentation
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import Moment, TaggedCrops, crop_transform, fit, two_speed_groups
from recipes.pipeline.views import views
from recipes.settings.c2am import PRESETS, Config, ContrastConfig, CueConfig
from wsss_losses import C2AMLoss
from wsss_modules import (
    IRN_CRF,
    BorderPolarity,
    DisentangledFeatures,
    Disentangler,
    dense_crf,
    merge_class_agnostic_maps,
    refine_cam_with_background_cue,
    threshold_cue,
    unary_from_mask,
)

__all__ = ["PRESETS", "Config", "main"]


class DisentanglingNet(nn.Module):
    """Images to two regions; counts at their borders which one is the background."""

    def __init__(self, trunk: Trunk, border: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = Disentangler(trunk.out_channels + trunk.level_channels[-2])
        self.polarity = BorderPolarity(border=border)
        for layer in self.modules():  # as released: only convolutions learn, which also keeps the map from saturating
            if isinstance(layer, nn.BatchNorm2d):
                layer.requires_grad_(False)

    def forward(self, images: Tensor, watch: bool = False) -> DisentangledFeatures:
        levels, final = self.trunk(images)
        # a ResNet's maps are past a ReLU anyway; elsewhere it makes the cosines what the losses expect
        fine, coarse = F.relu(levels[-2]), F.relu(final)
        coarse = F.interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)
        out = self.head(torch.cat([coarse, fine], 1))
        if watch:
            self.polarity(out.probability)
        return out


def objective(config: ContrastConfig, sync: bool = False) -> C2AMLoss:
    return C2AMLoss(alpha=config.alpha, normalize=config.normalize, pull_weight=config.pull_weight, sync=sync)


def check(config: Config) -> None:
    """Refuse what the contrast or the merging of its maps would stumble over, after the classifier's training."""
    if config.contrast.weights == "classifier":
        check_backbones(config.contrast.backbone, config.classify.backbone)
    objective(config.contrast)
    BorderPolarity(border=config.contrast.border)
    merge_class_agnostic_maps([torch.zeros(1, 1, 1, 1)], (1, 1), inverted=False, invert=config.cue.invert)


def train_contrast(run: Run, classifier: Classifier, config: ContrastConfig) -> DisentanglingNet:
    """Foregrounds together, backgrounds together, the two apart; without labels."""
    trunk = make_trunk(run, config, config.output_stride, classifier.trunk)
    model = DisentanglingNet(trunk, config.border)
    loss = objective(config, sync=run.fabric.world_size > 1)

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> NamedTuple:
        regions = model(batch["image"], watch=at.epoch == at.epochs - 1)
        return loss(regions.fg, regions.bg)

    square = v2.Resize((config.side, config.side), v2.InterpolationMode.BICUBIC, antialias=True)
    crops = TaggedCrops(run.dataset, run.train, crop_transform(square, config.crop, trunk.mean, trunk.std))
    groups = two_speed_groups(model, [model.head], config.schedule)
    fit(run, "contrast", model, crops, loss_of, groups, config.schedule)
    if run.fabric.world_size > 1:  # each process has counted its own images since the last exchange
        model.load_state_dict(load_tensors(run.path("checkpoints", "contrast.pt"))["model"])
    inverted, border = model.polarity.polarity()
    run.record(polarity={"inverted": bool(inverted), "border": float(border)})
    side = "background" if inverted else "foreground"
    run.console.print(f"  the map is that of the {side}: it is {float(border):.2f} at the borders", highlight=False)
    return model


def write_cues(run: Run, model: DisentanglingNet, config: CueConfig, folder: str) -> None:
    """Foreground map over scales and mirror images, thresholded; then the probability that the dense CRF gives."""
    model.to(run.fabric.device, memory_format=torch.channels_last).eval()
    inverted = bool(model.polarity.polarity().inverted)

    @torch.no_grad()
    def work(name: str) -> None:
        image = run.image(name)
        maps: list[Tensor] = []
        for both in views(image, model.trunk, config.scales, long_side=config.long_side):
            maps += model(both).logits.split(1)
        mirrored = [False, True] * len(config.scales)
        options = {"inverted": inverted, "mirrored": mirrored, "invert": config.invert}
        merged = merge_class_agnostic_maps(maps, tuple(image.shape[-2:]), **options)
        cue = threshold_cue(merged.high_res, config.threshold)
        refined = dense_crf(image[None], unary_from_mask(cue, num_labels=2), IRN_CRF)
        save_saliency(run, name, refined[0, 1].cpu().numpy(), folder)

    run.for_each(run.train, lambda name: run.path(folder, f"{name}.png"), work)


def refine_cues(run: Run, config: SegmentConfig) -> None:
    """Even out the mistakes of the cues by a segmentation network of two classes that is trained on them."""
    cues = train_segmentation(
        run, lambda name: is_object(read_saliency(run, name, "cue")), config, num_classes=2, stage="saliency"
    )
    cues.to(run.fabric.device, memory_format=torch.channels_last).eval()

    @torch.no_grad()
    def work(name: str) -> None:
        image = run.image(name)
        save_saliency(run, name, cues.probabilities(image, config.test_scales)[1].cpu().numpy())

    run.for_each(run.train, lambda name: run.path("saliency", f"{name}.png"), work)


def refined_mask(run: Run, name: str) -> Tensor:
    """The strongest class where its CAM exceeds the background cue, 1 - saliency."""
    cam, keys = read_cam(run, name).tensors()
    saliency = torch.from_numpy(read_saliency(run, name))[None, None]
    return refine_cam_with_background_cue(cam, saliency, keys=keys)[0]


def main(config: Config) -> dict:
    check(config)
    run = start("c2am", config)

    with run.stage("classify", "Classifier from tags"):
        classifier = train_classifier(run, config.classify)

    with run.stage("cams", "Class activation maps"):
        write_cams(run, classifier, run.train + run.val, config.cams)
        measure_cams(run, config.threshold)

    with run.stage("contrast", "Two regions, without labels"):
        net = train_contrast(run, classifier, config.contrast)

    with run.stage("cues", "Class-agnostic maps, and a dense CRF"):
        write_cues(run, net, config.cue, "cue" if config.cue.network else "saliency")

    if config.cue.network:
        with run.stage("saliency", "Saliency network from the maps"):
            refine_cues(run, config.saliency)

    with run.stage("masks", "Masks: CAMs against the background cue, and a dense CRF"):
        measure_saliency(run)
        write_masks(run, run.train, lambda name: refined_mask(run, name))
        refine_masks(run, config.mask_crf)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
