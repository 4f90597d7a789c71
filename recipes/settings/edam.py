"""Settings of `recipes/edam.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from recipes.pipeline.cams import CamConfig
from recipes.pipeline.run import RunConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import Schedule
from recipes.settings.shared import CAMS, SEGMENT


@dataclass(frozen=True)
class EDAMConfig:
    """The network and its training."""

    backbone: str = "tf_efficientnet_lite0"
    """timm name, resnet38, or resnet38-signed, without its last ReLU as in the released code."""
    weights: str = "imagenet"
    """imagenet, random or a file."""
    output_stride: int = 16
    """Pixels per cell of the last map while training (resnet38: always 8)."""
    frozen_stages: int = 3
    """Stem and stages that keep their pretrained weights."""
    width: int = 128
    """Channels of the tokens."""
    heads: int = 2
    """Heads of the attention."""
    layers: int = 1
    """Transformer blocks of each class, one after the other."""
    normalization: str = "l2_abs"
    """How background and classes share a cell: l2_abs, softmax or sigmoid."""
    dropout: float = 0.1
    """Dropout in the attention."""
    classes: int | None = None
    """Classes a pair is asked for: those present, and others at random; all by default."""
    long_side: tuple[int, int] = (112, 160)
    """Range of the longer side of the resized images in pixels."""
    crop: int = 128
    """Side of the training crops in pixels."""
    warmup: float = 0.06
    """Share of the steps in which the learning rate rises from a tenth; published: 2,000 of 33,050."""
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=3, batch_size=8, lr=0.005, head_lr=0.05))
    """Training schedule; a batch is of as many pairs; ``head_lr`` is that of masks, projection and classifiers."""


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a run."""

    saliency: str | None = None
    """Saliency maps: a run of c2am or a folder; by default those of the data set; none for masks without."""
    edam: EDAMConfig = field(default_factory=EDAMConfig)
    cams: CamConfig = field(default_factory=lambda: CAMS["demo"])
    threshold: float = 0.5
    """Background score at which the masks are measured, and of labels without saliency."""
    salient: float = 20 / 255
    """Saliency up to which a pixel is background unless a class is all but certain."""
    alpha: float = 1e-6
    """Least score of a class where an image is salient."""
    beta: float = 0.99999
    """Score above which a class needs no saliency."""
    mask_crf: bool = False
    """Train the segmentation on the labels made with the CRF, as published, where there is saliency. The masks of a
    short training are broad: a CRF makes them so certain that they overrule the saliency, and objects cover 70 % of the
    demo pictures in place of 37."""
    segment: SegmentConfig = field(default_factory=lambda: SEGMENT["demo"])


PRESETS = {
    "demo": Config(),
    # Eight pairs are the 16 crops of a step in other recipes, and an epoch, in which each image is once the first of a
    # pair, takes as many steps as two of theirs. The plain classifier's five would be 2.5 of these; three are taken.
    "small": Config(
        edam=EDAMConfig(
            frozen_stages=4,
            long_side=(256, 400),
            crop=224,
            schedule=Schedule(epochs=3, batch_size=8, lr=0.02, head_lr=0.2),
        ),
        cams=replace(CAMS["small"], output_stride=16),
        segment=SEGMENT["small"],
    ),
    # Published: 33,050 steps of four pairs, an "epoch" being 1,322 of them, as many images as VOC has. An epoch
    # here has as many pairs, 2,645 steps, so that 12 in place of 25 are nearest.
    "paper": Config(
        edam=EDAMConfig(
            backbone="resnet38-signed",
            output_stride=8,
            frozen_stages=2,
            long_side=(256, 512),
            crop=368,
            schedule=Schedule(epochs=12, batch_size=4, lr=0.001, head_lr=0.01, weight_decay=5e-4),
        ),
        cams=CAMS["paper"],
        mask_crf=True,
        segment=SEGMENT["paper"],
    ),
    "tiny": Config(
        data="demo:tiny",
        edam=EDAMConfig(width=16, schedule=Schedule(epochs=1, batch_size=4, lr=0.005, head_lr=0.05)),
        cams=CAMS["tiny"],
        segment=SEGMENT["tiny"],
    ),
}
