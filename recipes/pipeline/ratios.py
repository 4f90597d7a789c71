"""Foreground ratios: how much of each training image each class covers, in masks that a network gives on its way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from recipes.pipeline.files import load_arrays, save_arrays
from recipes.pipeline.labels import refine_mask
from recipes.pipeline.run import Run
from recipes.pipeline.views import image_tensor, scaled_size


def write_ratios(run: Run, mask_of: Callable[[Tensor, Tensor], Tensor], scale: float, folder: str) -> None:
    """Write the ratios of each training image, in the mask that a dense CRF makes of ``mask_of``.

    ``mask_of(image, labels)`` gives the mask (H, W) of an image (3, H, W) uint8, ``scale`` times as large as the
    photograph, with tags (K,).
    """

    @torch.no_grad()
    def work(name: str) -> None:
        picture = run.dataset.image(name)
        height, width = scaled_size(picture.height, picture.width, scale)
        image = image_tensor(picture.resize((width, height), Image.Resampling.BICUBIC)).to(run.fabric.device)
        mask = mask_of(image, torch.from_numpy(run.dataset.labels(name)).to(image.device))
        ratio = foreground_ratio(refine_mask(image, mask).cpu().numpy(), len(run.dataset.classes))
        save_arrays(run.path(folder, f"{name}.npz"), ratio=ratio)

    run.for_each(run.train, lambda name: run.path(folder, f"{name}.npz"), work)


def read_ratios(run: Run, folder: str) -> Tensor:
    """What :func:`write_ratios` wrote, in the order of the training images: (images, K) float32."""
    found = [load_arrays(run.path(folder, f"{name}.npz"))["ratio"] for name in run.train]
    return torch.from_numpy(np.stack(found)).float()


def foreground_ratio(mask: np.ndarray, num_classes: int) -> np.ndarray:
    """Share of the pixels of a mask (H, W) that each of the classes 1..K covers: (K,) float64."""
    return np.bincount(mask.ravel(), minlength=256)[1 : 1 + num_classes] / mask.size
