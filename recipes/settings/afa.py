"""Settings of `recipes/afa.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.pipeline.run import RunConfig
from recipes.pipeline.training import AdamSchedule
from recipes.pipeline.transformers import TokenConfig


@dataclass(frozen=True)
class AFAConfig:
    """The labels of a step and the training."""

    cam_scales: tuple[float, ...] = (1.0,)
    """Sizes whose CAMs are merged in each step, each with its mirror image; the walk takes the affinity of the
    largest."""
    scaled_logits: bool = True
    """Read affinities off attention logits as softmax sees them, over the root of the width of a head, and at first off
    their mean, as fits blocks that start by attending to similar patches. The raw logits, published for a pretrained
    MiT, are about 20 in new blocks: under random weights all affinities are 0 or 1, and none learns.
    """
    low: float = 0.35
    """Background score under which a pixel is trusted to be background."""
    high: float = 0.55
    """Background score above which a pixel is trusted to be foreground."""
    radius: int = 2
    """Reach of the affinities in cells, a quarter of the crop's side as published."""
    dilations: tuple[int, ...] = (1, 2, 4, 8)
    """Rings of neighbours of PAR, in pixels of half the size."""
    par_steps: int = 10
    """Iterations of PAR."""
    tags_only: float = 0.1
    """Share of the steps in which only the tags are learnt."""
    walk_after: float = 0.3
    """Share of the steps after which the decoder learns from walked labels."""
    seg_weight: float = 0.1
    """Weight of the segmentation loss."""
    affinity_weight: float = 0.1
    """Weight of the affinity loss."""
    decoder_dim: int = 64
    """Width of the decoder."""
    frozen_norms: bool = False
    """Keep the pretrained norms as they are."""
    long_side: tuple[int, int] = (112, 160)
    """Range of the longer side of the resized images in pixels."""
    crop: int = 128
    """Side of the training crops in pixels."""
    schedule: AdamSchedule = field(
        default_factory=lambda: AdamSchedule(epochs=8, batch_size=16, lr=1e-4, head_lr=1e-3, decay="poly")
    )
    """Training schedule."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    tokens: TokenConfig = field(default_factory=lambda: TokenConfig(frozen_stages=3, grid=8))
    afa: AFAConfig = field(default_factory=AFAConfig)
    scales: tuple[float, ...] = (1.0, 0.5, 1.5)
    """Sizes whose CAMs are merged for the seeds."""
    threshold: float = 0.45
    """Background score at which the CAMs themselves are measured."""
    mask_crf: bool = False
    """Refine all pseudo masks by a CRF, not only those that are measured; the network trains on neither."""
    test_scales: tuple[float, ...] = (1.0, 0.75, 1.25)
    """Sizes whose segmentations are merged, each with its mirror image."""
    segment_crf: bool = False
    """Also refine the segmentations by a dense CRF, as published."""


# Windows are a quarter of the crop's side, as 8 of 32 cells are. The published steps are 20,000; `small` takes the 405
# of the plain classifier, in which new blocks need a higher rate. CAMs of one scale keep a step at about twice the
# price of the plain one; three would cost seven more forward passes.
PRESETS = {
    "demo": Config(),
    "small": Config(
        tokens=TokenConfig(frozen_stages=4, grid=14),
        afa=AFAConfig(
            radius=4,
            dilations=(1, 2, 4, 8, 12, 24),
            decoder_dim=128,
            long_side=(256, 400),
            crop=224,
            schedule=AdamSchedule(epochs=5, batch_size=16, lr=1e-4, head_lr=1e-3, decay="poly"),
        ),
        test_scales=(0.75, 1.0, 0.5),
    ),
    "paper": Config(
        tokens=TokenConfig(backbone="mit_b1", drop_path=0.1),
        afa=AFAConfig(
            cam_scales=(1.0, 0.5, 1.5),
            scaled_logits=False,
            radius=8,
            dilations=(1, 2, 4, 8, 12, 24),
            decoder_dim=256,
            frozen_norms=True,
            long_side=(256, 1024),
            crop=512,
            schedule=AdamSchedule(
                epochs=8,
                batch_size=4,
                lr=6e-5,
                head_lr=6e-4,
                weight_decay=0.01,
                warmup=0.075,
                start=1e-6,
                decay="poly",
            ),
        ),
        test_scales=(1.0, 0.5, 0.75),
        segment_crf=True,
    ),
    "tiny": Config(
        data="demo:tiny",
        tokens=TokenConfig(frozen_stages=3, dim=48, depth=2, heads=3, grid=8),
        afa=AFAConfig(
            decoder_dim=16,
            par_steps=2,
            schedule=AdamSchedule(epochs=1, batch_size=4, lr=1e-4, head_lr=1e-3, decay="poly"),
        ),
        scales=(1.0,),
        test_scales=(1.0,),
        segment_crf=True,
    ),
}
