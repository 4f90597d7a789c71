"""Settings of `recipes/mctformer.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from recipes.pipeline.cams import CamConfig
from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import AdamSchedule, Schedule
from recipes.pipeline.transformers import TokenConfig
from recipes.settings import rw
from recipes.settings.shared import CAMS, SEGMENT


@dataclass(frozen=True)
class MCTConfig:
    """The multi-class token transformer, its training and its maps."""

    variant: Literal["v1", "v2", "plus"] = "v2"
    """v1: class tokens alone; v2: also maps of the patches; plus: pooled by rank, with contrast between tokens."""
    contrast_weight: float = 1.0
    """Plus: weight of the contrast."""
    layers: int = 3
    """Blocks, from the last one, whose attention makes the maps."""
    mode: Literal["auto", "fused", "patchcam", "mct"] = "auto"
    """Maps of class tokens (mct), of patches (patchcam), or their product (fused). auto: the product, in V1 those of
    tokens; of a hybrid those of patches. Its blocks start from random weights, and tokens learn the tags before they
    learn where to look: after the 75 steps of the demo the patches' maps were at 41 mIoU, the tokens' at 17, and their
    product at 23 (40 pictures)."""
    refine: bool = True
    """Smooth the maps by the attention between patches."""
    compare_modes: bool = False
    """Also measure the maps of the other modes, and those of this mode without (or with) the smoothing."""
    augmentation: Literal["crop", "strong"] = "crop"
    """Crops of a resized image; or, as published, resized crops of any share, RandAugment and random erasing."""
    long_side: tuple[int, int] = (112, 160)
    """Range of the longer side of the resized images in pixels (crop)."""
    crop: int = 128
    """Side of the training crops in pixels."""
    schedule: AdamSchedule = field(default_factory=lambda: AdamSchedule(epochs=5, batch_size=16, lr=1e-4, head_lr=1e-3))
    """Training schedule."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    tokens: TokenConfig = field(default_factory=lambda: TokenConfig(frozen_stages=3, grid=8))
    mct: MCTConfig = field(default_factory=MCTConfig)
    cams: CamConfig = field(default_factory=lambda: replace(CAMS["demo"], output_stride=16))
    threshold: float = 0.6
    """Background score at which the seeds themselves are measured, and in the walk. Published: 0.39, for maps of
    patches times those of tokens. Those of patches alone, smoothed by the attention of new blocks, are broader: the
    best was 0.61 to 0.69 on demo data and photographs, where the plain CAM's 0.25 was found in the same way."""
    affinity: rw.AffinityConfig = field(default_factory=lambda: trusted(rw.PRESETS["demo"].affinity))
    walk: rw.WalkConfig = field(default_factory=lambda: walking(rw.PRESETS["demo"].walk))
    mask_crf: bool = True
    """Train the segmentation on CRF-refined masks."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


def trusted(affinity: rw.AffinityConfig) -> rw.AffinityConfig:
    """PSA's affinity network under the backgrounds of MCTformer."""
    return replace(affinity, low_alpha=1.0, high_alpha=12.0)


def walking(walk: rw.WalkConfig, background: float = 0.6) -> rw.WalkConfig:
    """PSA's random walk with a constant background, and a quarter of its steps."""
    return replace(walk, background=background, steps=walk.steps // 4)


# 405 steps of 16 crops, the budget of the plain classifier, are few for blocks that start from random weights, so that
# they learn ten times as fast as the pretrained layers, under the rate that is usual for small transformers. The
# published rate is 5e-4 for 512 images, scaled to the batch; minimum 1e-5; 5 epochs of 60 warm up from 1e-6.
PRESETS = {
    "demo": Config(),
    "small": Config(
        tokens=TokenConfig(frozen_stages=4, grid=14),
        mct=MCTConfig(
            long_side=(256, 400),
            crop=224,
            schedule=AdamSchedule(epochs=5, batch_size=16, lr=1e-4, head_lr=1e-3),
        ),
        cams=CamConfig(output_stride=16, scales=(1.0, 0.75)),  # and a size nearer to those trained at
        affinity=trusted(rw.PRESETS["small"].affinity),
        walk=walking(rw.PRESETS["small"].walk),
        segment=SEGMENT["small"],
    ),
    "paper": Config(
        tokens=TokenConfig(backbone="deit_small_patch16_224", drop_path=0.1),
        mct=MCTConfig(
            augmentation="strong",
            crop=224,
            compare_modes=True,
            schedule=AdamSchedule(
                epochs=60, batch_size=64, lr=6.25e-5, head_lr=6.25e-5, warmup=5 / 60, start=0.016, floor=0.16
            ),
        ),
        cams=CamConfig(output_stride=16, scales=(1.0,)),
        affinity=replace(
            trusted(rw.PRESETS["paper"].affinity),
            schedule=Schedule(epochs=5, batch_size=8, lr=0.01, head_lr=0.1, weight_decay=5e-4, momentum=5e-4),
        ),
        threshold=0.39,
        walk=walking(rw.PRESETS["paper"].walk, background=0.39),
        mask_crf=False,
        segment=SegmentConfig(
            architecture="largefov",
            encoder="resnet38",
            output_stride=8,
            scale=(0.7, 1.3),
            crop=321,
            schedule=Schedule(epochs=30, batch_size=4, lr=7e-4, head_lr=7e-3, weight_decay=1e-5),
            test_scales=(0.5, 0.75, 1.0, 1.25, 1.5),
            crf=True,
        ),
    ),
    "tiny": Config(
        data="demo:tiny",
        tokens=TokenConfig(frozen_stages=3, dim=48, depth=2, heads=3, grid=8),
        mct=MCTConfig(schedule=AdamSchedule(epochs=1, batch_size=4, lr=1e-4, head_lr=1e-3)),
        cams=replace(CAMS["tiny"], output_stride=16),
        affinity=trusted(rw.PRESETS["tiny"].affinity),
        walk=walking(rw.PRESETS["tiny"].walk),
        segment=SEGMENT["tiny"],
    ),
}
