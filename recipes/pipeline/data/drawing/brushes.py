"""Noise, soft-edged polygons and colours: what the demo pictures are painted with.

H, W height and width in pixels; colours are float in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

_OVERSAMPLING = 3

Color = tuple[float, float, float]
Points = Sequence[tuple[float, float]]


def noise(
    rng: np.random.Generator, size: tuple[int, int], cell: float, stretch: float = 1.0, octaves: int = 3
) -> np.ndarray:
    """(H, W) in about [-1, 1]: random grids, bicubically enlarged; `stretch` > 1 draws it out along x."""
    total = np.zeros(size, dtype=np.float32)
    weight, norm = 1.0, 0.0
    for _ in range(octaves):
        grid = (max(2, round(size[0] / cell)), max(2, round(size[1] / cell / stretch)))
        values = Image.fromarray(rng.uniform(-1, 1, grid).astype(np.float32))
        total += weight * np.asarray(values.resize(size[::-1], Image.Resampling.BICUBIC))
        norm += weight
        weight, cell = weight * 0.6, cell / 2
        if cell < 1:
            break
    return total / norm


def blur(values: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of an (H, W) array in [0, 1]."""
    image = Image.fromarray((values * 255).clip(0, 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255


def coverage(size: tuple[int, int], polygons: Sequence[Points]) -> np.ndarray:
    """(H, W) in [0, 1]: the share of each pixel that the polygons cover."""
    height, width = size
    image = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    pen = ImageDraw.Draw(image)
    for polygon in polygons:
        pen.polygon([(x * _OVERSAMPLING, y * _OVERSAMPLING) for x, y in polygon], fill=255)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255


def grid(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each pixel, (H, W) each."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float32)
    return y, x


def mix(first: Color | np.ndarray, second: Color | np.ndarray, share: np.ndarray) -> np.ndarray:
    """Two colours, or (H, W, 3) pictures, mixed by an (H, W) share of the second."""
    return np.asarray(first) * (1 - share[..., None]) + np.asarray(second) * share[..., None]


def jitter(rng: np.random.Generator, color: Color, amount: float = 0.05) -> Color:
    """A colour near `color`."""
    red, green, blue = (float(c) for c in np.clip(np.asarray(color) + rng.uniform(-amount, amount, 3), 0.02, 0.98))
    return red, green, blue


def smooth(points: Points, steps: int = 6) -> Points:
    """Closed Catmull-Rom curve through the points."""
    p = np.asarray(points, dtype=np.float64)
    before, after, later = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    curve = []
    for t in np.arange(steps) / steps:
        curve.append(
            0.5 * (2 * p + (after - before) * t + (2 * before - 5 * p + 4 * after - later) * t**2)
            + 0.5 * (3 * p - before - 3 * after + later) * t**3
        )
    return [(float(x), float(y)) for x, y in np.stack(curve, axis=1).reshape(-1, 2)]


def ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0) -> Points:
    """Ellipse with the given radii, turned by `turn` radians."""
    angles = np.linspace(0, 2 * math.pi, 28, endpoint=False)
    u, v = rx * np.cos(angles), ry * np.sin(angles)
    c, s = math.cos(turn), math.sin(turn)
    return [(float(x + c * a - s * b), float(y + s * a + c * b)) for a, b in zip(u, v, strict=True)]


def box(x1: float, y1: float, x2: float, y2: float, slant: float = 0.0) -> Points:
    """Upright box, `slant` wider at the foot on each side."""
    return [(x1, y1), (x2, y1), (x2 + slant, y2), (x1 - slant, y2)]
