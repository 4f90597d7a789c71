"""Pooling of feature maps and class maps into vectors and scores."""

from wsss_modules.pooling.background_aware import (
    BackgroundAwarePooling,
    BackgroundPrototypes,
    BoxClassifier,
    BoxClassifierOutput,
    PooledBoxes,
    background_attention,
    background_aware_pooling,
    background_prototypes,
    pad_to_grid,
    weighted_roi_avg_pool,
)
from wsss_modules.pooling.class_masked import PresentFeatures, class_masked_pooling, pool_present_classes
from wsss_modules.pooling.gated_pyramid import GatedPyramidOutput, GatedPyramidPooling, SignPreservingGate
from wsss_modules.pooling.global_rank import GlobalWeightedRankPool, global_weighted_rank_pool

__all__ = [
    "BackgroundAwarePooling",
    "BackgroundPrototypes",
    "BoxClassifier",
    "BoxClassifierOutput",
    "GatedPyramidOutput",
    "GatedPyramidPooling",
    "GlobalWeightedRankPool",
    "PooledBoxes",
    "PresentFeatures",
    "SignPreservingGate",
    "background_attention",
    "background_aware_pooling",
    "background_prototypes",
    "class_masked_pooling",
    "global_weighted_rank_pool",
    "pad_to_grid",
    "pool_present_classes",
    "weighted_roi_avg_pool",
]
