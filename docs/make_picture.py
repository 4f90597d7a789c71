"""Write the README's picture from a finished demo run: docs/images/irn-demo.png.

python -m recipes run irn && python docs/make_picture.py runs/irn-demo-s0 NAME [NAME ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.pipeline.data import load_dataset
from recipes.pipeline.files import load_arrays, load_mask, read_settings
from recipes.pipeline.pictures import Example, picture


def main(run: Path, names: list[str]) -> None:
    """One row per image of ``names``: photograph, CAM, refined mask, truth."""
    dataset = load_dataset(read_settings(run)["data"])
    rows = []
    for name in names:
        cam = load_arrays(run / "cam" / f"{name}.npz")["cam"].astype(np.float32)
        mask = load_mask(run / "mask_crf" / f"{name}.png", dataset.palette_index)
        rows.append(Example(np.asarray(dataset.image(name)), cam, mask, dataset.mask(name)))
    target = Path(__file__).parent / "images" / "irn-demo.png"
    target.parent.mkdir(exist_ok=True)
    picture(target, rows, classes=dataset.classes)
    with Image.open(target) as full:
        full.convert("RGB").quantize(256).save(target, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
