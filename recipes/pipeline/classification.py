"""The first stage of every system: a multi-label classifier trained on image tags alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from recipes.pipeline.models import Classifier, Trunk, build_trunk, freeze_stages
from recipes.pipeline.run import Run
from recipes.pipeline.training import (
    Moment,
    RandomLongSide,
    Schedule,
    TaggedCrops,
    crop_transform,
    fit,
    two_speed_groups,
)


@dataclass(frozen=True)
class ClassifyConfig:
    """The classifier and its training."""

    backbone: str = "tf_efficientnet_lite0"
    """timm name, NAME-irn for an undilated stride-16 ResNet, or resnet38."""
    weights: str = "imagenet"
    """imagenet, random or a file; for a second network also classifier, the weights of the first."""
    output_stride: int = 32
    """Pixels per cell of the last map while training."""
    frozen_stages: int = 4
    """Stem and stages that keep their pretrained weights."""
    dropout: float = 0.0
    """Channel dropout before the classifier."""
    long_side: tuple[int, int] = (256, 400)
    """Range of the longer side of the resized images in pixels."""
    crop: int = 224
    """Side of the training crops in pixels."""
    jitter: bool = False
    """Jitter brightness, contrast, saturation (0.3) and hue (0.1)."""
    double_biases: bool = False
    """Train biases at twice the rate, without weight decay."""
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=5, batch_size=16, lr=0.02, head_lr=0.2))
    """Training schedule."""


def multi_label_loss(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
    """Multi-label soft margin loss: the mean over classes and images of the logistic loss of each tag."""
    return F.multilabel_soft_margin_loss(model(batch["image"]).logits, batch["labels"])


def train_classifier(
    run: Run,
    config: ClassifyConfig,
    loss_of: Callable[[nn.Module, dict[str, Tensor], Moment], Any] = multi_label_loss,
) -> Classifier:
    """Train a classifier on the tags of the training images with ``loss_of(model, batch, at)``."""
    model = build_classifier(run, config)
    groups = two_speed_groups(model, [model.head], config.schedule, double_biases=config.double_biases)
    fit(run, "classify", model, tagged_crops(run, config, model.trunk), loss_of, groups, config.schedule)
    return model


def build_classifier(run: Run, config: ClassifyConfig) -> Classifier:
    """An untrained classifier on a pretrained backbone with frozen first stages."""
    trunk = make_trunk(run, config, config.output_stride)
    return Classifier(trunk, len(run.dataset.classes), dropout=config.dropout)


def stages_before(network: BackboneConfig) -> tuple[str, ...]:
    """What ``--reuse`` takes over for a ``network`` that may go on from a plain classifier."""
    return ("classify",) if network.weights == "classifier" else ()


def classifier_before(run: Run, network: BackboneConfig, config: ClassifyConfig) -> Classifier | None:
    """The plain classifier that ``network`` goes on from, a stage of its own; None if it has other weights."""
    if network.weights != "classifier":
        return None
    check_backbones(network.backbone, config.backbone)
    with run.stage("classify", "Plain classifier to start from"):
        return train_classifier(run, config)


class BackboneConfig(Protocol):
    """What the settings of any network say of its backbone."""

    @property
    def backbone(self) -> str: ...

    @property
    def weights(self) -> str: ...

    @property
    def frozen_stages(self) -> int | None: ...


def make_trunk(run: Run, config: BackboneConfig, output_stride: int, classifier: Trunk | None = None) -> Trunk:
    """A backbone with its first stages frozen; what would be pretrained is random in a run cut short.

    Args:
        run: the run.
        config: name, weights and number of frozen stages.
        output_stride: pixels per cell of the last map.
        classifier: whose weights it starts from if ``config.weights`` is "classifier".

    Raises:
        ValueError: an unknown backbone or weights, or those of a classifier of another kind.
    """
    starts_as_classifier = config.weights == "classifier" and classifier is not None
    if starts_as_classifier:
        check_backbones(config.backbone, classifier.name)
    weights = "random" if starts_as_classifier else run.weights(config.weights)
    trunk = build_trunk(config.backbone, weights, output_stride)
    if starts_as_classifier:
        trunk.body.load_state_dict(classifier.body.state_dict())
    freeze_stages(trunk.body, config.frozen_stages)
    return trunk


def check_backbones(wanted: str, of_classifier: str) -> None:
    """Refuse to start a network on the weights of a classifier with another backbone."""
    if wanted != of_classifier:
        raise ValueError(f"weights: expected those of {wanted}, got a classifier with {of_classifier}")


def tagged_crops(run: Run, config: ClassifyConfig, trunk: Trunk, *, resizes: int = 1) -> TaggedCrops:
    """Augmented crops of the training images with their tags, normalised as ``trunk`` wants them."""
    resize = v2.Compose([RandomLongSide(*config.long_side)] * resizes)
    transform = crop_transform(resize, config.crop, trunk.mean, trunk.std, jitter=config.jitter)
    return TaggedCrops(run.dataset, run.train, transform)


def whole_images(run: Run, trunk: Trunk, size: int, *, flip: bool = False) -> TaggedCrops:
    """The training images squeezed to squares, their colours changed, and mirrored if ``flip``, but never cropped.

    So each class keeps its share of the image, and without ``flip`` each cell its place.
    """
    transform = v2.Compose(
        [
            v2.Resize((size, size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            *([v2.RandomHorizontalFlip()] if flip else []),
            v2.ColorJitter(0.3, 0.3, 0.3, 0.1),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(list(trunk.mean), list(trunk.std)),
        ]
    )
    return TaggedCrops(run.dataset, run.train, transform)
