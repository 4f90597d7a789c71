"""NSROM's labels as the released code makes them: one image, one class after the other; dilation by a maximum."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def stretched(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min() + 1e-8)


def initial_label(cam: dict[int, np.ndarray], saliency: np.ndarray) -> np.ndarray:
    """Maps by class 1..K and saliency (H, W), all 0..255."""
    maps = np.zeros((1 + max(cam, default=0), *saliency.shape), np.float32)
    maps[0] = 1 - saliency / 255.0
    top = saliency.astype(np.float64)
    for k, values in cam.items():
        maps[k] = stretched(values.astype(np.float64))
        top = np.maximum(top, np.where(maps[k] > 0.8, 255, 0))
    maps[maps < 0.3] = 0
    label = maps.argmax(0)
    label[(maps > 0.9).sum(0) > 1] = 255
    label[(label == 0) & (top >= 32)] = 255
    return label


def mined(label: np.ndarray, cam: dict[int, np.ndarray]) -> np.ndarray:
    result = label.copy()
    for k, values in cam.items():
        v = stretched(values.astype(np.float64))
        inside = v[label == k]
        threshold = 1.0
        if inside.sum() != 0:
            threshold = np.median(inside)
        elif (v > 0.3).any():
            upper = v[v > np.median(v[v > 0.3])]
            threshold = np.median(upper) if upper.size else np.inf
        result[(label == 0) & (v > threshold)] = 255
    return result


def whole_or_nothing(label: np.ndarray) -> np.ndarray:
    few = ((label > 0) & (label < 255)).mean() < 0.01
    return np.full_like(label, 255) if few else label


def masked(
    segmentation: np.ndarray, pseudo: np.ndarray, saliency: np.ndarray, classes: int, dilation: int
) -> np.ndarray:
    label = segmentation.copy()
    if classes >= 2:
        take = (segmentation == 0) & (pseudo > 0) & (pseudo < 255)
        label[take] = pseudo[take]
        near = max_dilation(torch.from_numpy((label != 0) | (saliency != 0)), dilation).numpy()
        label[~near] = 255
    return whole_or_nothing(label)


def max_dilation(mask: Tensor, size: int) -> Tensor:
    """The largest value of every square: O(s^2) a pixel."""
    padded = F.pad(mask.float()[None, None], (size // 2, size - 1 - size // 2) * 2)
    return F.max_pool2d(padded, size, stride=1)[0, 0] > 0
