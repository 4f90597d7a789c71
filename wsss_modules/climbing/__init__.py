"""Images moved along the gradient of a classifier's scores: the climb of AdvCAM, the step of W-OoD."""

from wsss_modules.climbing.advcam import AdvCAM, ClimbStep
from wsss_modules.climbing.gradient import gradient_climb, top_logit_gradient
from wsss_modules.climbing.regions import (
    ClassRegions,
    GradCAM,
    discriminative_mask,
    linear_head_regions,
    positive_count_weight,
)
from wsss_modules.climbing.step import anti_adversarial_step

__all__ = [
    "AdvCAM",
    "ClassRegions",
    "ClimbStep",
    "GradCAM",
    "anti_adversarial_step",
    "discriminative_mask",
    "gradient_climb",
    "linear_head_regions",
    "positive_count_weight",
    "top_logit_gradient",
]
