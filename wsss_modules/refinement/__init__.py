"""Refinement of class maps by what the network or the image says about pairs of places."""

from wsss_modules.refinement.correlated_cam import (
    PixelCorrelationCAMHead,
    PixelCorrelationCAMOutput,
)
from wsss_modules.refinement.patch_affinity import (
    refine_with_patch_affinity,
)
from wsss_modules.refinement.pixel_adaptive import (
    PixelAdaptiveKernel,
    PixelAdaptiveRefinement,
    denormalize_images,
    pixel_adaptive_kernel,
    pixel_adaptive_refinement,
)
from wsss_modules.refinement.pixel_correlation import (
    PixelCorrelationModule,
    pixel_correlation,
)
from wsss_modules.refinement.seam import (
    SEAMHead,
    SEAMOutput,
    keep_strongest,
    one_hot_scores,
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
    "PixelCorrelationCAMHead",
    "PixelCorrelationCAMOutput",
    "PixelCorrelationModule",
    "SEAMHead",
    "SEAMOutput",
    "denormalize_images",
    "fuse_thresholds",
    "keep_strongest",
    "one_hot_scores",
    "pixel_adaptive_kernel",
    "pixel_adaptive_refinement",
    "pixel_correlation",
    "refine_cam_with_background",
    "refine_scores",
    "refine_walked_scores",
    "refine_with_patch_affinity",
]
