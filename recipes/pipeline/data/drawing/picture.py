"""The pictures of the demo set: animals and vehicles in landscapes, drawn from polygons and noise.

Each class has one small part of its own (the fox's face, the ram's horns, the boat's funnel ...) on a body that it
shares with the other animals or vehicles: the same outlines, coats and paints. A classifier needs only the part, and
so a class activation map covers little more. Each class has a landscape that it is often seen in.

H, W height and width in pixels; colours are float in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageFilter

from recipes.pipeline.data.drawing.brushes import (
    Color,
    Points,
    blur,
    box,
    coverage,
    ellipse,
    grid,
    jitter,
    mix,
    noise,
    smooth,
)
from recipes.pipeline.data.drawing.landscapes import landscape
from recipes.pipeline.data.drawing.shapes import ANIMALS, CLASSES, shape
from recipes.pipeline.data.image_set import IGNORE

_COATS: tuple[Color, ...] = (
    (0.45, 0.29, 0.17),
    (0.24, 0.19, 0.17),
    (0.66, 0.53, 0.38),
    (0.85, 0.81, 0.74),
    (0.52, 0.50, 0.49),
    (0.60, 0.33, 0.18),
)
_PAINTS: tuple[Color, ...] = (
    (0.66, 0.14, 0.13),
    (0.13, 0.30, 0.58),
    (0.12, 0.42, 0.28),
    (0.82, 0.80, 0.74),
    (0.88, 0.55, 0.14),
    (0.38, 0.24, 0.42),
)


@dataclass
class Picture:
    """One picture of the demo set.

    Attributes:
        image: (H, W, 3) uint8.
        mask: (H, W) uint8, 0 background, 1..K as in `CLASSES`, 255 a ring where the edge of an object is blurred.
        objects: Class index and (H, W) bool visible pixels, per object.
        saliency: (H, W) uint8, soft and not always right.
        scene: One of `SCENES`.
    """

    image: np.ndarray
    mask: np.ndarray
    objects: list[tuple[int, np.ndarray]]
    saliency: np.ndarray
    scene: str


@dataclass
class _Canvas:
    rng: np.random.Generator
    rgb: np.ndarray  # (H, W, 3)
    horizon: float
    owner: np.ndarray = field(init=False)  # (H, W) number of the object that a pixel shows, 0 none
    blurred: np.ndarray = field(init=False)  # (H, W) pixels on the soft edge of an object
    part: np.ndarray = field(init=False)  # (H, W) pixels of the class's own part

    def __post_init__(self) -> None:
        self.owner = np.zeros(self.size, dtype=np.int64)
        self.blurred = np.zeros(self.size, dtype=bool)
        self.part = np.zeros(self.size, dtype=bool)

    @property
    def size(self) -> tuple[int, int]:
        return self.rgb.shape[:2]

    def put(self, color: np.ndarray, alpha: np.ndarray, number: int) -> None:
        """Lay `color` over what is there; `number` is the object's, 0 for clutter."""
        self.rgb = self.rgb * (1 - alpha[..., None]) + color * alpha[..., None]
        on_edge = (alpha > 0.1) & (alpha < 0.9) & ((self.owner > 0) | (number > 0))
        self.blurred = (self.blurred & (alpha < 0.9)) | on_edge
        self.part &= alpha < 0.5
        self.owner = np.where(alpha >= 0.5, number, self.owner)


def draw_picture(rng: np.random.Generator, classes: Sequence[int], scene: str, size: tuple[int, int]) -> Picture:
    """Draw one picture.

    Args:
        rng: Source of everything that varies.
        classes: 1-based class of each object, from any of the classes; empty for an out-of-distribution picture.
        scene: One of `SCENES`.
        size: (H, W) in pixels.
    """
    for _ in range(50):
        picture, clear = _compose(rng, classes, scene, size)
        if clear:
            return picture
    raise RuntimeError(f"no clear view of classes {list(classes)} in {size}")


def _compose(
    rng: np.random.Generator, classes: Sequence[int], scene: str, size: tuple[int, int]
) -> tuple[Picture, bool]:
    height, width = size
    horizon = height * rng.uniform(0.26, 0.44)
    canvas = _Canvas(rng, landscape(rng, scene, size, horizon), horizon)
    # things further up the ground are further away: they are smaller and are drawn first
    count = len(classes)
    biggest = {0: 0.0, 1: 0.40, 2: 0.30}.get(count, 0.24)
    slots = rng.permutation(count)
    things = []
    for number, index in enumerate(classes, start=1):
        half = width * rng.uniform(0.62, 1.0) * biggest
        ground = min(height * rng.uniform(0.72, 0.97), height - 3.0)
        x = width * (slots[number - 1] + rng.uniform(0.42, 0.58)) / count
        things.append((ground - half * 0.1, number, index, half, x, ground))
    for _ in range(rng.integers(1, 4)):
        half = width * rng.uniform(0.05, 0.11)
        ground = height * rng.uniform(0.6, 0.98)
        things.append((ground, 0, 0, half, width * rng.uniform(0.03, 0.97), ground))
    alphas = {}
    for _, number, index, half, x, ground in sorted(things):
        if index:
            alphas[number] = _put_object(canvas, index, number, half, x, ground)
        else:
            _put_clutter(canvas, half, x, ground)
    if rng.random() < 0.45:
        _put_foreground(canvas, scene)
    clear = all(
        part is not None
        and (canvas.owner == number).sum() >= 0.015 * height * width
        and (canvas.part & (canvas.owner == number)).sum() >= 0.6 * part
        and (canvas.owner == number).sum() >= 0.6 * (alpha > 0.5).sum()
        for number, (alpha, part) in alphas.items()
    )
    mask = np.zeros(size, dtype=np.uint8)
    for number, index in enumerate(classes, start=1):
        mask[canvas.owner == number] = index
    mask[canvas.blurred] = IGNORE
    objects = [(index, canvas.owner == number) for number, index in enumerate(classes, start=1)]
    return Picture(_photograph(canvas), mask, objects, _saliency(canvas), scene), clear


