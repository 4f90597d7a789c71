"""Refinement of class maps by what the pixels of an image have in common."""

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

__all__ = [
    "PixelCorrelationModule",
    "SEAMHead",
    "SEAMOutput",
    "keep_strongest",
    "one_hot_scores",
    "pixel_correlation",
]
