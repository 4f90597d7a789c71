"""Settings of `recipes/spatial_bce.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from recipes.pipeline.cams import CamConfig
from recipes.pipeline.classification import ClassifyConfig
from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import Schedule
from recipes.settings import rw
from recipes.settings.shared import CAMS, CLASSIFY, SEGMENT


@dataclass(frozen=True)
class SpatialConfig:
    """The classifier of pixels and its training in phases."""

    makes_cams: ClassVar[bool] = False  # its maps are those of its training
    backbone: str = "tf_efficientnet_lite0"
    """timm name, or resnet38."""
    weights: str = "classifier"
    """Start the first phase as the plain classifier, head and all; or a new head on imagenet, random or a file."""
    output_stride: int = 16
    """Pixels per cell of the last map."""
    frozen_stages: int = 3
    """Stem and stages that keep their weights."""
    mid_channels: int = 128
    """Channels of the head between its two layers."""
    size: int = 256
    """Side in pixels of the squares that whole images are resized to."""
    phases: int = 2
    """Trainings, each with the priors that the one before has led to."""
    cycle: int = 20
    """Steps of a cycle: first the network's, then the threshold's."""
    network_steps: int = 16
    """How many steps of a cycle train the network."""
    prior_scale: float = 2.0
    """Size of the images whose masks give the priors; 1 is their own."""
    prior_views: tuple[float, ...] = (1.0,)
    """Sizes, relative to that, whose maps are averaged for these masks, each with its mirror image."""
    keep_lost: bool = True
    """Let a tagged class that the masks have lost keep the prior of the phase before."""
    least_prior: float = 0.01
    """Least prior of a tagged class: one that was lost from the start would be taught to be nowhere."""
    released_maps: bool = False
    """Read maps without the temperature and divided by their maximum, not as the probabilities that were trained."""
    kl_weight: float = 3.3
    """Weight of the divergence from the prior: 1 for the 20 classes of VOC, 20 / K for K."""
    threshold_lr: float = 0.01
    """Learning rate of the threshold branch."""
    schedule: Schedule = field(
        default_factory=lambda: Schedule(epochs=3, batch_size=16, lr=0.001, head_lr=5e-4, weight_decay=5e-4)
    )
    """Training schedule of a phase."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    classify: ClassifyConfig = field(default_factory=lambda: CLASSIFY["demo"])
    cams: CamConfig = field(default_factory=lambda: CAMS["demo"])
    threshold: float = 0.25
    """Background score of the plain CAMs for the first priors, and of the final maps where it is not the learnt one."""
    spatial: SpatialConfig = field(default_factory=SpatialConfig)
    mask_crf: bool = True
    """Train the segmentation on CRF-refined masks."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


# The loss of pixels is a mean over all classes, the divergence from the prior one over the present classes: with 6
# classes in place of 20 the former weighs three times as much, unless the latter is given the same. With a trunk
# that hardly learns (1e-4), pixels of cows and sheep stayed below .5 and so below the threshold, which at 1e-3 had
# hardly moved from its start at .5 after 16 of the 48 steps that train it; with 2e-3 for trunk and head, scores
# went to 0 and 1 at once. Both were told by the divergence and by masks that are empty in spite of a tag, not by
# pixel labels. Cycles are shorter, for the threshold to have several turns in a phase.
PRESETS = {
    "demo": Config(),
    "small": Config(
        classify=CLASSIFY["small"],
        cams=replace(CAMS["small"], scales=(0.5, 0.75, 1.0)),  # the squares are half as large as the photographs
        spatial=SpatialConfig(frozen_stages=4, size=224, prior_scale=0.75),
        segment=SEGMENT["small"],
    ),
    "paper": Config(
        classify=rw.PRESETS["paper"].classify,
        cams=CAMS["paper"],
        threshold=0.2,
        spatial=SpatialConfig(
            backbone="resnet38",
            weights="imagenet",
            output_stride=8,
            frozen_stages=2,
            size=369,
            phases=3,
            cycle=100,
            network_steps=80,
            prior_scale=1.0,
            prior_views=CAMS["paper"].scales,
            keep_lost=False,
            least_prior=0.0,
            kl_weight=1.0,
            released_maps=True,
            schedule=Schedule(epochs=20, batch_size=12, lr=0.001, head_lr=0.01, weight_decay=5e-4),
        ),
        segment=SEGMENT["paper"],
    ),
    "tiny": Config(
        data="demo:tiny",
        classify=CLASSIFY["tiny"],
        cams=CAMS["tiny"],
        spatial=SpatialConfig(
            size=64,
            cycle=4,
            network_steps=2,
            prior_scale=1.0,
            schedule=Schedule(epochs=1, batch_size=4, lr=0.001, head_lr=5e-4, weight_decay=5e-4),
        ),
        segment=SEGMENT["tiny"],
    ),
}
