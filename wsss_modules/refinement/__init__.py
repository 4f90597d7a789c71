"""Refinement of class maps by what the network or the image says about pairs of places."""

from wsss_modules.refinement.patch_affinity import refine_with_patch_affinity
from wsss_modules.refinement.pixel_adaptive import (
    PixelAdaptiveKernel,
    PixelAdaptiveRefinement,
    denormalize_images,
    pixel_adaptive_kernel,
    pixel_adaptive_refinement,
)
from wsss_modules.refinement.two_thresholds import (
    fuse_thresholds,
    refine_cam_with_background,
    refine_scores,
    refine_walked_scores,
)

__all__ = [
    "PixelAdaptiveKernel",
    "PixelAdaptiveRefinement",
    "denormalize_images",
    "fuse_thresholds",
    "pixel_adaptive_kernel",
    "pixel_adaptive_refinement",
    "refine_cam_with_background",
    "refine_scores",
    "refine_walked_scores",
    "refine_with_patch_affinity",
]
