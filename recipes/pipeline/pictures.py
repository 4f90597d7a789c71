"""Drawing: CAMs and masks over photographs, error maps, and rows of captioned panels.

H W pixels, K foreground classes, k classes present in an image.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from recipes.pipeline.files import replacing

IGNORE = 255
STRIPE = 3  # pixels, of the hatching
BAND = 40 * STRIPE  # rows; the hatching goes on from one to the next

# Bright, well apart for most kinds of colour blindness, legible over a grey photograph. Further classes get a hue each.
_COLOURS = ("ff9f1c", "2ec4ff", "ff5d8f", "7bd389", "c77dff", "f9f871", "ff6b35", "3ddbc1", "9aa5ff", "c0ca33")
_HEAT = ((0.0, "0b0724"), (0.25, "57106e"), (0.5, "bb3754"), (0.75, "f98e09"), (1.0, "fcffa4"))
FALSE_FOREGROUND, MISSED, CONFUSED, RIGHT = "ff4b3e", "3d8bff", "ffe14d", "dfe3e8"


class Example(NamedTuple):
    """One row of :func:`picture`.

    Attributes:
        image: (H, W, 3) uint8 photograph.
        cam: (k, H, W) in [0, 1].
        mask: (H, W) the mask made from it, 0..K or 255.
        truth: (H, W) the ground truth; None leaves the panel out.
    """

    image: np.ndarray
    cam: np.ndarray
    mask: np.ndarray
    truth: np.ndarray | None = None


def class_colours(classes: int) -> np.ndarray:
    """(1+K, 3) uint8: a colour for the background (unused, black) and each class.

    The VOC palette is right for files but nearly black for some animals; these are for looking at.
    """
    further = [
        colorsys.hls_to_rgb((0.11 + 0.618034 * i) % 1, (0.62, 0.74, 0.5)[i % 3], 0.8)
        for i in range(max(0, classes - len(_COLOURS)))
    ]
    chosen = [_rgb(code) for code in _COLOURS[:classes]] + [np.multiply(colour, 255) for colour in further]
    return np.array([np.zeros(3), *chosen]).round().astype(np.uint8)


def cam_overlay(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """The photograph in grey under the strongest CAM (k, H, W) of each pixel, from violet (0) to yellow (1)."""
    heat = np.clip(cam.astype(np.float32).max(0), 0, 1) if len(cam) else np.zeros(image.shape[:2], np.float32)
    stops = np.array([stop for stop, _ in _HEAT])
    colours = np.stack([_rgb(code) for _, code in _HEAT])
    coloured = np.stack([np.interp(heat, stops, colours[:, channel]) for channel in range(3)], -1)
    strength = (0.45 + 0.35 * heat)[..., None]
    return _bytes((1 - strength) * _grey(image, 0.0) + strength * coloured)


def mask_overlay(image: np.ndarray, mask: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The photograph in grey under the classes of ``mask``, outlined in white; 255 is hatched."""
    painted, edge = np.empty(image.shape, np.uint8), _outline(mask)
    for top in range(0, len(mask), BAND):  # floating point is eight times a large photograph
        rows = slice(top, top + BAND)
        shown, label = _grey(image[rows], 0.35), mask[rows]
        foreground = (label > 0) & (label != IGNORE)
        shown[foreground] = 0.3 * shown[foreground] + 0.7 * colours[label[foreground]]
        shown[edge[rows]] = 255
        painted[rows] = _bytes(_hatch(shown, label == IGNORE))
    return painted


def error_map(image: np.ndarray, prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Where ``prediction`` is wrong: false foreground, missed foreground, wrong class; right foreground stays light.

    Pixels left out of the measurement (truth 255) are hatched; a pixel predicted 255 counts as missed.
    """
    shown = _grey(image, 0.0) * 0.55
    ignored = truth == IGNORE
    said, true = (prediction > 0) & (prediction != IGNORE), (truth > 0) & ~ignored
    unsure = (prediction == IGNORE) & ~ignored
    kinds = {
        RIGHT: said & true & (prediction == truth),
        FALSE_FOREGROUND: said & ~true & ~ignored,
        MISSED: (~said & true) | unsure,
        CONFUSED: said & true & (prediction != truth),
    }
    for colour, where in kinds.items():
        strength = 0.45 if colour == RIGHT else 0.8
        shown[where] = (1 - strength) * shown[where] + strength * _rgb(colour)
    return _bytes(_hatch(shown, ignored))


def fit_within(side: int, image: np.ndarray) -> tuple[int, int]:
    """(H, W) of ``image`` scaled down so that its longer side is at most ``side`` pixels."""
    factor = min(1.0, side / max(image.shape[:2]))
    return max(1, round(image.shape[0] * factor)), max(1, round(image.shape[1] * factor))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, 3) uint8 smoothly."""
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS))


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a label map (H, W) to the nearest pixel."""
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST))


def resize_cam(cam: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (k, H, W) bilinearly."""
    maps = [Image.fromarray(one.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR) for one in cam]
    return np.stack([np.asarray(one) for one in maps]) if maps else np.zeros((0, *size), np.float32)


