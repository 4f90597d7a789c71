"""The settings that recipes have in common, by preset: the classifier, its CAMs, the segmentation network.

``tiny`` proves that a recipe runs (seconds); ``demo`` runs on the built-in data in minutes on two cores; ``small`` runs
on real photographs on a CPU; ``paper`` is what PSA and IRN published for VOC 2012.
"""

from __future__ import annotations

from dataclasses import replace

from recipes.pipeline.cams import CamConfig
from recipes.pipeline.classification import ClassifyConfig
from recipes.pipeline.segmenter import SegmentConfig
from recipes.pipeline.training import Schedule

CLASSIFY = {
    "demo": ClassifyConfig(
        frozen_stages=3,
        long_side=(112, 160),
        crop=128,
        schedule=Schedule(epochs=5, batch_size=16, lr=0.005, head_lr=0.05),
    ),
    "small": ClassifyConfig(
        frozen_stages=4,
        long_side=(256, 400),
        crop=224,
        schedule=Schedule(epochs=5, batch_size=16, lr=0.02, head_lr=0.2),
    ),
    "paper": ClassifyConfig(
        backbone="resnet50-irn",
        output_stride=16,
        frozen_stages=3,  # IRN cuts the gradient behind layer2
        long_side=(320, 640),
        crop=512,
        schedule=Schedule(epochs=5, batch_size=16, lr=0.1, head_lr=1.0, momentum=1e-4),
    ),
}
CLASSIFY["tiny"] = replace(CLASSIFY["demo"], schedule=replace(CLASSIFY["demo"].schedule, epochs=1, batch_size=4))

CAMS = {
    "demo": CamConfig(scales=(2.0,)),  # the pictures are small
    "small": CamConfig(output_stride=32, scales=(1.0, 0.5, 1.5)),
    "paper": CamConfig(),
    "tiny": CamConfig(scales=(1.0,)),
}

SEGMENT = {
    "demo": SegmentConfig(
        frozen_stages=3,
        scale=(0.75, 1.5),
        crop=128,
        schedule=Schedule(epochs=6, batch_size=16, lr=0.01, head_lr=0.1),
    ),
    "small": SegmentConfig(
        frozen_stages=4, scale=(0.5, 1.0), crop=224, schedule=Schedule(epochs=4, batch_size=16, lr=0.01, head_lr=0.1)
    ),
    "paper": SegmentConfig(
        architecture="deeplabv2",
        encoder="resnet101",
        output_stride=8,
        frozen_stages=0,
        scale=(0.5, 1.5),
        crop=321,
        schedule=Schedule(epochs=19, batch_size=10, lr=2.5e-4, head_lr=2.5e-3, weight_decay=5e-4),
        test_scales=(0.5, 0.75, 1.0, 1.25, 1.5),
        crf=True,
    ),
}
SEGMENT["tiny"] = replace(
    SEGMENT["demo"],
    crop=64,
    schedule=replace(SEGMENT["demo"].schedule, epochs=1, batch_size=4),
    test_scales=(1.0,),
)
