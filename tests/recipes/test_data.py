import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.pipeline.data import load_dataset
from recipes.pipeline.data.image_set import voc_palette
from recipes.pipeline.data.voc import VOC_CLASSES

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


def write_list(root: Path, name: str, names: str) -> None:
    path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n")


def half_mask(size: tuple[int, int], value: int) -> np.ndarray:
    mask = np.zeros(size, dtype=np.uint8)
    mask[:, : size[1] // 2] = value
    mask[:, size[1] // 2] = 255
    return mask


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


def test_classes_restrict_tags_and_masks_and_keep_voc_numbers(voc: Path) -> None:
    data = load_dataset(f"voc:{voc}", classes="cat,dog")
    assert data.classes == ("cat", "dog")
    assert data.palette_index == (0, 8, 12)
    assert (data.train, data.seed, data.val) == (("a", "b"), ("a",), ("v",))
    assert data.labels("a").tolist() == [1, 0]
    assert data.labels("b").tolist() == [0, 1]
    np.testing.assert_array_equal(data.mask("b"), half_mask(SIZES["b"], 2))
    assert set(np.unique(data.mask("c"))) == {0, 255}  # chair counts as background, 255 stays
    assert data.out_of_distribution == ("c",)
    assert any("1 images of the train list have no tag" in note for note in data.notes)


def test_image_set_survives_pickling(voc: Path) -> None:
    data = load_dataset(f"voc:{voc}")
    copy = pickle.loads(pickle.dumps(data))
    assert copy.train == data.train == ("a", "b", "c")
    np.testing.assert_array_equal(copy.mask("a"), data.mask("a"))
    assert copy.image("a").size == (30, 20)
    assert copy.size("a") == (20, 30)
