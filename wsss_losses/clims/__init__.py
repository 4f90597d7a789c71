"""CLIMS: an image-text model as the judge of class maps."""

from wsss_losses.clims.matching import (
    BackgroundTextMatchingLoss,
    ObjectTextMatchingLoss,
    background_text_matching_loss,
    object_text_matching_loss,
)
from wsss_losses.clims.objective import (
    CLIMSCameraReadyLoss,
    CLIMSLoss,
    CLIMSTerms,
    clims_camera_ready_loss,
    clims_loss,
)
from wsss_losses.clims.suppression import (
    AreaRegularizationLoss,
    BackgroundSuppressionLoss,
    ClassBackgroundSuppressionLoss,
    area_regularization_loss,
    background_suppression_loss,
    class_background_suppression_loss,
)

__all__ = [
    "AreaRegularizationLoss",
    "BackgroundSuppressionLoss",
    "BackgroundTextMatchingLoss",
    "CLIMSCameraReadyLoss",
    "CLIMSLoss",
    "CLIMSTerms",
    "ClassBackgroundSuppressionLoss",
    "ObjectTextMatchingLoss",
    "area_regularization_loss",
    "background_suppression_loss",
    "background_text_matching_loss",
    "class_background_suppression_loss",
    "clims_camera_ready_loss",
    "clims_loss",
    "object_text_matching_loss",
]
