"""Boxes as supervision: their geometry, and labels made from them (BANA)."""

from wsss_modules.boxes.geometry import (
    background_mask_from_boxes,
    box_iou,
    boxes_to_masks,
    crop_boxes,
    normalize_boxes,
)
from wsss_modules.boxes.labels import (
    BANA_CRF,
    BoxLabels,
    BoxPseudoLabeler,
    UpsampledFeatures,
    box_pseudo_labels,
    fuse_labels,
)

__all__ = [
    "BANA_CRF",
    "BoxLabels",
    "BoxPseudoLabeler",
    "UpsampledFeatures",
    "background_mask_from_boxes",
    "box_iou",
    "box_pseudo_labels",
    "boxes_to_masks",
    "crop_boxes",
    "fuse_labels",
    "normalize_boxes",
]
