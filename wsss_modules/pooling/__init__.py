"""Pooling of feature maps and class maps into vectors and scores."""

from wsss_modules.pooling.class_masked import PresentFeatures, class_masked_pooling, pool_present_classes
from wsss_modules.pooling.gated_pyramid import GatedPyramidOutput, GatedPyramidPooling, SignPreservingGate
from wsss_modules.pooling.global_rank import GlobalWeightedRankPool, global_weighted_rank_pool

__all__ = [
    "GatedPyramidOutput",
    "GatedPyramidPooling",
    "GlobalWeightedRankPool",
    "PresentFeatures",
    "SignPreservingGate",
    "class_masked_pooling",
    "global_weighted_rank_pool",
    "pool_present_classes",
]
