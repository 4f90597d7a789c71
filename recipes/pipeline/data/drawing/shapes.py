"""Outlines of the animals and vehicles in the demo pictures, as polygons in layers.

In units of half a body length, x towards the head and y down; feet and wheels stand on y = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from recipes.pipeline.data.drawing.brushes import Color, Points, box, ellipse, jitter, smooth

CLASSES = ("boat", "cow", "fox", "ram", "tractor", "tram")
ANIMALS = ("cow", "fox", "ram")
# where the parts are drawn, and where they are put: well inside the outline, so that what lies around them is body
_PART_PLACES = {
    "boat": ((0.62, 0.1), (0.30, 0.22)),
    "cow": ((0.95, -0.55), (0.62, -0.38)),
    "fox": ((0.95, -0.55), (0.62, -0.38)),
    "ram": ((0.95, -0.55), (0.62, -0.38)),
    "tractor": ((0.62, 0.6), (0.40, 0.50)),
    "tram": ((0.75, 0.2), (0.42, 0.2)),
}


@dataclass(frozen=True)
class Layer:
    """Polygons of one colour.

    Attributes:
        polygons: Their points.
        paint: Colour; None for the body's own coat or paint.
        shade: Factor on the colour.
        is_part: Belongs to what only this class has.
    """

    polygons: tuple[Points, ...]
    paint: Color | None
    shade: float = 1.0
    is_part: bool = False


def shape(name: str, rng: np.random.Generator) -> list[Layer]:
    """Layers of an object of the class, from back to front."""
    drawn, put = _PART_PLACES[name]
    return [_moved(layer, drawn, put) if layer.is_part else layer for layer in _SHAPES[name](rng)]


def _moved(layer: Layer, drawn: tuple[float, float], put: tuple[float, float], scale: float = 1.18) -> Layer:
    # a little larger than drawn, to be seen at a hundred pixels
    polygons = tuple(
        [(put[0] + scale * (x - drawn[0]), put[1] + scale * (y - drawn[1])) for x, y in polygon]
        for polygon in layer.polygons
    )
    return replace(layer, polygons=polygons)


def _part(paint: Color | None, *polygons: Points, shade: float = 1.0) -> Layer:
    return Layer(polygons, paint, shade, is_part=True)


def _animal(rng: np.random.Generator) -> list[Layer]:
    j = rng.uniform(-0.07, 0.07, 20)
    belly, step = 0.36 + j[0], rng.uniform(-0.16, 0.16)
    legs: list[Points] = []
    far_legs: list[Points] = []
    for group, x, shift in ((far_legs, -0.62, step), (legs, -0.80, -step), (far_legs, 0.62, -step), (legs, 0.46, step)):
        group.append([(x - 0.11, 0.1), (x + 0.17, 0.1), (x + 0.09 + shift, 1.0), (x - 0.06 + shift, 1.0)])
    torso = smooth(
        [
            (-1.0, -0.12 + j[1]),
            (-0.82, -0.42 + j[2]),
            (-0.3, -0.44 + j[3]),
            (0.3, -0.43 + j[4]),
            (0.74, -0.50 + j[5]),
            (0.92, -0.1 + j[6]),
            (0.72, belly),
            (0.1, belly + 0.06 + j[7]),
            (-0.6, belly - 0.04),
            (-0.94, 0.22 + j[8]),
        ]
    )
    neck: Points = [(0.4, -0.42), (0.62, -0.66), (0.96, -0.5), (0.86, 0.12)]
    lift = rng.uniform(-0.25, 0.35)
    tail = smooth([(-0.9, -0.3), (-1.18, -0.1 - lift), (-1.42, 0.06 - lift * 1.6), (-1.3, 0.2 - lift), (-0.98, 0.06)])
    return [Layer(tuple(far_legs), None, 0.72), Layer((*legs, torso, neck, tail), None)]


def _fox(rng: np.random.Generator) -> list[Layer]:
    orange = jitter(rng, (0.90, 0.42, 0.08), 0.03)
    return [
        *_animal(rng),
        _part(
            (0.10, 0.07, 0.06),
            [(0.80, -0.86), (0.86, -1.30), (1.10, -0.98)],
            [(1.08, -0.98), (1.28, -1.30), (1.34, -0.86)],
        ),
        _part(
            orange, smooth([(0.76, -0.84), (1.06, -1.02), (1.36, -0.84), (1.30, -0.58), (1.08, -0.30), (0.84, -0.58)])
        ),
        _part(
            (0.96, 0.94, 0.90),
            [(0.80, -0.72), (1.04, -0.56), (1.06, -0.34), (0.90, -0.48)],
            [(1.34, -0.72), (1.10, -0.56), (1.10, -0.34), (1.24, -0.48)],
        ),
        _part(
            (0.05, 0.04, 0.04),
            ellipse(0.94, -0.76, 0.05, 0.06),
            ellipse(1.20, -0.76, 0.05, 0.06),
            ellipse(1.08, -0.36, 0.07, 0.06),
        ),
    ]


def _ram(rng: np.random.Generator) -> list[Layer]:
    face, horn, groove = (0.17, 0.13, 0.11), jitter(rng, (0.92, 0.82, 0.60), 0.03), (0.42, 0.27, 0.14)
    middle = (0.92, -0.74)
    return [
        *_animal(rng),
        _part(face, smooth([(0.84, -1.0), (1.12, -1.02), (1.40, -0.56), (1.36, -0.36), (1.18, -0.38), (0.92, -0.62)])),
        _part(horn, ellipse(*middle, 0.33, 0.33)),
        _part(groove, ellipse(*middle, 0.25, 0.25)),
        _part(horn, ellipse(*middle, 0.20, 0.20)),
        _part(groove, ellipse(*middle, 0.12, 0.12)),
        _part(horn, ellipse(*middle, 0.07, 0.07)),
    ]


def _cow(rng: np.random.Generator) -> list[Layer]:
    pink = jitter(rng, (0.94, 0.60, 0.60), 0.03)
    return [
        *_animal(rng),
        _part(
            (0.90, 0.87, 0.76),
            [(0.86, -0.98), (0.76, -1.28), (1.0, -1.04)],
            [(1.16, -1.04), (1.40, -1.28), (1.30, -0.98)],
        ),
        _part(
            (0.08, 0.08, 0.09),
            ellipse(0.70, -0.86, 0.17, 0.08, 0.5),
            ellipse(1.46, -0.86, 0.17, 0.08, -0.5),
            ellipse(1.08, -0.76, 0.30, 0.32),
        ),
        _part((0.97, 0.97, 0.95), smooth([(1.0, -1.04), (1.16, -1.04), (1.20, -0.6), (0.96, -0.6)])),
        _part(pink, ellipse(1.08, -0.44, 0.27, 0.17)),
        _part((0.25, 0.10, 0.10), ellipse(0.99, -0.45, 0.04, 0.05), ellipse(1.17, -0.45, 0.04, 0.05)),
    ]


def _vehicle(rng: np.random.Generator, bottom: float, flare: float) -> list[Layer]:
    j = rng.uniform(-0.05, 0.05, 6)
    roof, front = -0.30 + j[0], 1.0 + j[1]
    body = smooth(
        [
            (-1.0, roof + 0.05),
            (-0.93, roof),
            (0, roof + j[2] * 0.3),
            (front - 0.1, roof),
            (front, roof + 0.09),
            (front + flare, bottom - 0.07),
            (front - 0.07 - flare, bottom),
            (-0.93 + flare, bottom),
            (-1.0 - flare * 0.3, bottom - 0.08),
        ],
        4,
    )
    cabin_left, cabin_right = -0.8 + 3 * j[3], 0.25 + 3 * j[4]
    cabin = box(cabin_left, roof - 0.42 + j[5], cabin_right, roof + 0.1, 0.05)
    panes = int(rng.integers(2, 5))
    step = (cabin_right - cabin_left) / panes
    glass: list[Points] = [
        box(cabin_left + step * (i + 0.18), roof - 0.33 + j[5], cabin_left + step * (i + 0.86), roof - 0.05)
        for i in range(panes)
    ]
    return [Layer((cabin, body), None), Layer(tuple(glass), (0.16, 0.22, 0.28))]


def _boat(rng: np.random.Generator) -> list[Layer]:
    red, white, orange = jitter(rng, (0.86, 0.10, 0.12), 0.03), (0.97, 0.97, 0.96), (0.98, 0.45, 0.08)
    funnel = [box(0.44, -0.98 + 0.17 * i, 0.82, -0.98 + 0.17 * (i + 1)) for i in range(5)]
    return [
        *_vehicle(rng, 0.92, 0.16),
        _part(red, *funnel[::2]),
        _part(white, *funnel[1::2]),
        _part(orange, ellipse(0.62, 0.16, 0.21, 0.21)),
        _part(
            white,
            [(0.55, -0.05), (0.69, -0.05), (0.66, 0.05), (0.58, 0.05)],
            [(0.55, 0.37), (0.69, 0.37), (0.66, 0.27), (0.58, 0.27)],
        ),
        _part(None, ellipse(0.62, 0.16, 0.11, 0.11), shade=0.8),
    ]


def _tram(rng: np.random.Generator) -> list[Layer]:
    yellow, black = jitter(rng, (0.98, 0.82, 0.06), 0.03), (0.07, 0.07, 0.08)
    stripes: list[Points] = []
    for i in range(3):
        left = 0.52 + 0.17 * i
        stripes.append([(left, 0.62), (left + 0.085, 0.62), (left + 0.085 + 0.07, 0.28), (left + 0.07, 0.28)])
    wheels: list[Points] = [ellipse(x, 0.80, 0.17, 0.17) for x in (-0.68, -0.2, 0.3, 0.72)]
    return [
        _part(
            (0.12, 0.12, 0.14),
            [(0.30, -0.30), (0.52, -0.86), (0.47, -0.88), (0.23, -0.30)],
            [(0.52, -0.86), (0.78, -0.30), (0.71, -0.30), (0.47, -0.88)],
            box(0.26, -0.98, 0.78, -0.90),
        ),
        Layer(tuple(wheels), (0.13, 0.12, 0.12)),
        *_vehicle(rng, 0.70, 0.0),
        _part(yellow, box(0.48, 0.26, 1.02, 0.64)),
        _part(black, *stripes),
        _part(black, ellipse(0.80, 0.02, 0.16, 0.16)),
        _part((1.0, 0.98, 0.82), ellipse(0.80, 0.02, 0.11, 0.11)),
    ]


def _tractor(rng: np.random.Generator) -> list[Layer]:
    green, tyre, hub = jitter(rng, (0.45, 0.85, 0.12), 0.03), (0.08, 0.08, 0.08), (0.10, 0.10, 0.10)
    spokes: list[Points] = []
    turn = rng.uniform(0, math.pi)
    for i in range(4):
        angle = turn + i * math.pi / 2
        c, s = math.cos(angle), math.sin(angle)
        spokes.append(
            [
                (0.62 + 0.06 * c, 0.60 + 0.06 * s),
                (0.62 + 0.26 * c - 0.07 * s, 0.60 + 0.26 * s + 0.07 * c),
                (0.62 + 0.26 * c + 0.07 * s, 0.60 + 0.26 * s - 0.07 * c),
            ]
        )
    return [
        Layer((box(-0.1, -0.98, 0.0, -0.2),), (0.15, 0.15, 0.16)),
        *_vehicle(rng, 0.62, 0.0),
        Layer((ellipse(-0.66, 0.76, 0.24, 0.24),), tyre),
        _part(tyre, ellipse(0.62, 0.60, 0.40, 0.40)),
        _part(green, ellipse(0.62, 0.60, 0.28, 0.28)),
        _part(hub, *spokes),
        _part((0.96, 0.93, 0.35), ellipse(0.62, 0.60, 0.07, 0.07)),
    ]


_SHAPES: dict[str, Callable[[np.random.Generator], list[Layer]]] = {
    "boat": _boat,
    "cow": _cow,
    "fox": _fox,
    "ram": _ram,
    "tractor": _tractor,
    "tram": _tram,
}
