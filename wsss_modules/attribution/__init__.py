"""Bounding-box attribution maps, and masks from them (BBAM)."""

from wsss_modules.attribution.instances import (
    BBAM_CRF,
    BoxMaskRefiner,
    RefinedBoxMask,
    SegmentOverlaps,
    box_seed_probability,
    instances_to_semantic,
    match_segment_proposals,
    refine_box_mask,
    segment_overlaps,
)
from wsss_modules.attribution.masks import (
    AttributionStep,
    BoundingBoxAttributionMap,
    PerturbImage,
    adaptive_mask_stride,
    init_attribution_mask,
    perturb_image,
)
from wsss_modules.attribution.proposals import PositiveProposals, jitter_boxes, select_positive_proposals

__all__ = [
    "BBAM_CRF",
    "AttributionStep",
    "BoundingBoxAttributionMap",
    "BoxMaskRefiner",
    "PerturbImage",
    "PositiveProposals",
    "RefinedBoxMask",
    "SegmentOverlaps",
    "adaptive_mask_stride",
    "box_seed_probability",
    "init_attribution_mask",
    "instances_to_semantic",
    "jitter_boxes",
    "match_segment_proposals",
    "perturb_image",
    "refine_box_mask",
    "segment_overlaps",
    "select_positive_proposals",
]
