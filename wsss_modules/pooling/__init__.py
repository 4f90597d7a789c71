"""Pooling of feature maps and class maps into vectors and scores."""

from wsss_modules.pooling.class_masked import PresentFeatures, class_masked_pooling, pool_present_classes
from wsss_modules.pooling.gated_pyramid import GatedPyramidOutput, GatedPyramidPooling, SignPreservingGate

__all__ = [
    "GatedPyramidOutput",
    "GatedPyramidPooling",
    "PresentFeatures",
    "SignPreservingGate",
    "class_masked_pooling",
    "pool_present_classes",
]
