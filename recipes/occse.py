# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""OC-CSE: Class-specific Adversarial Erasing with an Ordinary Classifier (Kweon et al., ICCV 2021).

An ordinary classifier, trained on the tags and then frozen, judges a second one. Of each image one class is erased
where the second network's CAM shows it: the judge must then miss that class and still see the others, which drives the
CAM over the whole object and keeps it off the rest. Only the second network is used for the maps. It starts from
ImageNet in ``paper``, from the classifier in the shorter presets.

    python -m recipes run occse                                     # built-in demo data, two CPU cores
    python -m recipes run occse --reuse runs/cam-demo-s0            # with the classifier of a finished run
    python -m recipes run occse --preset paper --data voc:PATH --classify.weights FILE --learner.weights FILE ...

The masks come from PSA's random walk, which the released code leaves to another repository. Its training keeps the
epoch whose CAMs agree best with the pixel labels of the training images; here the last epoch counts. Its optimiser
takes the weight decay for SGD's momentum (5e-4), and its new layer learns no faster than the others; ``paper`` does the
same.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from torch import Tensor, nn

from recipes import rw
from recipes.cli import run_recipe
from recipes.pipeline.cams import write_cams
from recipes.pipeline.classification import ClassifyConfig, check_backbones, make_trunk, tagged_crops, train_classifier
from recipes.pipeline.labels import measure_cams
from recipes.pipeline.models import Classifier, Trunk, build_trunk
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.training import Moment, fit, two_speed_groups
from recipes.settings.occse import PRESETS, Config, ErasingConfig
from wsss_losses import class_specific_erasing_loss
from wsss_modules import CAMHead, ClassSpecificErase, FrozenClassifier, sample_erase_class

__all__ = ["PRESETS", "Config", "main"]


class SignedOutput(NamedTuple):
    """``logits`` (B, K) and ``cam`` (B, K, h, w), negative where a class is denied."""

    logits: Tensor
    cam: Tensor


class Learner(nn.Module):
    """Classifier that gives its maps before ReLU, since they are up-sampled first."""

    def __init__(self, trunk: Trunk, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = CAMHead(trunk.out_channels, num_classes, dropout=dropout)

    def forward(self, images: Tensor) -> SignedOutput:
        features = self.trunk(images).final
        return SignedOutput(self.head(features).logits, self.head.class_maps(features))


def train_learner(run: Run, classifier: Classifier, config: ClassifyConfig, erasing: ErasingConfig) -> Learner:
    """Train the second network under the judgement of the first, which stays as it is and outside the checkpoint."""
    trunk = make_trunk(run, config, config.output_stride, classifier.trunk)
    model = Learner(trunk, len(run.dataset.classes), config.dropout)
    if config.weights == "classifier":
        model.head.load_state_dict(classifier.head.state_dict())
    judge = FrozenClassifier(classifier, parts=erasing.parts)
    erase = ClassSpecificErase(normalise=erasing.normalise, sync=run.fabric.world_size > 1)

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> NamedTuple:
        images, labels = batch["image"], batch["labels"]
        logits, cam = model(images)
        picked = sample_erase_class(labels)
        erased = erase(cam, picked.erased, images)
        with run.fabric.autocast():
            judged = judge(erased.images).logits
        progress = at.epoch / max(1, at.epochs - 1)
        weight = erasing.first_weight + (erasing.last_weight - erasing.first_weight) * progress
        return class_specific_erasing_loss(logits, judged, labels, picked.remaining, weight=weight)

    groups = two_speed_groups(model, [model.head], config.schedule, double_biases=config.double_biases)
    fit(run, "erase", model, tagged_crops(run, config, model.trunk), loss_of, groups, config.schedule)
    return model


def check(config: Config) -> None:
    """Refuse what the second network would stumble over, which comes after the training of the first."""
    if config.learner.weights == "classifier":
        check_backbones(config.learner.backbone, config.classify.backbone)
    for name in ("first_weight", "last_weight"):
        if (weight := getattr(config.erasing, name)) < 0:
            raise ValueError(f"erasing.{name}: expected at least 0, got {weight}")
    ClassSpecificErase(normalise=config.erasing.normalise)
    FrozenClassifier(nn.Identity(), parts=config.erasing.parts)
    if config.learner.backbone != config.classify.backbone:
        trunks = [build_trunk(network.backbone, "random") for network in (config.learner, config.classify)]
        seen_by = {(trunk.mean, trunk.std) for trunk in trunks}
        if len(seen_by) > 1:
            raise ValueError(f"learner.backbone: expected the normalisation of the classifier's images, got {seen_by}")
    rw.check(config.affinity, config.walk, config.learner.backbone)


def main(config: Config) -> dict:
    check(config)
    run = start("occse", config, takes=("classify",))

    with run.stage("classify", "Ordinary classifier from tags"):
        classifier = train_classifier(run, config.classify)

    with run.stage("erase", "Second network, by class-specific erasing"):
        learner = train_learner(run, classifier, config.learner, config.erasing)

    with run.stage("cams", "Class activation maps of the second network"):
        write_cams(run, learner, run.train + run.val, config.cams, signed=True)
        measure_cams(run, config.threshold)

    rw.refine_with_rw(run, learner.trunk, config.affinity, config.walk, config.mask_crf)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
