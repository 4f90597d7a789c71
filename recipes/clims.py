# /// script
# requires-python = ">=3.10"
# dependencies = ["wsss[recipes,weights]"]
# ///
"""CLIMS: Cross Language Image Matching for Weakly Supervised Semantic Segmentation (Xie, Hou, Ye, Shen, CVPR 2022).

Class maps are judged by a frozen image-text model, in place of a classification loss. What the map of a class shows of
the image should match the text of the class (OTM), what it leaves should not (BTM); it should match no text of a
background that the class is often seen with (CBS), and maps should be small (REG), else the whole image would do.
Training starts from a classifier; IRN turns the maps into masks.

    python -m recipes run clims                                     # built-in demo data, two CPU cores
    python -m recipes run clims --preset small --data voc:PATH --classes bird,cat,cow,dog,horse,sheep
    python -m recipes run clims --preset paper --data voc:PATH      # VOC 2012, one GPU, CLIP of open_clip
    python -m recipes run clims --preset paper --data coco:PATH --clims.weights 2 14 1.25 0.2 --clims.threshold 0.285

COCO's schedule is ``--clims.schedule.epochs 8 --clims.schedule.lr 5e-4 --clims.schedule.head-lr 5e-3``, and its walk
ends at ``--walk.threshold 0.25``.

The image-text model is whatever ``--critic.model`` names. CLIP is the published one (extra ``clip``; its weights are
downloaded, or a file). ``conse`` needs no download: an ImageNet classifier read by the sentence embeddings of its
classes (extra ``sentences``). ``captions`` is a small one trained on the captions of the data set, which the demo set
has. MODULE:FUNCTION is a model of your own.

Published for VOC 2012 train: maps of 58.6 mIoU and 74.1 after IRN's walk (``root``, the authors' later version), 56.6
and 70.5 after PSA's for the camera-ready one, which is ``--clims.objective camera_ready --clims.schedule.epochs 10
--critic.renormalize``; its CLIP was first fine-tuned on VOC. As in the release, ``paper`` gives CLIP the classifier's
normalisation, and has no momentum (else ``--clims.schedule.momentum 0.9``). Unlike there, batch norm keeps its
statistics, as in all recipes, and an image is resized once, not twice in a row, which only blurs it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from recipes import irn
from recipes.cli import run_recipe
from recipes.pipeline.cams import write_cams
from recipes.pipeline.classification import ClassifyConfig, tagged_crops, train_classifier
from recipes.pipeline.image_text import ImageTextModel, make_critic, typical_similarity
from recipes.pipeline.labels import measure_cams
from recipes.pipeline.models import Classifier
from recipes.pipeline.report import finish
from recipes.pipeline.run import Run, start
from recipes.pipeline.segmentation import segmentation_from_masks
from recipes.pipeline.training import Moment, fit, two_speed_groups
from recipes.settings.clims import PRESETS, PUBLISHED, Config, MatchingConfig
from wsss_losses import CLIMSCameraReadyLoss, CLIMSLoss, CLIMSTerms
from wsss_modules import (
    CAMERA_READY_VOC_PROMPTS,
    COCO_PROMPTS,
    GENERAL_PROMPTS,
    VOC_PROMPTS,
    PromptSet,
    SigmoidCAMHead,
    SigmoidCAMOutput,
    TextPromptBank,
)

__all__ = ["PRESETS", "Config", "main"]

WEIGHTS = ("object_weight", "background_weight", "suppression_weight", "area_weight")


class CLIMSNet(nn.Module):
    """The trained classifier, whose maps are now the output: a sigmoid of them in training, a ReLU in use."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.trunk = classifier.trunk
        self.head = SigmoidCAMHead(classifier.trunk.out_channels, classifier.head.classifier.out_channels)
        self.head.load_state_dict(classifier.head.state_dict())

    def forward(self, images: Tensor) -> SigmoidCAMOutput:
        return self.head(self.trunk(images).final)


def prompts_for(run: Run, config: MatchingConfig) -> PromptSet:
    """The published words for VOC and COCO, general ones for anything else."""
    kind = run.config.data.partition(":")[0]
    prompts = {"voc": VOC_PROMPTS, "coco": COCO_PROMPTS}.get(kind, GENERAL_PROMPTS)
    if config.objective == "camera_ready":
        prompts = CAMERA_READY_VOC_PROMPTS
    return prompts if config.backgrounds is None else replace(prompts, backgrounds=config.backgrounds)


def objective(config: MatchingConfig, **options: Any) -> CLIMSLoss | CLIMSCameraReadyLoss:
    """The objective of a run, which refuses weights and a slope that it can't have."""
    weights = dict(zip(WEIGHTS, config.weights or PUBLISHED[config.objective], strict=True))
    options |= {"positive": config.positive, "leak": config.leak, **weights}
    if config.objective == "camera_ready":
        return CLIMSCameraReadyLoss(**options)
    return CLIMSLoss(**options) if config.threshold is None else CLIMSLoss(threshold=config.threshold, **options)


def train_clims(
    run: Run, net: CLIMSNet, critic: ImageTextModel, renormalize: bool, classify: ClassifyConfig, config: MatchingConfig
) -> None:
    """Images through their maps, judged by the image-text model; texts are encoded once."""
    bank = TextPromptBank(run.dataset.classes, critic.encode_text, prompts_for(run, config)).to(run.fabric.device)
    similarity = typical_similarity(run, critic, bank)
    run.record(critic={**similarity, "prompts": bank.class_prompts, "backgrounds": bank.background_prompts})
    run.console.print(f"  texts of the tags {similarity['of_tags']}, of other classes {similarity['of_other_classes']}")
    trunk = net.trunk
    norms = (trunk.mean, trunk.std), (critic.mean, critic.std)
    options: dict[str, Any] = {"size": critic.size, "sync": run.fabric.world_size > 1}
    if renormalize and norms[0] != norms[1]:
        options |= {"image_norm": norms[0], "encoder_norm": norms[1]}
    threshold = similarity["of_tags"] if config.threshold is None else config.threshold
    loss = objective(replace(config, threshold=threshold), **options)
    if config.objective == "root":
        texts = bank.class_features, bank.background_features
    else:
        texts = bank.class_features, bank.related_features, bank.related, bank.class_weight

    def encode(images: Tensor) -> Tensor:
        with run.fabric.autocast():
            return critic.image_tower(images)

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> CLIMSTerms:
        images = batch["image"]
        return loss(model(images).activation, images, batch["labels"], encode, *texts)

    groups = two_speed_groups(net, [net.head], config.schedule)
    crops = tagged_crops(run, classify, trunk, resizes=2 if config.double_resize else 1)
    fit(run, "clims", net, crops, loss_of, groups, config.schedule)


def main(config: Config) -> dict:
    objective(config.clims)  # refuses options before any work is done
    run = start("clims", config, takes=("classify",))

    with run.stage("critic", "Image-text model"):
        critic = make_critic(run, config.critic)

    with run.stage("classify", "Classifier from tags"):
        classifier = train_classifier(run, config.classify)

    with run.stage("clims", "Maps that the image-text model agrees with"):
        net = CLIMSNet(classifier)
        train_clims(run, net, critic, config.critic.renormalize, config.classify, config.clims)

    with run.stage("cams", "Maps of the classes"):
        write_cams(run, net, run.train + run.val, config.cams)
        measure_cams(run, config.threshold)

    irn.refine_with_irn(run, config.relation, config.walk, config.mask_crf)

    with run.stage("segment", "Segmentation network from the masks"):
        segmentation_from_masks(run, "mask_crf" if config.mask_crf else "mask", config.segment)

    return finish(run)


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
