"""An image as a network sees it at test time: at several sizes, normalised, with its mirror image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF


class Normalised(Protocol):
    """A network that takes images with this ``mean`` and ``std`` per channel taken off."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


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


def views(
    image: Tensor,
    network: Normalised,
    scales: Sequence[float],
    *,
    long_side: int | None = None,
    multiple: int = 1,
    smallest: int = 1,
) -> Iterator[Tensor]:
    """The image with its mirror image at each of ``scales``, (2, 3, h, w), as ``network`` wants it.

    At scale 1 its longer side has ``long_side`` pixels, by default as many as it has; sides are rounded to a
    ``multiple`` and are at least the ``smallest`` that the network can see.
    """
    height, width = image.shape[-2:]
    base = 1.0 if long_side is None else long_side / max(height, width)
    for scale in scales:
        size = scaled_size(height, width, base * scale, multiple)
        yield view(image, tuple(max(smallest, side) for side in size), network.mean, network.std)


def scaled_size(height: int, width: int, factor: float, multiple: int = 1) -> tuple[int, int]:
    """The size times ``factor``, rounded to a ``multiple`` of pixels, at least one."""
    return tuple(max(1, round(side * factor / multiple)) * multiple for side in (height, width))
