"""What the examples share: drawn scenes of the demo data, a small classifier of them, and a way to show maps."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from recipes.pipeline.data.drawing import CLASSES, SCENES, Picture, draw_picture
from recipes.pipeline.pictures import class_colours
from wsss_modules import CAMHead

SIZE = (128, 128)


def scene(number: int, classes: tuple[int, ...] | None = None) -> Picture:
    """A scene of the demo data: its photograph, its true mask, a saliency map and its objects.

    Any landscape goes with any class, unlike in the demo data, where most are seen at home.
    """
    rng = np.random.default_rng([7, number])
    classes = (number % len(CLASSES) + 1,) if classes is None else classes
    return draw_picture(rng, classes, SCENES[rng.integers(len(SCENES))], SIZE)


def as_input(*pictures: Picture) -> Tensor:
    """(B, 3, H, W) in [-1, 1] at half the size, what the classifier takes."""
    images = torch.from_numpy(np.stack([picture.image for picture in pictures])).permute(0, 3, 1, 2)
    return nn.functional.avg_pool2d(images / 127.5 - 1, 2)


@lru_cache(maxsize=1)
@torch.enable_grad()
def classifier() -> nn.Sequential:
    """A small network and a CAM head, trained on the tags of drawn scenes for a few seconds."""
    torch.manual_seed(0)
    pictures = [scene(number) for number in range(96)] + [scene(number, ()) for number in range(96, 120)]
    images = as_input(*pictures)
    labels = torch.zeros(len(pictures), len(CLASSES))
    for row, picture in zip(labels, pictures, strict=True):
        row[[index - 1 for index, _ in picture.objects]] = 1
    widths = (3, 24, 48, 64)
    layers: list[nn.Module] = []
    for stride, (before, after) in zip((2, 1, 2), pairwise(widths), strict=True):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(nn.Sequential(*layers), CAMHead(widths[-1], len(CLASSES)))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(120):
        chosen = torch.randint(len(pictures), (16,))
        batch = images[chosen].flip(3) if step % 2 else images[chosen]
        loss = nn.functional.binary_cross_entropy_with_logits(model(batch).logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def show(*panels: tuple[str, np.ndarray | Tensor], columns: int = 4) -> None:
    """Photographs (H, W, 3), masks of integers in the colours of the classes, and maps from 0 to their maximum."""
    rows = -(-len(panels) // columns)
    _, axes = plt.subplots(rows, columns, figsize=(2.4 * columns, 2.6 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, panel) in zip(axes.flat, panels, strict=False):
        values = np.asarray(panel.detach() if isinstance(panel, Tensor) else panel)
        if values.ndim == 2 and values.dtype == np.int64:
            colours = np.full((256, 3), 190, np.uint8)  # unsure is grey
            colours[: len(CLASSES) + 1] = class_colours(len(CLASSES))
            values = colours[values]
        axis.imshow(values, cmap="viridis", vmin=0)
        axis.set_title(title, fontsize=9)
    plt.show()
