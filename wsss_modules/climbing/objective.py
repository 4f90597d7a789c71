"""What AdvCAM climbs: the class's own score up, all others down, and the entries that are high already held in place.

Axes: M climbers, V views, K foreground classes, h w cells.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_integer, check_ndim, check_shape
from wsss_modules._precision import at_least_float32
from wsss_modules.climbing.regions import discriminative_mask


class ClimbTerms(NamedTuple):
    """Of each climber, (M,): the score of its class, those of all ``others``, and the moves of its high entries."""

    own: Tensor
    others: Tensor
    moved: Tensor

    def objective(self, ad_coeff: float) -> Tensor:
        """What is to be raised, (M,)."""
        return self.own - self.others - ad_coeff * self.moved


def climb_terms(scores: Tensor, cam: Tensor, initial_cam: Tensor, index: Tensor, threshold: float) -> ClimbTerms:
    """The terms of :func:`wsss_losses.anti_adversarial_climb_loss`, in at least float32."""
    check_ndim("logits", scores, 5, "(M, V, K, h, w)")
    check_floating("logits", scores)
    check_ndim("cam", cam, 3, "(M, h, w)")
    check_floating("cam", cam)
    check_shape("cam", cam, (len(scores), None, None), "to match logits")
    check_shape("initial_cam", initial_cam, cam.shape, "to match cam")
    check_shape("index", index, scores.shape[:1], "to match logits")
    check_integer("index", index)
    means = F.relu(at_least_float32(scores)).mean((3, 4)).sum(1)  # (M, K)
    own = means.gather(1, index[:, None])[:, 0]
    is_other = torch.arange(means.shape[1], device=index.device) != index[:, None]
    others = torch.where(is_other, means, 0.0).sum(1)
    region = at_least_float32(cam)
    change = (region - initial_cam.detach().to(region.dtype)).abs()
    return ClimbTerms(own, others, (change * discriminative_mask(region, threshold)).sum((1, 2)))
