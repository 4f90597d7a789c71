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
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from torch import Tensor, nn

from recipes import rw
from recipes.cli import run_recipe
from recipes.pipeline.cams import CamConfig, write_cams
from recipes.pipeline.classification import ClassifyConfig, make_trunk, tagged_crops, train_classifier
from recipes.pipeline.labels import measure_cams
from recipes.pipeline.models import Classifier, Trunk
from recipes.pipeline.presets import CAMS, CLASSIFY, SEGMENT
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, RunConfig, start
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import Moment, Schedule, fit, two_speed_groups
from wsss_losses import class_specific_erasing_loss
from wsss_modules import CAMHead, FrozenClassifier, class_specific_erase, sample_erase_class


@dataclass(frozen=True)
class ErasingConfig:
    """Class-specific erasing."""

    first_weight: float = 0.3
    """Weight of the judge's loss in the first epoch; it grows in equal steps."""
    last_weight: float = 1.0
    """Weight of the judge's loss in the last epoch."""
    normalise: Literal["batch", "image"] = "batch"
    """What divides the map that erases: its maximum over the batch, as released, or over the image."""
    parts: int | None = None
    """Save memory: recompute the judge's activations for so many parts of the batch, one after the other."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    classify: ClassifyConfig = field(default_factory=lambda: CLASSIFY["demo"])
    """The ordinary classifier, which becomes the judge."""
    learner: ClassifyConfig = field(default_factory=lambda: replace(CLASSIFY["demo"], weights="classifier"))
    """The network whose maps erase."""
    erasing: ErasingConfig = field(default_factory=ErasingConfig)
    cams: CamConfig = field(default_factory=lambda: CAMS["demo"])
    threshold: float = 0.25
    """Background score at which the CAMs themselves are measured."""
    affinity: rw.AffinityConfig = field(default_factory=lambda: affinity_of("demo"))
    walk: rw.WalkConfig = field(default_factory=lambda: rw.PRESETS["demo"].walk)
    mask_crf: bool = True
    """Train the segmentation on CRF-refined masks."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


def affinity_of(preset: str) -> rw.AffinityConfig:
    """PSA's affinity network, its labels from backgrounds of OC-CSE's, which refines CAMs under 6, 10 and 24."""
    return replace(rw.PRESETS[preset].affinity, low_alpha=6.0, high_alpha=24.0)


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
    seen_by = {(trunk.mean, trunk.std) for trunk in (model.trunk, classifier.trunk)}
    if len(seen_by) > 1:
        raise ValueError(f"learner.backbone: expected the normalisation of the classifier's images, got {seen_by}")
    if config.weights == "classifier":
        model.head.load_state_dict(classifier.head.state_dict())
    judge = FrozenClassifier(classifier, parts=erasing.parts)

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> NamedTuple:
        images, labels = batch["image"], batch["labels"]
        logits, cam = model(images)
        picked = sample_erase_class(labels)
        several = run.fabric.world_size > 1
        erased = class_specific_erase(cam, picked.erased, images, normalise=erasing.normalise, sync=several)
        with run.fabric.autocast():
            judged = judge(erased.images).logits
        progress = at.epoch / max(1, at.epochs - 1)
        weight = erasing.first_weight + (erasing.last_weight - erasing.first_weight) * progress
        return class_specific_erasing_loss(logits, judged, labels, picked.remaining, weight=weight)

    groups = two_speed_groups(model, [model.head], config.schedule, double_biases=config.double_biases)
    fit(run, "erase", model, tagged_crops(run, config, model.trunk), loss_of, groups, config.schedule)
    return model


# Published are 20,000 steps. In a few hundred a new network would only just learn the classes (its own classification
# loss ends well above the classifier's), so in short schedules it takes over what that one knows and learns extent.
PRESETS = {
    "demo": Config(),
    # As many epochs for the learner as for the classifier; each of its steps costs about twice as much.
    "small": Config(
        classify=CLASSIFY["small"],
        learner=replace(CLASSIFY["small"], weights="classifier"),
        cams=CAMS["small"],
        affinity=affinity_of("small"),
        walk=rw.PRESETS["small"].walk,
        segment=SEGMENT["small"],
    ),
    # The classifier is PSA's: how the authors trained theirs is not part of the released code.
    "paper": Config(
        classify=rw.PRESETS["paper"].classify,
        learner=replace(
            rw.PRESETS["paper"].classify,
            dropout=0.0,
            long_side=(256, 448),
            crop=384,
            double_biases=False,
            schedule=Schedule(epochs=15, batch_size=8, lr=0.01, head_lr=0.01, weight_decay=5e-4, momentum=5e-4),
        ),
        cams=CAMS["paper"],
        threshold=0.2,
        affinity=affinity_of("paper"),
        walk=rw.PRESETS["paper"].walk,
        segment=SEGMENT["paper"],
    ),
    "tiny": Config(
        data="demo:tiny",
        classify=CLASSIFY["tiny"],
        learner=replace(CLASSIFY["tiny"], weights="classifier"),
        cams=CAMS["tiny"],
        affinity=affinity_of("tiny"),
        walk=rw.PRESETS["tiny"].walk,
        segment=SEGMENT["tiny"],
    ),
}


def main(config: Config) -> dict:
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
