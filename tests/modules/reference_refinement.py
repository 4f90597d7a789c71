"""Pixel correlation with its N x N matrix, and prototypes class by class, as the released code has them."""

import torch
from torch import Tensor
from torch.nn import functional as F


def pixel_correlation(maps: Tensor, keys: Tensor, eps: float = 1e-5) -> Tensor:
    """(B, C, H, W) maps and (B, E, H, W) keys, with the matrix and its normalised copy."""
    k = keys.flatten(2)
    k = k / (k.norm(dim=1, keepdim=True) + eps)
    weight = F.relu(k.mT @ k)  # (B, N, N)
    weight = weight / (weight.sum(1, keepdim=True) + eps)
    return (maps.flatten(2) @ weight).view_as(maps)


def stretched(cam: Tensor) -> Tensor:
    """Min-max of each map of (B, K, H, W), not clamped."""
    out = torch.empty_like(cam)
    for image in range(cam.shape[0]):
        for k in range(cam.shape[1]):
            a = cam[image, k].clamp(min=0)
            low, high = a.min(), a.max()
            a = torch.where(a < low + 1e-5, torch.zeros_like(a), a)
            out[image, k] = (a - low - 1e-5) / (high - low + 1e-5)
    return out


def prototypes(features: Tensor, cam: Tensor, k: int) -> Tensor:
    """(1 + K, D), the background from the first k pixels."""
    pixels = features.permute(0, 2, 3, 1).flatten(0, 2)
    maps = stretched(cam).permute(1, 0, 2, 3).flatten(1)
    rows = [F.normalize(pixels[:k].mean(0), dim=0)]
    for row in maps:
        order = sorted(range(len(row)), key=lambda i, row=row: (-row[i].item(), i))[:k]
        mean = (row[order, None] * pixels[order]).sum(0) / row[order].sum()
        rows.append(F.normalize(mean, dim=0))
    return torch.stack(rows)
