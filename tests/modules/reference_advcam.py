"""AdvCAM as released: one image and class at a time, Grad-CAM by a backward pass, gradients for all weights too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def climb_one(
    features_of: Callable[[Tensor], Tensor],
    head: nn.Conv2d,
    pair: Tensor,
    index: int,
    steps: int,
    *,
    step_size: float = 0.08,
    ad_coeff: float = 7.0,
    threshold: float = 0.5,
) -> tuple[list[Tensor], list[Tensor]]:
    """The maps (h, w) of all steps of one class, and the pairs (2, 3, H, W) that they were seen in."""
    regions, images, initial = [], [], None
    for _ in range(steps):
        images.append(pair)
        x = pair.clone().requires_grad_()
        features = features_of(x)
        features.retain_grad()
        scores = head(features)
        head.zero_grad()
        scores[:, index].relu().sum().backward(retain_graph=True)  # all the way down, as released
        gradient = features.grad.clone()
        weight = gradient.sum((2, 3), keepdim=True) / ((gradient > 0).sum() + 1e-12)
        each = (weight * features).sum(1).relu()
        region = each[0] + each[1].flip(-1)
        initial = region.detach() if initial is None else initial
        mask = torch.zeros_like(initial)
        if region.max() > 0:
            mask[region / region.max() > threshold] = 1
        means = scores.relu().mean((2, 3))
        objective = 2 * means[:, index].sum() - means.sum() - ad_coeff * ((region - initial).abs() * mask).sum()
        x.grad = None
        objective.backward()
        moved = pair + step_size * x.grad / (x.grad.abs().max() + 1e-12)
        regions.append(region.detach())
        pair = moved.clamp(pair.min().item(), pair.max().item()).detach()
    return regions, images
