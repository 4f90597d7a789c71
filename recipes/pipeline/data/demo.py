"""The built-in demo set: drawn pictures in VOC layout, made on first use in a few seconds, the same from run to run.

Six classes, several in one picture, each with a small telling part on a body shared with other classes, and with a
landscape of its own that it is seen in about three times in five. There are masks, boxes, saliency maps that are
soft and not always right, captions, and out-of-distribution pictures: the landscapes with nothing in them.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.pipeline.data.cache import cached
from recipes.pipeline.data.drawing import CLASSES, SCENES, Picture, draw_picture
from recipes.pipeline.data.image_set import voc_palette

_VERSION = 3  # to be raised with every change of what is drawn
_SIZES = ((96, 128), (112, 128), (128, 112), (128, 128), (104, 120), (120, 96))  # (H, W)
_PLACES = {
    "lake": "on a lake",
    "meadow": "in a meadow",
    "forest": "in a forest",
    "mountains": "in the mountains",
    "field": "in a ploughed field",
    "railway": "on railway tracks",
}
_SPLITS = ("train", "val", "outside")


def demo_folder(size: str = "") -> Path:
    """The folder of the demo set, in VOC layout; drawn if it is not there yet.

    Args:
        size: "" for 240 + 80 pictures, "tiny" for 16 + 8, or "TRAIN+VAL"; a smaller set is the start of a larger one.
    """
    match = re.fullmatch(r"(\d+)\+(\d+)", {"": "240+80", "tiny": "16+8"}.get(size, size))
    if match is None or int(match[1]) < len(CLASSES) or not int(match[2]):
        raise ValueError(
            "data: expected demo, demo:tiny or demo:TRAIN+VAL, such as demo:100+20, "
            f"with at least {len(CLASSES)} to train on and 1 in val; got demo:{size}"
        )
    train, val = int(match[1]), int(match[2])
    return cached(f"demo-v{_VERSION}-{train}+{val}", lambda folder: _write(folder, train, val))


def _write(root: Path, train: int, val: int) -> None:
    outside = max(6, train // 6)
    for folder in ("JPEGImages", "SegmentationClass", "Annotations", "Saliency", "OutOfDistribution"):
        (root / folder).mkdir()
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    captions = {}
    for split, count in zip(_SPLITS, (train, val, outside), strict=True):
        names = [f"{split}_{number:04d}" for number in range(count)]
        for number, name in enumerate(names):
            picture = _draw(split, number)
            if split == "outside":
                _save_photo(root / "OutOfDistribution" / f"{name}.jpg", picture)
                continue
            _save_photo(root / "JPEGImages" / f"{name}.jpg", picture)
            mask = Image.fromarray(picture.mask)
            mask.putpalette(voc_palette().tobytes())
            mask.save(root / "SegmentationClass" / f"{name}.png")
            Image.fromarray(picture.saliency).save(root / "Saliency" / f"{name}.png")
            _save_boxes(root / "Annotations" / f"{name}.xml", picture)
            captions[name] = _caption(picture)
        if split != "outside":
            (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    (root / "captions.json").write_text(json.dumps(captions, indent=1))


def _draw(split: str, number: int) -> Picture:
    rng = np.random.default_rng([_VERSION, _SPLITS.index(split), number])
    size = _SIZES[rng.integers(len(_SIZES))]
    main = number % len(CLASSES)
    if split == "outside":
        return draw_picture(rng, (), SCENES[main], size)
    count = 1 + int(rng.choice(3, p=(0.55, 0.33, 0.12)))
    classes = [main + 1, *(rng.choice(len(CLASSES), count - 1) + 1).tolist()]  # now and then the same class twice
    at_home = rng.random() < 0.6
    scene = SCENES[main if at_home else rng.integers(len(SCENES))]
    return draw_picture(rng, classes, scene, size)


def _save_photo(path: Path, picture: Picture) -> None:
    Image.fromarray(picture.image).save(path, quality=92)


def _save_boxes(path: Path, picture: Picture) -> None:
    height, width = picture.mask.shape
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = f"{path.stem}.jpg"
    extent = ElementTree.SubElement(root, "size")
    for tag, value in (("width", width), ("height", height), ("depth", 3)):
        ElementTree.SubElement(extent, tag).text = str(value)
    for index, visible in picture.objects:
        rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
        item = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(item, "name").text = CLASSES[index - 1]
        ElementTree.SubElement(item, "difficult").text = "0"
        box = ElementTree.SubElement(item, "bndbox")
        # VOC counts from 1 and includes the last pixel
        sides = (columns[0] + 1, rows[0] + 1, columns[-1] + 1, rows[-1] + 1)
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), sides, strict=True):
            ElementTree.SubElement(box, tag).text = str(value)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path)


def _caption(picture: Picture) -> str:
    things = [f"a {CLASSES[index - 1]}" for index in dict.fromkeys(index for index, _ in picture.objects)]
    together = " and ".join([", ".join(things[:-1]), things[-1]] if len(things) > 1 else things)
    return f"a photo of {together} {_PLACES[picture.scene]}"
