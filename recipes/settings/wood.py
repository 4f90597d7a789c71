"""Settings of `recipes/wood.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from recipes.pipeline.cams import CamConfig
from recipes.pipeline.classification import ClassifyConfig
from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import Schedule
from recipes.settings import irn
from recipes.settings.shared import CAMS, CLASSIFY, SEGMENT


@dataclass(frozen=True)
class WoodConfig:
    """Fine-tuning with images from outside."""

    clusters: int = 20
    """Clusters of the images from outside; 50 in the paper, which has thousands of them."""
    long_side: int | None = None
    """Longer side of the images from outside in pixels where their features are taken; their own by default."""
    refresh_every: int | None = None
    """Epochs after which the centres are computed anew; by default they stay as the classifier has them."""
    step: float = 0.07
    """Step of the climb, in units of the normalised pixels."""
    distance_weight: float = 0.007
    """Weight of the distances to the centres."""
    ood_weight: float = 0.25
    """Weight of the images from outside as negatives; 0 leaves them out of the steps."""
    topk: float = 0.2
    """Share of the pairs of an image and a cluster that push."""
    selection: Literal["batch", "image"] = "batch"
    """Whether that share is of the batch, as released, or of each image."""
    ignore_top: tuple[str, ...] = ()
    """Classes by name: an image from outside that is taken for one of them is left out of the negatives."""
    frozen_stages: int = 3
    """Stem and stages that keep their weights."""
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=2, batch_size=16, lr=0.005, head_lr=0.05))
    """Training schedule; a batch is of as many images from outside again."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    outside: str | None = None
    """Folder of photographs that show none of the classes; by default the data set's own."""
    outside_list: str | None = None
    """List of those photographs in the folder that are to be used."""
    rank: str | None = None
    """Only rank the photographs of this folder: train the classifier, write outside.txt and stop."""
    classify: ClassifyConfig = field(default_factory=lambda: CLASSIFY["demo"])
    wood: WoodConfig = field(default_factory=WoodConfig)
    oracle_checkpoint_selection: bool = False
    """Keep the weights of the last quarter epoch whose CAMs agree best with the masks of the seed list, as released;
    that is supervision by pixel labels."""
    cams: CamConfig = field(default_factory=lambda: CAMS["demo"])
    threshold: float = 0.25
    """Background score at which the CAMs themselves are measured."""
    relation: irn.RelationConfig = field(default_factory=lambda: irn.PRESETS["demo"].relation)
    walk: irn.WalkConfig = field(default_factory=lambda: irn.PRESETS["demo"].walk)
    mask_crf: bool = True
    """Train the segmentation on CRF-refined masks."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


PRESETS = {
    "demo": Config(),
    # As fast as the classifier learnt, as published. Two epochs, since a step takes twice as many images and the climb
    # besides. Confident areas and walk are IRN's, whose maps are plain CAMs as these are.
    "small": Config(
        classify=CLASSIFY["small"],
        wood=WoodConfig(clusters=50, frozen_stages=4, schedule=replace(CLASSIFY["small"].schedule, epochs=2)),
        cams=CAMS["small"],
        relation=irn.PRESETS["small"].relation,
        walk=irn.PRESETS["small"].walk,
        segment=SEGMENT["small"],
    ),
    # Bottles are left out as in the released code. Its confident areas and walk are for AdvCAM's maps.
    "paper": Config(
        classify=CLASSIFY["paper"],
        wood=WoodConfig(
            clusters=50,
            long_side=500,
            ignore_top=("bottle",),
            schedule=Schedule(epochs=5, batch_size=16, lr=0.1, head_lr=1.0, momentum=1e-4),
        ),
        cams=CAMS["paper"],
        threshold=0.1,
        relation=replace(irn.PRESETS["paper"].relation, background=0.15),
        walk=replace(irn.PRESETS["paper"].walk, cam_power=1.5, threshold=0.22),
        mask_crf=False,
        segment=SEGMENT["paper"],
    ),
    "tiny": Config(
        data="demo:tiny",
        classify=CLASSIFY["tiny"],
        wood=WoodConfig(clusters=4, schedule=replace(CLASSIFY["tiny"].schedule, epochs=1)),
        cams=CAMS["tiny"],
        relation=irn.PRESETS["tiny"].relation,
        walk=irn.PRESETS["tiny"].walk,
        segment=SEGMENT["tiny"],
    ),
}
