"""Settings of `recipes/vitpcm.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import AdamSchedule
from recipes.pipeline.transformers import TokenConfig
from recipes.settings.shared import SEGMENT


@dataclass(frozen=True)
class PatchConfig:
    """The classifier of patches and its training."""

    hidden: int = 48
    """Width of an LSTM in one direction."""
    dropout: float = 0.2
    """Dropout before and within the LSTMs, and before the classifier."""
    exact: bool = True
    """Pooled loss from exact log-odds, whose gradient lives on; false: clipped probabilities, as published."""
    equivariance_weight: float = 1.0
    """Weight of the loss between views."""
    l2: float = 0.01
    """Weight of the squared weights of the classifier."""
    crop_probability: float = 0.3
    """Probability with which the second view is a crop."""
    view_crop: int = 48
    """Side of such a crop in pixels, a third of the image."""
    mosaic: bool = True
    """Tile four second views to one image; false: pass them one by one."""
    trained_blocks: int | None = None
    """Blocks of a pretrained ViT that are trained; all by default."""
    long_side: tuple[int, int] = (112, 160)
    """Range of the longer side of the resized images in pixels."""
    crop: int = 128
    """Side of the training crops in pixels, a multiple of 32."""
    first: AdamSchedule = field(
        default_factory=lambda: AdamSchedule(
            1, 16, lr=0.0, head_lr=1e-3, weight_decay=0.0, warmup=0, decay="poly", power=0
        )
    )
    """Schedule of the new layers alone."""
    schedule: AdamSchedule = field(
        default_factory=lambda: AdamSchedule(5, 16, lr=1e-4, head_lr=1e-3, weight_decay=0.0, decay="poly")
    )
    """Schedule of all layers."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    tokens: TokenConfig = field(default_factory=lambda: TokenConfig(frozen_stages=3, grid=8))
    patches: PatchConfig = field(default_factory=PatchConfig)
    oracle_checkpoint_selection: bool = False
    """Keep the weights of the epoch whose seeds agree best with the masks of the val list, as released; that is
    supervision by pixel labels."""
    test_scale: float = 2.0
    """Size of an image at test time, by its own; published: 960 pixels, 2.5 times those of training."""
    mask_crf: bool = True
    """Train the segmentation on CRF-refined masks."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


# Published: one epoch of the new layers at 1e-3, 79 of the last five blocks at 1e-4, both constant. `small` takes the
# 405 steps of the plain classifier in all, one epoch of five for the new layers, which go on at their rate.
CONSTANT = {"weight_decay": 0.0, "warmup": 0.0, "decay": "poly", "power": 0.0}
PRESETS = {
    "demo": Config(),
    "small": Config(
        tokens=TokenConfig(frozen_stages=4, grid=14),
        patches=PatchConfig(
            view_crop=80,
            long_side=(256, 400),
            crop=224,
            schedule=AdamSchedule(4, 16, lr=1e-4, head_lr=1e-3, weight_decay=0.0, decay="poly"),
        ),
        test_scale=1.0,  # 500 pixels, 1.5 times those of training
        segment=SEGMENT["small"],
    ),
    "paper": Config(
        tokens=TokenConfig(backbone="vit_base_patch16_384"),
        patches=PatchConfig(
            hidden=192,
            exact=False,
            view_crop=128,
            trained_blocks=5,
            long_side=(384, 512),
            crop=384,
            first=AdamSchedule(1, 64, lr=0.0, head_lr=1e-3, **CONSTANT),
            schedule=AdamSchedule(79, 64, lr=1e-4, head_lr=1e-4, **CONSTANT),
        ),
        segment=SEGMENT["paper"],
    ),
    "tiny": Config(
        data="demo:tiny",
        tokens=TokenConfig(frozen_stages=3, dim=48, depth=2, heads=3, grid=8),
        patches=PatchConfig(
            hidden=8,
            first=AdamSchedule(1, 4, lr=0.0, head_lr=1e-3, **CONSTANT),
            schedule=AdamSchedule(1, 4, lr=1e-4, head_lr=1e-3, weight_decay=0.0, decay="poly"),
        ),
        test_scale=1.0,
        segment=SEGMENT["tiny"],
    ),
}
