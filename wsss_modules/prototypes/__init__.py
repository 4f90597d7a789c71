"""Prototypes of features: k-means, banks of centres (W-OoD), and those of single images (SIPE)."""

from wsss_modules.prototypes.centres import (
    ClassCentres,
    ClosestPairs,
    Clusters,
    FeatureCentreBank,
    centre_distances,
    class_feature_centres,
    closest_pairs,
    kmeans,
)
from wsss_modules.prototypes.exploration import (
    Exploration,
    HierarchicalFeatureHead,
    ImageSpecificPrototypeExploration,
    explore_prototypes,
    image_specific_prototypes,
    prototype_cam,
)
from wsss_modules.prototypes.structure import (
    StructureAwareSeeds,
    normalize_cam_with_background,
    structure_aware_seeds,
    structure_iou,
)

__all__ = [
    "ClassCentres",
    "ClosestPairs",
    "Clusters",
    "Exploration",
    "FeatureCentreBank",
    "HierarchicalFeatureHead",
    "ImageSpecificPrototypeExploration",
    "StructureAwareSeeds",
    "centre_distances",
    "class_feature_centres",
    "closest_pairs",
    "explore_prototypes",
    "image_specific_prototypes",
    "kmeans",
    "normalize_cam_with_background",
    "prototype_cam",
    "structure_aware_seeds",
    "structure_iou",
]