def _body_texture(rng: np.random.Generator, size: tuple[int, int], name: str, half: float) -> np.ndarray:
    animal = name in ANIMALS
    pool = _COATS if animal else _PAINTS
    first, second = rng.choice(len(pool), 2, replace=False)
    if rng.random() < 0.5:  # in half of the pictures one of the two colours that a class has more often than others
        family = [other for other in CLASSES if (other in ANIMALS) == animal]
        first = 2 * family.index(name) + rng.integers(2)
    base, other = jitter(rng, pool[first]), jitter(rng, pool[second])
    kind = rng.integers(3)
    y, x = grid(size)
    if animal:
        patches = (3 * noise(rng, size, half * 0.5, 1, 2) - 0.5).clip(0, 1)
        stripes = (2.2 * np.sin(x * 7.5 / half + 3 * noise(rng, size, half * 0.5)) - 1.2).clip(0, 1)
        pattern = (np.zeros(size), patches, 0.6 * stripes)[kind]
        return mix(base, other, pattern) * (1 + 0.22 * noise(rng, size, 2.6, 0.5)[..., None])
    bands = (np.abs((y / half * 3.2) % 2 - 1) < 0.36) * 0.9
    panels = (np.abs((x / half * 4) % 1 - 0.5) > 0.44) * 0.5
    pattern = (np.zeros(size), bands, panels)[kind]
    worn = 1 + 0.10 * noise(rng, size, 6)
    return mix(base, other, pattern) * worn[..., None]


def _put_object(
    canvas: _Canvas, index: int, number: int, half: float, x: float, ground: float
) -> tuple[np.ndarray, int | None]:
    # draws the object; gives its coverage and the pixels of its part, None if much of the part is out of the picture
    rng, size = canvas.rng, canvas.size
    name = CLASSES[index - 1]
    side = 1 if rng.random() < 0.5 else -1
    tall = half * rng.uniform(0.88, 1.12)
    turn = math.radians(rng.uniform(-7, 7))
    c, s = math.cos(turn), math.sin(turn)

    def place(polygon: Points) -> Points:
        return [(x + side * half * (c * u - s * (v - 1)), ground + tall * (s * u + c * (v - 1))) for u, v in polygon]

    layers = shape(name, rng)
    tips = np.asarray([p for layer in layers if layer.is_part for polygon in layer.polygons for p in place(polygon)])
    framed = ((tips >= 0) & (tips < size[::-1])).all(1).mean()
    covers = [coverage(size, [place(p) for p in layer.polygons]) for layer in layers]
    alpha = np.maximum.reduce(covers)
    _cast_shadow(canvas, half, x, ground)
    texture = _body_texture(rng, size, name, half)
    height = blur(alpha, max(1.5, half * 0.16))
    slope_y, slope_x = np.gradient(height)
    relief = 1 + (half * (0.55 * slope_y + 0.25 * slope_x)).clip(-0.45, 0.4)  # lit from above left
    color = np.zeros((*size, 3))
    part = np.zeros(size, dtype=bool)
    for layer, cover in zip(layers, covers, strict=True):
        paint = (
            texture if layer.paint is None else np.asarray(layer.paint) * (1 + 0.06 * noise(rng, size, 3)[..., None])
        )
        color = mix(color, paint * layer.shade, cover)
        part = (part & (cover < 0.5)) | ((cover >= 0.5) & layer.is_part)
    # undo the premultiplication that mixing with black left on the soft edge
    color = color / alpha.clip(0.05)[..., None]
    canvas.put((color * relief[..., None]).clip(0, 1), alpha, number)
    canvas.part |= part
    return alpha, int(part.sum()) if framed > 0.85 else None


def _cast_shadow(canvas: _Canvas, half: float, x: float, ground: float) -> None:
    shadow = blur(coverage(canvas.size, [ellipse(x + 0.12 * half, ground, half * 0.98, half * 0.15)]), half * 0.07)
    canvas.rgb = canvas.rgb * (1 - 0.55 * shadow[..., None])


