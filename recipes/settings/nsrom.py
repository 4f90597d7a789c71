"""Settings of `recipes/nsrom.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import Schedule
from recipes.settings.shared import SEGMENT


@dataclass(frozen=True)
class NSROMConfig:
    """The two classifiers, which are alike, and their training."""

    backbone: str = "tf_efficientnet_lite0"
    """timm name; vgg16 has 8 pixels per cell."""
    weights: str = "imagenet"
    """imagenet, random or a file."""
    output_stride: int = 16
    """Pixels per cell of the last map."""
    frozen_stages: int = 3
    """Stem and stages that keep their pretrained weights."""
    channels: int = 128
    """Channels of the three layers that precede the reasoning."""
    nodes: int = 32
    """Nodes that the unit reasons over."""
    normalize: bool = False
    """Divide the nodes by the number of cells, which the released unit does not."""
    size: int = 128
    """Images are resized to a square of this side: no crop and no mirror, because cells are accumulated."""
    accumulate_from: int = 1
    """First epoch, from 0, whose attention is accumulated."""
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=5, batch_size=16, lr=0.005, head_lr=0.05))
    """Training schedule of each; ``head_lr`` is that of all that follows the backbone."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    saliency: str | None = None
    """Saliency maps: a run of c2am or a folder; by default those of the data set."""
    nsrom: NSROMConfig = field(default_factory=NSROMConfig)
    threshold: float = 0.25
    """Background score at which the attention maps are measured."""
    dilation: int = 30
    """Side in pixels of the square by which objects and salient regions grow in the second labels."""
    first_scales: tuple[float, ...] = (1.0,)
    """Sizes at which the first segmentation network looks at the training images, each with its mirror image."""
    warm_start: bool = False
    """Start the second segmentation network from the first; not in the original."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


PRESETS = {
    "demo": Config(),
    # Either classifier takes the plain one's steps. Through a head of four layers, whose sums over the cells are not
    # divided, a backbone at the plain one's rate forgets what it knew: rates stand in the published ratio.
    "small": Config(
        nsrom=NSROMConfig(
            frozen_stages=4,
            size=224,
            schedule=Schedule(epochs=5, batch_size=16, lr=0.005, head_lr=0.05),
        ),
        segment=SEGMENT["small"],
    ),
    "paper": Config(
        nsrom=NSROMConfig(
            backbone="vgg16",
            output_stride=8,
            frozen_stages=0,
            channels=512,
            nodes=64,
            size=256,
            schedule=Schedule(epochs=15, batch_size=5, lr=0.001, head_lr=0.01, weight_decay=5e-4),
        ),
        segment=SEGMENT["paper"],
    ),
    "tiny": Config(
        data="demo:tiny",
        nsrom=NSROMConfig(channels=32, nodes=8, schedule=Schedule(epochs=2, batch_size=4, lr=0.005, head_lr=0.05)),
        segment=SEGMENT["tiny"],
    ),
}
