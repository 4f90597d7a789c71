"""Losses for weakly supervised semantic segmentation, one file per paper."""

from wsss_losses.aeft import (
    ErasingAttractionLoss,
    ErasingRepulsionLoss,
    ErasingRepulsionTerms,
    erasing_attraction_loss,
    erasing_repulsion_loss,
)
from wsss_losses.c2am import (
    C2AMLoss,
    C2AMTerms,
    SimMaxLoss,
    SimMinLoss,
    c2am_loss,
    sim_max_loss,
    sim_min_loss,
)
from wsss_losses.edam import (
    EDAMLoss,
    edam_loss,
)
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
from wsss_losses.rca import (
    RegionalContrastLoss,
    regional_contrast_loss,
)
from wsss_losses.recam import (
    ReCAMLoss,
    ReCAMTerms,
    SoftmaxReactivationLoss,
    SoftmaxReactivationTerms,
    recam_loss,
    sce_reactivation_loss,
)
from wsss_losses.sipe import (
    GeneralSpecificConsistencyLoss,
    SIPELoss,
    SIPETerms,
    general_specific_consistency_loss,
    sipe_loss,
)
from wsss_losses.spatial_bce import (
    ForegroundRatioKLLoss,
    SpatialBCELoss,
    SpatialBCEThresholdLoss,
    foreground_ratio_kl_loss,
    spatial_bce_loss,
    spatial_bce_threshold_loss,
)
from wsss_losses.wood import (
    OoDMetricLoss,
    OoDNegativeLoss,
    WOoDLoss,
    WOoDTerms,
    ood_metric_loss,
    ood_negative_loss,
    wood_loss,
)

__all__ = [
    "AffinityLoss",
    "AffinityTerms",
    "BoundaryAffinityLoss",
    "C2AMLoss",
    "C2AMTerms",
    "ClassSpecificErasingLoss",
    "ClassSpecificErasingTerms",
    "DisplacementLoss",
    "DisplacementTerms",
    "EDAMLoss",
    "ErasingAttractionLoss",
    "ErasingRepulsionLoss",
    "ErasingRepulsionTerms",
    "ForegroundRatioKLLoss",
    "GeneralSpecificConsistencyLoss",
    "InterPixelRelationLoss",
    "InterPixelRelationTerms",
    "OoDMetricLoss",
    "OoDNegativeLoss",
    "ReCAMLoss",
    "ReCAMTerms",
    "RegionalContrastLoss",
    "SIPELoss",
    "SIPETerms",
    "SimMaxLoss",
    "SimMinLoss",
    "SoftmaxReactivationLoss",
    "SoftmaxReactivationTerms",
    "SpatialBCELoss",
    "SpatialBCEThresholdLoss",
    "WOoDLoss",
    "WOoDTerms",
    "affinity_loss",
    "boundary_affinity_loss",
    "c2am_loss",
    "class_specific_erasing_loss",
    "displacement_loss",
    "edam_loss",
    "erasing_attraction_loss",
    "erasing_repulsion_loss",
    "foreground_ratio_kl_loss",
    "general_specific_consistency_loss",
    "inter_pixel_relation_loss",
    "ood_metric_loss",
    "ood_negative_loss",
    "recam_loss",
    "regional_contrast_loss",
    "sce_reactivation_loss",
    "sim_max_loss",
    "sim_min_loss",
    "sipe_loss",
    "spatial_bce_loss",
    "spatial_bce_threshold_loss",
    "wood_loss",
]
