"""Landscapes: the backgrounds of the demo pictures, each at home with one class.

H, W height and width in pixels; colours are float in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from recipes.pipeline.data.drawing.brushes import Points, box, coverage, grid, jitter, mix, noise

SCENES = ("lake", "meadow", "forest", "mountains", "field", "railway")


def landscape(rng: np.random.Generator, scene: str, size: tuple[int, int], horizon: float) -> np.ndarray:
    """(H, W, 3) picture of one of `SCENES` with nothing in it; `horizon` is its row."""
    y, x = grid(size)
    sky = mix(jitter(rng, (0.36, 0.55, 0.80)), jitter(rng, (0.82, 0.86, 0.88)), (y / horizon).clip(0, 1))
    clouds = (noise(rng, size, 26, 2.2) * 1.6 + rng.uniform(-0.4, 0.3)).clip(0, 1)
    sky = mix(sky, (0.95, 0.95, 0.95), clouds)
    rgb = _backdrop(rng, scene, size, horizon, sky)
    depth = 1 / ((y - horizon) / size[0]).clip(0.02)  # distance to the ground at a pixel, in units of the camera height
    across = (x - size[1] * rng.uniform(0.3, 0.7)) / size[1] * depth
    ground = _GROUNDS[scene](rng, size, depth, across)
    haze = ((depth - 6) / 30).clip(0, 0.35)
    ground = mix(ground, (0.78, 0.81, 0.82), haze)
    edge = (y - horizon - 1.5 * noise(rng, size, 18) * (scene not in ("lake", "railway"))).clip(0, 1)
    return mix(rgb, ground, edge)


def _backdrop(
    rng: np.random.Generator, scene: str, size: tuple[int, int], horizon: float, sky: np.ndarray
) -> np.ndarray:
    # what rises above the horizon: hills everywhere, peaks, trees or houses by the scene
    width = size[1]
    y, x = grid(size)
    far = jitter(rng, (0.42, 0.52, 0.50) if scene != "mountains" else (0.47, 0.47, 0.52))
    reach = {"mountains": 0.95, "forest": 0.3}.get(scene, 0.35) * horizon
    ridge = horizon - reach * (0.55 + 0.45 * noise(rng, (1, width), 22 if scene == "mountains" else 40, 1, 3)[0])
    rgb = mix(sky, np.asarray(far) * (1 + 0.22 * noise(rng, size, 7)[..., None]), (y - ridge[None]).clip(0, 1))
    if scene == "mountains":
        snow = ((horizon - 0.52 * reach - y) / 4 + 1.5 * noise(rng, size, 8)).clip(0, 1) * (y - ridge[None]).clip(0, 1)
        rgb = mix(rgb, (0.93, 0.94, 0.97), snow)
    if scene == "forest":
        leaves = mix((0.10, 0.22, 0.11), (0.30, 0.42, 0.16), (0.5 + 0.9 * noise(rng, size, 6)).clip(0, 1))
        crowns = (y + horizon * 0.55 + 9 * noise(rng, size, 9) - horizon * rng.uniform(0.5, 0.8)).clip(0, 1)
        rgb = mix(rgb, leaves, crowns)
        trunks: list[Points] = []
        for _ in range(rng.integers(5, 10)):
            middle, thick = rng.uniform(0, width), rng.uniform(1, 3.2)
            foot = horizon + rng.uniform(0, 9)
            trunks.append(
                [(middle - thick, foot), (middle - thick * 0.7, 0), (middle + thick * 0.7, 0), (middle + thick, foot)]
            )
        bark = np.asarray((0.25, 0.19, 0.14)) * (1 + 0.5 * noise(rng, size, 5, 0.2)[..., None])
        rgb = mix(rgb, bark, coverage(size, trunks))
    if scene == "railway":
        for _ in range(rng.integers(2, 5)):
            left, wide = rng.uniform(-0.1, 0.9) * width, rng.uniform(0.14, 0.3) * width
            tall = rng.uniform(0.4, 0.8) * horizon
            house = coverage(size, [box(left, horizon - tall, left + wide, horizon + 1)])
            wall = np.asarray(jitter(rng, (0.55, 0.45, 0.40), 0.1)) * (1 + 0.12 * noise(rng, size, 3)[..., None])
            rgb = mix(rgb, wall, house)
            panes = ((x - left) % 6 > 3) & ((y - horizon + tall) % 7 > 3.5) & (y < horizon - 2)
            rgb = mix(rgb, (0.25, 0.28, 0.33), panes * house * 0.8)
    return rgb


def _lake(rng: np.random.Generator, size: tuple[int, int], depth: np.ndarray, across: np.ndarray) -> np.ndarray:
    near, far = jitter(rng, (0.10, 0.30, 0.38)), jitter(rng, (0.42, 0.58, 0.66))
    water = mix(near, far, ((depth - 1) / 9).clip(0, 1))
    ripples = np.sin(38 / depth + 5 * noise(rng, size, 14, 3)) * 0.5 + noise(rng, size, 3.5, 5)
    return water * (1 + 0.20 * ripples[..., None]) + 0.25 * ((ripples - 0.75).clip(0, 1))[..., None]


def _meadow(rng: np.random.Generator, size: tuple[int, int], depth: np.ndarray, across: np.ndarray) -> np.ndarray:
    grass = mix(
        jitter(rng, (0.24, 0.42, 0.13)),
        jitter(rng, (0.50, 0.58, 0.24)),
        (0.5 + 0.9 * noise(rng, size, 20, 2)).clip(0, 1),
    )
    grass = grass * (1 + 0.30 * noise(rng, size, 2.5, 0.6)[..., None])
    flowers = rng.random(size) > 1 - 0.02 * min(1.0, rng.uniform(0, 2))
    return mix(grass, jitter(rng, (0.92, 0.86, 0.45), 0.15), flowers * 0.8)


def _forest(rng: np.random.Generator, size: tuple[int, int], depth: np.ndarray, across: np.ndarray) -> np.ndarray:
    floor = mix(
        jitter(rng, (0.20, 0.17, 0.09)), jitter(rng, (0.36, 0.36, 0.15)), (0.5 + noise(rng, size, 12)).clip(0, 1)
    )
    light = (1.4 * noise(rng, size, 16, 2) - 0.3).clip(0, 1)  # sunlight through the leaves
    return mix(floor * (1 + 0.40 * noise(rng, size, 2.5)[..., None]), (0.66, 0.62, 0.30), 0.5 * light)


def _mountains(rng: np.random.Generator, size: tuple[int, int], depth: np.ndarray, across: np.ndarray) -> np.ndarray:
    scree = np.asarray(jitter(rng, (0.50, 0.48, 0.46))) * (1 + 0.42 * noise(rng, size, 6)[..., None])
    moss = (1.5 * noise(rng, size, 15) - 0.1).clip(0, 1)
    return mix(scree, jitter(rng, (0.37, 0.42, 0.20)), 0.8 * moss)


def _field(rng: np.random.Generator, size: tuple[int, int], depth: np.ndarray, across: np.ndarray) -> np.ndarray:
    furrows = np.sin(across * rng.uniform(20, 30) + 0.7 * noise(rng, size, 8))
    earth = mix(jitter(rng, (0.27, 0.18, 0.11)), jitter(rng, (0.56, 0.42, 0.27)), 0.5 + 0.5 * furrows)
    green = (furrows * 2 - 0.9).clip(0, 1) * rng.integers(0, 2) * 0.7
    return mix(earth * (1 + 0.25 * noise(rng, size, 2.5)[..., None]), (0.34, 0.50, 0.18), green)


def _railway(rng: np.random.Generator, size: tuple[int, int], depth: np.ndarray, across: np.ndarray) -> np.ndarray:
    gravel = np.asarray(jitter(rng, (0.46, 0.43, 0.40))) * (1 + 0.40 * noise(rng, size, 2.2, 1, 1)[..., None])
    between = (np.abs(across) + 0.42) % 0.84 - 0.42  # several tracks side by side
    sleepers = (np.abs(between) < 0.32) & (np.sin(depth * 9) > 0.2)
    rails = np.abs(np.abs(between) - 0.22) < 0.022
    ground = mix(gravel, (0.26, 0.19, 0.15), sleepers * 0.8)
    return mix(ground, (0.74, 0.75, 0.78), rails.astype(np.float32))


_GROUNDS: dict[str, Callable[..., np.ndarray]] = {
    "lake": _lake,
    "meadow": _meadow,
    "forest": _forest,
    "mountains": _mountains,
    "field": _field,
    "railway": _railway,
}
