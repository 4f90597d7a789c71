"""Modules for weakly supervised semantic segmentation: tensors in, tensors out."""

from wsss_modules.cam import (
    CAMHead,
    CAMOutput,
    PresentCAM,
    background_score,
    cam_to_mask,
    merge_flip,
    multi_scale_cam,
    normalize_cam,
    select_present,
)

__all__ = [
    "CAMHead",
    "CAMOutput",
    "PresentCAM",
    "background_score",
    "cam_to_mask",
    "merge_flip",
    "multi_scale_cam",
    "normalize_cam",
    "select_present",
]
