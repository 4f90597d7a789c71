# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""AEFT: Adversarial Erasing Framework via Triplet with Gated Pyramid Pooling Layer (Yoon et al., ECCV 2022).

A classifier whose image scores come from a pyramid of its class maps in place of their average. After some epochs
each image gets two companions: a copy without its most activated area, whose pyramid is pulled to that of the image,
and an image without a common class, whose pyramid is pushed away. Nobody says what an erased image must be classified
as, which is what drives plain erasing over the borders of objects. The network starts from ImageNet in ``paper``, from
a plain classifier in the shorter presets.

    python -m recipes run aeft                                      # built-in demo data, two CPU cores
    python -m recipes run aeft --preset paper --data voc:PATH --gpp.weights FILE --affinity.weights FILE
    python -m recipes run aeft --preset paper --data voc:PATH --devices 8 ...

The README of the released code gives 56.2 mIoU for the maps of its checkpoint on VOC 2012 train. Its optimiser takes
the weight decay for SGD's momentum (5e-4), its new layers learn no faster than the others, and with triplets, which
come in batches of 32, only the first 8 images are classified; ``paper`` does the same.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from recipes import rw
from recipes.cli import run_recipe
from recipes.pipeline.cams import write_cams
from recipes.pipeline.classification import classifier_before, make_trunk, stages_before
from recipes.pipeline.labels import measure_cams
from recipes.pipeline.models import Classifier, Trunk
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.training import Moment, RandomLongSide, TaggedCrops, crop_transform, fit, two_speed_groups
from recipes.settings.aeft import PRESETS, Config, TripletConfig
from wsss_losses import AEFTLoss
from wsss_modules import DisjointNegatives, GatedPyramidPooling, SoftErase, sample_disjoint_negatives

__all__ = ["PRESETS", "Config", "main"]


class Output(NamedTuple):
    """Of the images: ``logits`` (B, K), signed maps ``cam`` and ``gpp`` (B, K, h, w). With labels also of their copies:
    ``mask`` (B, 1, H, W) and ``gpp_masked``.
    """

    logits: Tensor
    cam: Tensor
    gpp: Tensor
    mask: Tensor | None = None
    gpp_masked: Tensor | None = None


class PyramidClassifier(nn.Module):
    """Class maps of 1 x 1 convolutions over a backbone, scored by their gated pyramid."""

    def __init__(self, trunk: Trunk, num_classes: int, erase: SoftErase, width: int = 256) -> None:
        super().__init__()
        self.trunk, self.erase = trunk, erase
        self.head = nn.Sequential(
            nn.Conv2d(trunk.out_channels, width, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(width, num_classes, 1, bias=False),
        )
        for convolution in (self.head[0], self.head[2]):
            nn.init.xavier_uniform_(convolution.weight)
        self.pooling = GatedPyramidPooling(num_classes)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Output:
        """With ``labels``, also pass the erased images: one call of two passes, as DDP wants it."""
        cam = self.head(self.trunk(images).final)
        logits, gpp = self.pooling(cam)
        if labels is None:
            return Output(logits, cam, gpp)
        mask = self.erase(cam, labels, images.shape[2:])
        copy = self.head(self.trunk(images * mask).final)
        return Output(logits, cam, gpp, mask, self.pooling(copy).gpp)

    @torch.no_grad()
    def start_as(self, classifier: Classifier) -> None:
        """Show half of the maps of ``classifier``, whose score is then about that of the map and not of its square."""
        first, second, weight = self.head[0].weight, self.head[2].weight, classifier.head.classifier.weight.cpu()
        classes = len(weight)
        if len(first) < 2 * classes:
            raise ValueError(f"classes: expected at most {len(first) // 2} for a head of {len(first)}, got {classes}")
        first[: 2 * classes] = torch.cat([weight, -weight])  # a map is its positive part less its negative part
        second.zero_()
        second[:, : 2 * classes, 0, 0] = torch.cat([torch.eye(classes), -torch.eye(classes)], 1) / 2


def pyramid_classifier(run: Run, config: Config, classifier: Classifier | None) -> PyramidClassifier:
    trunk = make_trunk(run, config.gpp, config.gpp.output_stride, classifier and classifier.trunk)
    erase = SoftErase(config.triplet.erase, detach_mask=config.triplet.detach_mask)
    model = PyramidClassifier(trunk, len(run.dataset.classes), erase)
    if classifier is not None:
        model.start_as(classifier)
    return model


def negatives_of(run: Run, labels: Tensor) -> DisjointNegatives:
    """Negatives of this process's images out of the batch of all processes."""
    if run.fabric.world_size == 1:
        return sample_disjoint_negatives(labels)
    first = run.fabric.global_rank * len(labels)
    sampled = sample_disjoint_negatives(run.fabric.all_gather(labels).flatten(0, 1))
    return DisjointNegatives(*(column[first : first + len(labels)] for column in sampled))


def objective(config: TripletConfig, classified: int = 1, sync: bool = False) -> AEFTLoss:
    return AEFTLoss(
        attraction_weight=config.attraction,
        repulsion_weight=config.repulsion,
        classified=classified,
        margin=config.margin,
        threshold=config.exclude,
        min_hard=config.min_hard,
        sync=sync,
    )


def train(run: Run, model: PyramidClassifier, config: Config, stage: str) -> None:
    """Train without triplets (stage ``gpp``) or with them."""
    plain = stage == "gpp"
    schedule, several = (config.gpp if plain else config.triplet).schedule, run.fabric.world_size
    triplet_loss = objective(config.triplet, max(1, config.gpp.schedule.batch_size // several), sync=several > 1)

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor | NamedTuple:
        images, labels = batch["image"], batch["labels"]
        if plain:
            return F.binary_cross_entropy_with_logits(model(images).logits, labels)
        out = model(images, labels)
        return triplet_loss(out.logits, out.gpp, out.gpp_masked, out.cam, labels, *negatives_of(run, labels))

    options, trunk = config.gpp, model.trunk
    resize = RandomLongSide(*options.long_side)
    if config.strong_jitter:
        jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
        resize = v2.Compose([resize, jitter, v2.RandomGrayscale(0.02)])
    transform = crop_transform(resize, options.crop, trunk.mean, trunk.std, jitter=options.jitter)
    groups = two_speed_groups(model, [model.head, model.pooling], schedule, double_biases=options.double_biases)
    fit(run, stage, model, TaggedCrops(run.dataset, run.train, transform), loss_of, groups, schedule)


def main(config: Config) -> dict:
    objective(config.triplet)  # refuses what does not fit before anything is trained, as the next line does
    rw.check(config.affinity, config.walk, config.gpp.backbone)
    run = start("aeft", config, takes=stages_before(config.gpp))
    classifier = classifier_before(run, config.gpp, config.classify)

    with run.stage("gpp", "Classifier with gated pyramid pooling"):
        model = pyramid_classifier(run, config, classifier)
        train(run, model, config, "gpp")

    with run.stage("triplet", "Triplets of images, erased images and negatives"):
        train(run, model, config, "triplet")

    with run.stage("cams", "Class activation maps"):
        write_cams(run, model, run.train + run.val, config.cams, signed=True)
        measure_cams(run, config.threshold)

    rw.refine_with_rw(run, model.trunk, config.affinity, config.walk, config.mask_crf)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
