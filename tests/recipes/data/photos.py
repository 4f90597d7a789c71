"""Small photographs, masks and lists, written where a data set has them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.pipeline.data.image_set import voc_palette

SIZES = {"a": (20, 30), "b": (24, 18), "c": (17, 23), "v": (19, 21)}  # (H, W)


def write_photo(path: Path, size: tuple[int, int], **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    grain = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(grain).save(path, **options)


def write_mask(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())
    image.save(path)


def write_list(root: Path, name: str, names: Sequence[str]) -> None:
    path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n")


def half_mask(size: tuple[int, int], value: int) -> np.ndarray:
    mask = np.zeros(size, dtype=np.uint8)
    mask[:, : size[1] // 2] = value
    mask[:, size[1] // 2] = 255
    return mask


def write_xml(path: Path, objects: list[tuple[str, tuple[int, int, int, int], int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    items = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, (x1, y1, x2, y2), difficult in objects
    )
    path.write_text(f"<annotation>{items}</annotation>")
