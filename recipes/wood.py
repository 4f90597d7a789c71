# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""W-OoD: Weakly Supervised Semantic Segmentation using Out-of-Distribution Data (Lee et al., CVPR 2022).

Pictures that show none of the classes, and on which a classifier fires all the same (rails for the train, water for the
boat), teach it what the classes are not. A trained classifier is fine-tuned: images are pulled to the mean feature of
their classes and pushed from the nearest clusters of the pictures from outside, and these count as negatives of every
class after a small step that makes the classifier surer of them.

    python -m recipes run wood                                      # built-in demo data, two CPU cores
    python -m recipes run wood --reuse runs/cam-demo-s0             # with the classifier of a finished run
    python -m recipes run wood --preset paper --data voc:PATH --outside FOLDER

Which pictures to take: rank a folder of candidates by what the classifier believes to see in them, look through the
list that is written, strike out those that do show a class, and train with the rest (--reuse runs/candidates keeps the
classifier).

    python -m recipes run wood --preset small --data voc:PATH --rank FOLDER --out runs/candidates
    python -m recipes run wood --preset small --data voc:PATH --outside DIR --outside-list runs/candidates/outside.txt

The maps are plain CAMs, in ``paper`` with the thresholds of AdvCAM's, which are the paper's best. The released code
keeps the checkpoint whose CAMs agree best with the pixel labels of the training images; here the last one counts, but
for ``--oracle-checkpoint-selection``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recipes import irn
from recipes.cli import run_recipe
from recipes.pipeline.cams import cams_of, write_cams
from recipes.pipeline.classification import tagged_crops, train_classifier
from recipes.pipeline.labels import measure_cams
from recipes.pipeline.models import Classifier, Trunk, freeze_stages
from recipes.pipeline.oracle import Choose, choose_by_cams, judges
from recipes.pipeline.outside import CropsWithOutside, add_outside, find_outside, pooled_features, rank_outside
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.training import Moment, fit, two_speed_groups
from recipes.settings.wood import PRESETS, Config, WoodConfig
from wsss_losses import WOoDLoss
from wsss_modules import FeatureCentreBank, centre_distances, gradient_climb

__all__ = ["PRESETS", "Config", "main"]


class Output(NamedTuple):
    """``logits`` (B, K), ``cam`` (B, K, h, w), ``features`` (B, D), the mean over the cells of the last map."""

    logits: Tensor
    cam: Tensor
    features: Tensor


class WOoDNet(nn.Module):
    """The classifier with the centres that its features are compared to, all in one checkpoint."""

    def __init__(self, classifier: Classifier, bank: FeatureCentreBank) -> None:
        super().__init__()
        self.trunk, self.head, self.bank = classifier.trunk, classifier.head, bank

    def forward(self, images: Tensor) -> Output:
        maps = self.trunk(images).final
        return Output(*self.head(maps), maps.mean((2, 3)))

    def centres(self) -> tuple[Tensor, ...]:
        return self.bank.class_centres, self.bank.ood_centres, self.bank.class_valid, self.bank.ood_valid


class Terms(NamedTuple):
    """Those of the loss, and the mean distance of the images to their classes, which drifts as the backbone learns."""

    total: Tensor
    classification: Tensor
    distance: Tensor
    ood: Tensor
    own_class: Tensor


def fit_centres(
    run: Run, trunk: Trunk, bank: FeatureCentreBank, outside: tuple[str, ...], config: WoodConfig, folder: str
) -> None:
    """The mean feature of each class, and cluster centres of the images from outside."""
    features = pooled_features(run, trunk, run.train, folder=folder)
    ood_features = pooled_features(run, trunk, outside, config.long_side, folder)
    bank.fit(features, torch.from_numpy(run.dataset.all_labels(run.train)), ood_features)


def objective(config: WoodConfig, classes: Sequence[str], sync: bool = False) -> WOoDLoss:
    return WOoDLoss(
        distance_weight=config.distance_weight,
        ood_weight=config.ood_weight,
        topk=config.topk,
        selection=config.selection,
        ignore_top=[k for k, name in enumerate(classes) if name in config.ignore_top],
        sync=sync,
    )


def check(config: WoodConfig) -> None:
    """Refuse what centres, climb or loss would stumble over, when the classifier has been trained."""
    objective(config, ())
    FeatureCentreBank(1, config.clusters, 1)
    gradient_climb(lambda images: images.mean((2, 3)), torch.zeros(1, 3, 1, 1), config.step)
    if config.refresh_every is not None and config.refresh_every < 1:
        raise ValueError(f"refresh_every: expected at least 1 epoch, got {config.refresh_every}")


