"""An image as a network sees it at test time: resized, normalised, with its mirror image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF


def image_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return TF.pil_to_tensor(image)


def view(
    image: Tensor, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], *, flip: bool = True
) -> Tensor:
    """The image resized to ``size`` (bicubic) and normalised, and its mirror image if ``flip``: (1 or 2, 3, h, w)."""
    resized = image if size == tuple(image.shape[-2:]) else TF.resize(image, list(size), InterpolationMode.BICUBIC)
    normal = TF.normalize(resized.float() / 255, list(mean), list(std))
    views = torch.stack([normal, normal.flip(-1)]) if flip else normal[None]
    return views.contiguous(memory_format=torch.channels_last)
