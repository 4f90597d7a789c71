"""Losses for weakly supervised semantic segmentation, one file per paper."""

from wsss_losses.irn import (
    BoundaryAffinityLoss,
    DisplacementLoss,
    DisplacementTerms,
    InterPixelRelationLoss,
    InterPixelRelationTerms,
    boundary_affinity_loss,
    displacement_loss,
    inter_pixel_relation_loss,
)
from wsss_losses.occse import (
    ClassSpecificErasingLoss,
    ClassSpecificErasingTerms,
    class_specific_erasing_loss,
)
from wsss_losses.psa import (
    AffinityLoss,
    AffinityTerms,
    affinity_loss,
)

__all__ = [
    "AffinityLoss",
    "AffinityTerms",
    "BoundaryAffinityLoss",
    "ClassSpecificErasingLoss",
    "ClassSpecificErasingTerms",
    "DisplacementLoss",
    "DisplacementTerms",
    "InterPixelRelationLoss",
    "InterPixelRelationTerms",
    "affinity_loss",
    "boundary_affinity_loss",
    "class_specific_erasing_loss",
    "displacement_loss",
    "inter_pixel_relation_loss",
]
