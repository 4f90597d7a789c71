"""For the tests of report and command line: a small data set, a finished run directory, a recipe that takes no time."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from PIL import Image

import recipes
from recipes.pipeline.data.image_set import FileAnnotations, ImageSet, index_table
from recipes.pipeline.evaluation import evaluate_masks, measure_seeds
from recipes.pipeline.files import load_mask, save_arrays, save_mask

CLASSES = ("cat", "cow & calf")
KEPT = (8, 10)  # their indices in VOC


def make_dataset(folder: Path, images: int = 12, *, masks: bool = True, classes: tuple[str, ...] = CLASSES) -> ImageSet:
    """Two kinds of rectangles on noise; the first two thirds are train (all with masks), the rest val."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    files, truths, tags = {}, {}, {}
    for number in range(images):
        name, height, width = f"photo {number:02d}", 40 + number, 64
        image = generator.integers(0, 90, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), np.uint8)
        kind = 1 + number % 2
        mask[8:26, 10 + number : 34 + number] = KEPT[kind - 1]
        image[mask > 0] += np.array([150, 60 * kind, 20], np.uint8)
        mask[26] = 255
        files[name] = str(folder / "images" / f"{name}.png")
        Image.fromarray(image).save(files[name])
        tags[name] = (kind,)
        if masks:
            truths[name] = str(folder / "masks" / f"{name}.png")
            Image.fromarray(mask).save(truths[name])
    names = tuple(files)
    train = names[: images * 2 // 3]
    return ImageSet(
        name="synthetic",
        classes=classes,
        train=train,
        seed=train if masks else (),
        val=names[len(train) :],
        out_of_distribution=(),
        palette_index=(0, *KEPT),
        files=files,
        tags=tags,
        annotations=FileAnnotations(masks=truths, table=index_table(20, KEPT)),
    )


def soft_cam(dataset: ImageSet, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A ramp that is right in the middle of the object and spills over its left side."""
    height, width = dataset.size(name)
    columns, number = np.arange(width), int(name[-2:])
    ramp = np.clip(1 - np.abs(columns - (18 + number)) / 20, 0, 1) * np.ones((height, 1))
    ramp[:6] = ramp[30:] = 0
    return ramp[None].astype(np.float16), np.flatnonzero(dataset.labels(name)) + 1


def make_run(folder: Path, dataset: ImageSet) -> Path:
    """CAMs of all images, masks of train, segmentation of val, curves, metrics and config."""

    def read(kind: str):
        return lambda name: load_mask(folder / kind / f"{name}.png", dataset.palette_index)

    for name in dataset.train + dataset.val:
        cam, keys = soft_cam(dataset, name)
        save_arrays(folder / "cam" / f"{name}.npz", keys=keys, cam=cam)
        mask = np.where(cam[0] > 0.3, keys[0], 0).astype(np.uint8)
        if int(name[-2:]) == 9:
            mask[mask > 0] = 3 - keys[0]  # one image with the wrong class
        save_mask(
            folder / ("mask" if name in dataset.train else "segmentation") / f"{name}.png", mask, dataset.palette_index
        )
    measured = []
    if dataset.seed:
        sweep = measure_seeds(lambda name: soft_cam(dataset, name), dataset, dataset.seed, threshold=0.15)
        measured = [
            sweep.fixed,
            sweep.best,
            evaluate_masks(read("mask"), dataset, dataset.seed),
            evaluate_masks(read("segmentation"), dataset, dataset.val, what="segmentation", split="val"),
        ]
    metrics = {
        "recipe": "toy",
        "preset": "tiny",
        "seed": 0,
        "data": dataset.name,
        "classes": list(dataset.classes),
        "stages": {"classify": {"seconds": 75.0, "peak_mb": 512.0}, "segment": {"seconds": 30.0, "peak_mb": 1024.0}},
        "measurements": [m.to_dict() for m in measured],
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"recipe": "toy", "preset": "tiny", "seed": 0, "data": dataset.name})
    )
    (folder / "curves").mkdir()
    points = [{"stage": "classify", "step": i, "steps": 50, "loss": 2 / (1 + i), "lr": 0.1} for i in range(50)]
    (folder / "curves" / "classify.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    return folder


def install_toy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Put a recipe named toy among those of the package."""
    place = folder / "more recipes"
    place.mkdir()
    (place / "toy.py").write_text(TOY)
    monkeypatch.setattr(recipes, "__path__", [*recipes.__path__, str(place)])
    spec = importlib.util.spec_from_file_location("recipes.toy", place / "toy.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "recipes.toy", module)
    spec.loader.exec_module(module)
    return module


TOY = '''"""Toy: A Paper About <Nothing> (Nobody, 1999).

Does no work at all. Second sentence.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from recipes.cli import run_recipe


@dataclass(frozen=True)
class Part:
    rate: float = 0.5
    """Rate of the part."""
    deep: bool = True
    """Whether it is deep."""
    scales: tuple[float, ...] = (1.0, 2.0)
    """Sizes."""


@dataclass(frozen=True)
class Config:
    data: str = "demo"
    """Where the photographs are."""
    preset: str = "demo"
    """Settings to start from."""
    seed: int = 0
    """Seed of everything."""
    out: Path | None = None
    """Run folder."""
    label_file: str | None = None
    """Tags."""
    part: Part = field(default_factory=Part)


PRESETS = {"demo": Config(), "tiny": Config(part=Part(rate=0.125, scales=(1.0,)))}


def main(config: Config) -> dict:
    if config.data == "interrupt":
        raise KeyboardInterrupt
    if config.data == "bug":
        raise RuntimeError("a bug")
    if config.data != "demo":
        raise ValueError(f"data: expected demo, got {config.data!r}")
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "config.yaml").write_text("recipe: toy")
    (config.out / "seen.txt").write_text(repr(config))
    return {}


if __name__ == "__main__":
    run_recipe(sys.modules[__name__])
'''
