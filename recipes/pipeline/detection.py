"""A small two-stage detector trained on boxes: torchvision's Faster R-CNN on a feature pyramid of any trunk.

Images are squares of one side, squeezed if need be, so that nothing is padded and every pixel has its place.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.transforms import v2

from recipes.pipeline.classification import make_trunk
from recipes.pipeline.data.boxes import BoxedCrops, Boxes, flat_boxes
from recipes.pipeline.models import Trunk
from recipes.pipeline.run import Run
from recipes.pipeline.training import AdamSchedule, Moment, Schedule, fit, two_speed_groups


@dataclass(frozen=True)
class DetectConfig:
    """The detector and its training."""

    backbone: str = "tf_efficientnet_lite0"
    """timm name."""
    weights: str = "imagenet"
    """imagenet, random or a file."""
    frozen_stages: int = 3
    """Stem and stages that keep their pretrained weights."""
    strides: tuple[int, ...] = (8, 16, 32)
    """Pixels per cell of the levels of the pyramid."""
    anchors: tuple[int, ...] = (24, 48, 96)
    """Side of the anchors of each level in pixels."""
    channels: int = 64
    """Channels of the pyramid."""
    hidden: int = 256
    """Width of the second stage."""
    size: int = 128
    """Side of the squares that images are resized to."""
    schedule: Schedule | AdamSchedule = field(
        default_factory=lambda: Schedule(epochs=12, batch_size=16, lr=0.005, head_lr=0.05, momentum=0.9)
    )
    """Training schedule, of SGD or AdamW; ``head_lr`` is that of pyramid and both stages."""


class DetectionTerms(NamedTuple):
    """The four losses of Faster R-CNN, after their sum."""

    total: Tensor
    classification: Tensor
    box: Tensor
    objectness: Tensor
    proposal: Tensor


class Pyramid(nn.Module):
    """Levels of a trunk as a feature pyramid."""

    def __init__(self, trunk: Trunk, strides: tuple[int, ...], channels: int) -> None:
        super().__init__()
        missing = [stride for stride in strides if stride not in trunk.level_strides]
        if missing:
            raise ValueError(f"strides: {trunk.name} has levels of {trunk.level_strides}, got {strides}")
        # of several levels of a stride the last is the most telling
        self.levels = [max(k for k, s in enumerate(trunk.level_strides) if s == stride) for stride in strides]
        self.trunk, self.out_channels = trunk, channels
        trunk.freeze_unused(self.levels)
        self.fpn = FeaturePyramidNetwork([trunk.level_channels[level] for level in self.levels], channels)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        found = self.trunk(images).levels
        return self.fpn(OrderedDict((str(k), found[level]) for k, level in enumerate(self.levels)))


class Detector(nn.Module):
    """Faster R-CNN on normalised squares.

    ``forward`` gives the losses of a batch; `detections` what the second stage says of given proposals, for
    :class:`wsss_modules.BoundingBoxAttributionMap`; `decode` the boxes that it means.
    """

    def __init__(self, trunk: Trunk, num_classes: int, config: DetectConfig) -> None:
        super().__init__()
        self.mean, self.std, self.size = trunk.mean, trunk.std, config.size
        names = [str(k) for k in range(len(config.strides))]
        self.rcnn = FasterRCNN(
            Pyramid(trunk, config.strides, config.channels),
            min_size=config.size,
            max_size=config.size,
            image_mean=(0.0,) * 3,  # images come normalised
            image_std=(1.0,) * 3,
            rpn_anchor_generator=AnchorGenerator(tuple((a,) for a in config.anchors), ((0.5, 1.0, 2.0),) * len(names)),
            rpn_pre_nms_top_n_train=300,
            rpn_pre_nms_top_n_test=300,
            rpn_post_nms_top_n_train=100,
            rpn_post_nms_top_n_test=100,
            rpn_batch_size_per_image=64,
            box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
            box_head=TwoMLPHead(config.channels * 49, config.hidden),
            box_predictor=FastRCNNPredictor(config.hidden, 1 + num_classes),
            box_batch_size_per_image=64,
        )

    @property
    def trunk(self) -> Trunk:
        return self.rcnn.backbone.trunk

    def forward(self, images: Tensor, rows: Tensor) -> DetectionTerms:
        """Images (B, 3, s, s) and their boxes (B, M, 5), class first and 0 where empty -> losses."""
        boxes, classes = flat_boxes(rows)
        own = [boxes[:, 0] == image for image in range(len(images))]
        targets = [{"boxes": boxes[mine, 1:], "labels": classes[mine]} for mine in own]
        losses = self.rcnn(list(images), targets)
        names = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
        terms = [losses[name] for name in names]
        return DetectionTerms(torch.stack(terms).sum(), *terms)

    def detections(self, images: Tensor, proposals: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (P, C) and deltas (P, 4 C) of proposals (P, 5), image index first: no first stage, no NMS."""
        order = proposals[:, 0].argsort(stable=True)
        sizes = torch.bincount(proposals[:, 0].long(), minlength=len(images)).tolist()
        boxes = list(proposals[order, 1:].split(sizes))
        heads = self.rcnn.roi_heads
        pooled = heads.box_roi_pool(self.rcnn.backbone(images), boxes, [tuple(images.shape[2:])] * len(images))
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        place = order.argsort()
        return logits[place], deltas[place]

    def decode(self, deltas: Tensor, proposals: Tensor) -> Tensor:
        """Boxes (P, C, 4) that deltas (P, 4 C) make of proposals (P, 5)."""
        return self.rcnn.roi_heads.box_coder.decode(deltas, [proposals[:, 1:]])


def train_detector(run: Run, boxes: Boxes, config: DetectConfig) -> Detector:
    """Train on the boxes of the training images, whole, squeezed to squares, mirrored and with changed colours."""
    detector = Detector(make_trunk(run, config, 32), len(run.dataset.classes), config)
    transform = v2.Compose(
        [
            v2.Resize((config.size, config.size), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.3, 0.3, 0.3, 0.1),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(list(detector.mean), list(detector.std)),
        ]
    )
    crops = BoxedCrops(run.dataset, run.train, boxes, transform)

    def loss_of(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> DetectionTerms:
        return model(batch["image"], batch["boxes"])

    rcnn = detector.rcnn
    groups = two_speed_groups(detector, [rcnn.backbone.fpn, rcnn.rpn, rcnn.roi_heads], config.schedule)
    fit(run, "detector", detector, crops, loss_of, groups, config.schedule, warmup=0.1, clip=10.0)
    return detector.eval()