def _put_clutter(canvas: _Canvas, half: float, x: float, ground: float) -> None:
    # things of no class, in the colours of coats and paints
    rng, size = canvas.rng, canvas.size
    kind = rng.integers(4)
    pool = _PAINTS if kind in (1, 2) else _COATS
    color = jitter(rng, pool[rng.integers(len(pool))])
    wide = half * 0.6
    if kind == 0:  # a rock
        around = np.sort(rng.uniform(0, 2 * math.pi, 9))
        outline = [(half * math.cos(a) * rng.uniform(0.8, 1.1), -half * 0.6 * (1 + math.sin(a))) for a in around]
        grain = 0.25
    elif kind == 1:  # a tent
        outline, grain = [(-half, 0), (half, 0), (half * rng.uniform(-0.3, 0.3), -1.5 * half)], 0.08
    elif kind == 2:  # a barrel
        left = [(-wide * 0.8, 0), (-wide, -half * 0.7), (-wide * 0.8, -half * 1.4)]
        outline, grain = [*left, *((-u, v) for u, v in reversed(left))], 0.10
    else:  # a bush
        around = np.linspace(0, 2 * math.pi, 14, endpoint=False)
        reach = half * (1 + 0.25 * (np.arange(14) % 2))
        outline = [(r * math.cos(a), 0.8 * r * math.sin(a) - half * 0.7) for r, a in zip(reach, around, strict=True)]
        color, grain = jitter(rng, (0.20, 0.33, 0.14)), 0.5
    placed = [(x + u, ground + v) for u, v in outline]
    alpha = coverage(size, [placed if kind == 1 else smooth(placed, 3)])
    _cast_shadow(canvas, half, x, ground)
    slope_y, slope_x = np.gradient(blur(alpha, max(1.0, half * 0.2)))
    relief = 1 + (half * (0.5 * slope_y + 0.3 * slope_x)).clip(-0.4, 0.4) + grain * noise(rng, size, 3)
    canvas.put((np.asarray(color) * relief[..., None]).clip(0, 1), alpha, 0)


def _put_foreground(canvas: _Canvas, scene: str) -> None:
    # blades of grass, reeds or posts of a fence before everything else
    rng = canvas.rng
    height, width = canvas.size
    polygons: list[Points] = []
    if scene in ("railway", "field"):
        for _ in range(rng.integers(1, 3)):
            x, thick = rng.uniform(0, width), rng.uniform(1.2, 2.2)
            polygons.append(box(x - thick, height * rng.uniform(0.25, 0.6), x + thick, height))
        color: Color = (0.30, 0.27, 0.25)
    else:
        start = rng.uniform(0, 0.7) * width
        for _ in range(rng.integers(12, 30)):
            x, lean = start + rng.uniform(0, 0.35) * width, rng.uniform(-5, 5)
            polygons.append([(x - 1.0, height), (x + lean, height * rng.uniform(0.66, 0.88)), (x + 1.0, height)])
        color = jitter(rng, (0.24, 0.34, 0.12))
    alpha = coverage(canvas.size, polygons)
    canvas.put(np.asarray(color) * (1 + 0.3 * noise(rng, canvas.size, 4)[..., None]), alpha, 0)


def _photograph(canvas: _Canvas) -> np.ndarray:
    rng, size = canvas.rng, canvas.size
    y, x = grid(size)
    angle = rng.uniform(0, 2 * math.pi)
    slope = ((x / size[1] - 0.5) * math.cos(angle) + (y / size[0] - 0.5) * math.sin(angle)) * rng.uniform(0, 0.4)
    warmth = np.asarray([1, 1, 1]) + rng.uniform(-0.07, 0.07) * np.asarray([1, 0.1, -1])
    exposed = (
        canvas.rgb.clip(0, 1) ** rng.uniform(0.85, 1.2) * (rng.uniform(0.82, 1.1) * (1 + slope))[..., None] * warmth
    )
    grain = rng.normal(0, 0.014, (*size, 3))
    image = Image.fromarray(((exposed + grain).clip(0, 1) * 255).round().astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0.25, 0.55))))


def _saliency(canvas: _Canvas) -> np.ndarray:
    rng, size = canvas.rng, canvas.size
    shown = np.zeros(size, dtype=np.float32)
    for number in range(1, int(canvas.owner.max()) + 1):
        strength = 0.25 if rng.random() < 0.1 else rng.uniform(0.8, 1.0)  # one object in ten is nearly missed
        shown = np.maximum(shown, strength * (canvas.owner == number))
    if rng.random() < 0.3:  # something else stands out
        x, y, r = rng.uniform(0, size[1]), rng.uniform(canvas.horizon, size[0]), rng.uniform(4, 10)
        shown = np.maximum(shown, rng.uniform(0.3, 0.8) * coverage(size, [ellipse(x, y, r * 1.5, r)]))
    soft = blur(shown, rng.uniform(1.0, 2.2)) + 0.10 * noise(rng, size, 14)
    return ((soft * 1.15 - 0.04).clip(0, 1) * 255).round().astype(np.uint8)
