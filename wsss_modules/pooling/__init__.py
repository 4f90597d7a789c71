"""Pooling of feature maps and class maps into vectors and scores."""

from wsss_modules.pooling.class_masked import PresentFeatures, class_masked_pooling, pool_present_classes

__all__ = ["PresentFeatures", "class_masked_pooling", "pool_present_classes"]
