"""Small data sets in the form of VOC."""

import json
from pathlib import Path

import pytest
from PIL import Image

from recipes.pipeline.data.voc import VOC_CLASSES
from tests.recipes.data.photos import SIZES, half_mask, write_list, write_mask, write_photo, write_xml


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """A folder like voc12_animals: a and c hand-made, b from SBD; cat 8, dog 12, chair 9."""
    root = tmp_path / "VOC2012"
    for name, value in {"a": 8, "b": 12, "c": 9, "v": 8}.items():
        write_photo(root / "JPEGImages" / f"{name}.jpg", SIZES[name])
        write_mask(root / "SegmentationClass" / f"{name}.png", half_mask(SIZES[name], value))
    write_list(root, "train", "abc")
    write_list(root, "train_official", "ac")
    write_list(root, "val", "v")
    labels = {"a": {"xml": [8, 9], "mask": [8]}, "b": {"xml": [12]}, "c": {"xml": [9]}, "v": {"xml": [8]}}
    classes = ["background", *VOC_CLASSES[:12]]
    (root / "image_labels.json").write_text(json.dumps({"classes": classes, "labels": labels}))
    return root


@pytest.fixture
def real_voc(tmp_path: Path) -> Path:
    """As VOC2012 is: XMLs, hand-made masks of a and v, augmented ones (grey) of all, official train = a."""
    root = tmp_path / "VOC2012"
    for name, value in {"a": 8, "b": 12, "c": 9, "v": 8}.items():
        write_photo(root / "JPEGImages" / f"{name}.jpg", SIZES[name])
        grey = root / "SegmentationClassAug" / f"{name}.png"
        grey.parent.mkdir(exist_ok=True)
        Image.fromarray(half_mask(SIZES[name], value)).save(grey)
        write_xml(root / "Annotations" / f"{name}.xml", [(VOC_CLASSES[value - 1], (2, 3, 9, 11), 0)])
    write_xml(root / "Annotations" / "a.xml", [("cat", (1, 1, 30, 20), 0), ("chair", (4, 5, 9, 40), 1)])
    for name in "av":
        write_mask(root / "SegmentationClass" / f"{name}.png", half_mask(SIZES[name], 8))
    write_list(root, "train", "a")
    write_list(root, "val", "v")
    return root
