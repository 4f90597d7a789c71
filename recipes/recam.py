# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""ReCAM: Class Re-Activation Maps for Weakly-Supervised Semantic Segmentation (Chen et al., CVPR 2022).

A multi-label classifier lets one pixel answer for several classes. So each class of an image, seen through its own CAM,
becomes a sample of its own, and a second classifier learns by softmax which single class that is. After this short
fine-tuning the maps are read with the product of both classifiers' weights; IRN turns them into masks.

    python -m recipes run recam                                     # built-in demo data, two CPU cores
    python -m recipes run recam --reuse runs/cam-demo-s0            # with the classifier of a finished run
    python -m recipes run recam --preset paper --data voc:PATH      # VOC 2012, one GPU
    python -m recipes run recam --preset paper --data coco:PATH --recam.sce-weight 0.1 --recam.readout cam ...

For COCO the released code gives the softmax loss a weight of 0.1, trains on 6 images a step, takes thresholds of 0.15
for the maps and 0.25 after the walk, and leaves the second classifier out of the maps (``readout cam``): there it only
shapes the features. The threshold for VOC, 0.21, was searched on the masks of the training images; here it is a
constant like any other. As in IRN, weight decay takes the place of momentum in the released optimiser.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recipes import irn
from recipes.cli import run_recipe
from recipes.pipeline.cams import Maps, write_cams
from recipes.pipeline.classification import ClassifyConfig, tagged_crops, train_classifier
from recipes.pipeline.labels import measure_cams
from recipes.pipeline.models import Classifier
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.training import Moment, fit, two_speed_groups
from recipes.settings.recam import PRESETS, Config, ReactivationConfig
from wsss_losses import ReCAMLoss
from wsss_modules import ReCAMHead, ReCAMOutput

__all__ = ["PRESETS", "Config", "main"]


class ReCAMNet(nn.Module):
    """A trained classifier, which goes on training, with a second one beside it."""

    def __init__(self, classifier: Classifier, config: ReactivationConfig) -> None:
        super().__init__()
        self.trunk = classifier.trunk
        channels, classes = classifier.trunk.out_channels, classifier.head.classifier.out_channels
        self.head = ReCAMHead(channels, classes, detach_cam=config.detach_cam, pool=config.pool)
        self.head.cam_head = classifier.head

    def forward(self, images: Tensor) -> ReCAMOutput:
        return self.head(self.trunk(images).final)


class Reactivated(nn.Module):
    """The fine-tuned network, read with the weights of both classifiers."""

    def __init__(self, net: ReCAMNet, config: ReactivationConfig) -> None:
        super().__init__()
        self.trunk, self.head, self.config = net.trunk, net.head, config

    def forward(self, images: Tensor) -> Maps:
        mode, clamp = self.config.readout, self.config.clamp_negative
        return Maps(self.head.reactivated_cam(self.trunk(images).final, mode=mode, clamp_negative=clamp))


def check(config: ReactivationConfig) -> None:
    """Refuse what the fine-tuning or the maps after it would stumble over, when the classifier has been trained."""
    ReCAMLoss(sce_weight=config.sce_weight)
    head = ReCAMHead(1, 1, pool=config.pool)
    head.reactivated_cam(torch.zeros(1, 1, 1, 1), mode=config.readout, clamp_negative=config.clamp_negative)


def reactivate(run: Run, classifier: Classifier, classify: ClassifyConfig, config: ReactivationConfig) -> ReCAMNet:
    """Train both classifiers and the backbone on what each class is seen in: CAMs come anew from every batch."""
    model = ReCAMNet(classifier, config)

    loss = ReCAMLoss(sce_weight=config.sce_weight)

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> NamedTuple:
        out = model(batch["image"])
        return loss(out.logits, out.class_features, batch["labels"], out.recam_weight)

    groups = two_speed_groups(model, [model.head.recam_classifier], config.schedule)
    fit(run, "recam", model, tagged_crops(run, classify, model.trunk), loss_of, groups, config.schedule)
    return model


def main(config: Config) -> dict:
    check(config.recam)
    run = start("recam", config, takes=("classify",))

    with run.stage("classify", "Classifier from tags"):
        classifier = train_classifier(run, config.classify)

    with run.stage("recam", "Second classifier on what each class is seen in"):
        net = reactivate(run, classifier, config.classify, config.recam)

    with run.stage("cams", "Re-activated maps"):
        write_cams(run, Reactivated(net, config.recam), run.train + run.val, config.cams)
        measure_cams(run, config.threshold)

    irn.refine_with_irn(run, config.relation, config.walk, config.mask_crf)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