def oracle(run: Run, net: WOoDNet, config: Config) -> Choose:
    """Every ten steps of the last quarter epoch, the mIoU of the CAMs on the seed list at their best threshold."""

    def due(at: Moment) -> bool:
        return at.epoch == at.epochs - 1 and at.in_epoch > 0.75 and at.step % 10 == 0

    def cams_now() -> Callable[[str], tuple[Tensor, Tensor]]:
        model = copy.deepcopy(net).eval()
        model.trunk = model.trunk.with_output_stride(config.cams.output_stride)

        def maps_of(name: str) -> tuple[Tensor, Tensor]:
            found = cams_of(run, model, name, config.cams)
            return found.high_res, found.keys

        return maps_of

    return choose_by_cams(run, cams_now, due, config.threshold)


def fine_tune(
    run: Run,
    net: WOoDNet,
    crops: CropsWithOutside,
    outside: tuple[str, ...],
    config: WoodConfig,
    choose: Choose | None = None,
) -> None:
    """Tags, distances to the centres, and climbed images from outside as negatives of every class."""
    net.trunk.thaw()
    freeze_stages(net.trunk.body, config.frozen_stages)
    several = run.fabric.world_size > 1
    loss = objective(config, run.dataset.classes, several)
    refresh_steps = max(1, len(crops) // config.schedule.batch_size) * (config.refresh_every or 0)

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Terms:
        if refresh_steps and at.step and at.step % refresh_steps == 0:
            fit_centres(run, net.trunk, net.bank, outside, config, f"features-{at.epoch}")
            model.train()
        climbed = batch["outside"][:0]
        if config.ood_weight:  # in single precision: its gradients, which nothing scales, could vanish in half
            climbed = gradient_climb(lambda images: net(images).logits, batch["outside"], config.step, sync=several)
        labels, size = batch["labels"], len(batch["image"])
        logits, _, features = model(torch.cat([batch["image"], climbed]))
        terms = loss(logits[:size], features[:size], logits[size:], labels, *net.centres())
        with torch.no_grad():
            to_classes = centre_distances(features[:size], net.bank.class_centres, net.bank.class_valid)
            own_class = (to_classes * labels).sum() / labels.sum().clamp(min=1)
        return Terms(*terms, own_class)

    groups = two_speed_groups(net, [net.head], config.schedule)
    fit(run, "wood", net, crops, loss_of, groups, config.schedule, choose=choose)


def main(config: Config) -> dict:
    check(config.wood)
    if config.rank is None:
        found = find_outside(config.outside, config.outside_list)
    else:
        found = find_outside(config.rank, None, "rank")
    run = start("wood", config, takes=("classify",))
    if config.oracle_checkpoint_selection:
        judges(run, "seed")  # or a word that there are none
    outside = add_outside(run, found)
    if unknown := [name for name in config.wood.ignore_top if name not in run.dataset.classes]:
        run.console.print(f"  [yellow]ignore_top: {run.dataset.name} has no {', '.join(unknown)}[/]", highlight=False)

    with run.stage("classify", "Classifier from tags"):
        classifier = train_classifier(run, config.classify)

    if config.rank is not None:
        with run.stage("rank", "Candidates from outside"):
            rank_outside(run, classifier, outside, config.wood.long_side)
        return finish(run)

    with run.stage("centres", "Centres of the classes and of the images from outside"):
        bank = FeatureCentreBank(len(run.dataset.classes), config.wood.clusters, classifier.trunk.out_channels)
        fit_centres(run, classifier.trunk, bank, outside, config.wood, "features")

    with run.stage("wood", "Fine-tuning with images from outside"):
        net = WOoDNet(classifier, bank)
        crops = CropsWithOutside(tagged_crops(run, config.classify, net.trunk), outside)
        choose = oracle(run, net, config) if config.oracle_checkpoint_selection else None
        fine_tune(run, net, crops, outside, config.wood, choose)

    with run.stage("cams", "Class activation maps of the fine-tuned classifier"):
        write_cams(run, net, run.train + run.val, config.cams)
        measure_cams(run, config.threshold)

    irn.refine_with_irn(run, config.relation, config.walk, config.mask_crf)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