def picture(
    path: str | Path,
    examples: Sequence[Example],
    *,
    classes: Sequence[str] = (),
    captions: Sequence[str] = ("photograph", "class activation map", "mask from tags alone", "ground truth"),
    height: int = 240,
) -> None:
    """Write rows of photograph, CAM, mask and truth side by side, with captions and the colours' meaning, as a PNG.

    Args:
        path: the file.
        examples: the rows, scaled to the same height; panels narrower than the column's widest are centred.
        classes: names of the K classes, for a legend of those that occur; without them there is no legend.
        captions: one for each column.
        height: of a row in pixels.

    Raises:
        ValueError: no examples, or another number of captions than columns.
    """
    if not examples:
        raise ValueError("examples: expected at least one, got none")
    columns = 3 if any(example.truth is None for example in examples) else 4
    captions = captions[:3] if columns == 3 else captions
    if len(captions) != columns:
        raise ValueError(f"captions: expected {columns}, one for each column, got {len(captions)}")
    known = [np.concatenate([e.mask.ravel(), *([] if e.truth is None else [e.truth.ravel()])]) for e in examples]
    seen = [int(value) for value in np.unique(np.concatenate(known)) if 0 < value < IGNORE]
    colours = class_colours(max([len(classes), *seen]))

    rows = []
    for example in examples:
        size = height, max(1, round(height * example.image.shape[1] / example.image.shape[0]))
        image = resize_image(example.image, size)
        panels = [image, cam_overlay(image, resize_cam(example.cam, size))]
        labels = [label for label in (example.mask, example.truth)[: columns - 2] if label is not None]
        rows.append(panels + [mask_overlay(image, resize_mask(label, size), colours) for label in labels])

    gap, line, margin = height // 24, round(height * 0.105), height // 12
    font = ImageFont.load_default(round(height * 0.068))
    widths = [max(row[column].shape[1] for row in rows) for column in range(columns)]
    total = (
        2 * margin + sum(widths) + gap * (columns - 1),
        2 * margin + len(rows) * (height + gap) + line + (line if classes else 0),
    )
    canvas = Image.new("RGB", total, "white")
    draw = ImageDraw.Draw(canvas)
    left = margin
    for column, width in enumerate(widths):
        for number, row in enumerate(rows):
            panel = row[column]
            place = left + (width - panel.shape[1]) // 2, margin + number * (height + gap)
            canvas.paste(Image.fromarray(panel), place)
        below = margin + len(rows) * (height + gap) + line // 3
        draw.text((left + width / 2, below), captions[column], fill="#30363d", font=font, anchor="mm")
        left += width + gap
    if classes:
        names = [(classes[index - 1], tuple(colours[index].tolist())) for index in seen]
        box = round(height * 0.055)
        lengths = [draw.textlength(name, font=font) for name, _ in names]
        start = (total[0] - sum(lengths) - len(names) * 3.5 * box) / 2
        middle = total[1] - margin - line / 4
        for (name, colour), length in zip(names, lengths, strict=True):
            draw.rectangle((start, middle - box / 2, start + box, middle + box / 2), fill=colour)
            draw.text((start + 1.5 * box, middle), name, fill="#30363d", font=font, anchor="lm")
            start += length + 3.5 * box
    with replacing(Path(path)) as file:
        canvas.save(file, format="PNG", optimize=True)


def _rgb(code: str) -> np.ndarray:
    return np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)], np.float32)


def _grey(image: np.ndarray, colour: float) -> np.ndarray:
    """The photograph as float32 (H, W, 3) with ``colour`` of its colour left."""
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return (1 - colour) * grey[..., None] + colour * image


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbour has another label, apart from the rim of ignored areas."""
    edge = np.zeros(mask.shape, bool)
    for axis in (0, 1):
        here, there = [slice(None)] * 2, [slice(None)] * 2
        here[axis], there[axis] = slice(None, -1), slice(1, None)
        one, other = mask[tuple(here)], mask[tuple(there)]
        edge[tuple(here)] |= (one != other) & (one != IGNORE) & (other != IGNORE)
    return edge


def _hatch(shown: np.ndarray, where: np.ndarray) -> np.ndarray:
    rows, columns = np.indices(where.shape)
    stripe = (rows + columns) % (2 * STRIPE) < STRIPE
    shown[where & stripe] = 0.35 * shown[where & stripe] + 0.65 * 235
    shown[where & ~stripe] = 0.35 * shown[where & ~stripe] + 0.65 * 150
    return shown


def _bytes(shown: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(shown), 0, 255).astype(np.uint8)
