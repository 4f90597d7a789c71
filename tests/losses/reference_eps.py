"""EPS's saliency loss as the released code takes it: classes are parted by masks of the size of the maps."""

import torch
from torch import Tensor
from torch.nn import functional as F


def loss(scores: Tensor, saliency: Tensor, labels: Tensor, threshold: float = 0.4, weight: float = 0.5) -> Tensor:
    """Class maps (B, 1+K, H, W) with the background first, saliency (B, 1, H', W'), labels (B, K)."""
    batch, _, height, width = scores.shape
    saliency = F.interpolate(saliency, (height, width))
    probability = scores.softmax(1)
    hard, hard_saliency = probability[:, 1:].round(), saliency.round()
    overlap = (hard * hard_saliency).sum((2, 3)) / (hard + 1e-4).sum((2, 3))
    present = labels.bool()
    kept = (overlap > threshold) & present

    no_class = torch.zeros(batch, 1, dtype=torch.bool, device=scores.device)
    of_foreground = torch.cat([no_class, kept], 1)[..., None, None].expand_as(scores)
    of_background = torch.cat([~no_class, present & ~kept], 1)[..., None, None].expand_as(scores)
    foreground, background = torch.zeros_like(scores), torch.zeros_like(scores)
    foreground[of_foreground] = probability[of_foreground]
    background[of_background] = probability[of_background]
    foreground, background = (x.sum(1, keepdim=True) for x in (foreground, background))
    estimate = weight * foreground + (1 - weight) * (1 - background)
    return F.mse_loss(estimate, saliency)
