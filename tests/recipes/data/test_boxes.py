"""Boxes of a data set, from its annotations or from its masks, and crops with them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from recipes import bana, bbam
from recipes.pipeline.data import ImageSet, load_dataset
from recipes.pipeline.data.boxes import BoxedCrops, Boxes, boxes_for, boxes_of_mask, flat_boxes, read_boxes
from recipes.pipeline.run import start
from recipes.pipeline.training import crop_transform
from tests.recipes.synthetic import make_dataset


@pytest.fixture(scope="module")
def demo() -> ImageSet:
    return load_dataset("demo:tiny")


def test_boxes_come_from_the_annotations_and_say_so(demo: ImageSet) -> None:
    boxes = read_boxes(demo, demo.train, optional=demo.val)
    assert set(boxes.of) == {*demo.train, *demo.val}
    for name in demo.train:
        assert np.array_equal(boxes.of[name], demo.boxes(name))
    assert boxes.most == max(len(rows) for rows in boxes.of.values())
    assert "masks" not in boxes.supervision


def test_boxes_made_from_masks_are_asked_for_by_name_and_say_so(demo: ImageSet) -> None:
    boxes = read_boxes(demo, demo.train, "components_of_masks")
    assert "masks" in boxes.supervision
    assert boxes.supervision in boxes.noted_in(demo).notes[-1]
    for name in demo.train:
        mask = demo.mask(name)
        covered = np.zeros(mask.shape, dtype=bool)
        for index, x1, y1, x2, y2 in boxes.of[name].astype(int):
            inside = mask[y1:y2, x1:x2] == index
            assert inside.any(0)[[0, -1]].all()
            assert inside.any(1)[[0, -1]].all()
            covered[y1:y2, x1:x2] |= inside
        objects = (mask > 0) & (mask != 255)
        assert covered[objects].mean() > 0.98  # crumbs are left out


def test_components_are_objects_and_crumbs_are_not() -> None:
    mask = np.zeros((50, 60), dtype=np.uint8)
    mask[2:20, 3:10], mask[30:45, 3:30], mask[5:9, 40:60] = 1, 1, 2
    mask[48, 50], mask[10:12, 50:52] = 1, 255
    assert boxes_of_mask(mask).tolist() == [[1, 3, 2, 10, 20], [1, 3, 30, 30, 45], [2, 40, 5, 60, 9]]
    mask[:] = 0
    mask[7, 7] = 3
    assert boxes_of_mask(mask).tolist() == [[3, 7, 7, 8, 8]], "the only part of a class stays"
    assert boxes_of_mask(np.zeros((4, 4), np.uint8)).shape == (0, 5)
    assert boxes_of_mask(None) is None


def test_missing_boxes_are_told_with_what_to_do(tmp_path: Path) -> None:
    photos = make_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"boxes: synthetic comes without boxes for 8 images: photo 00.* and 3 more"):
        read_boxes(photos, photos.train)
    with pytest.raises(ValueError, match=r"--boxes components_of_masks"):
        read_boxes(photos, photos.train)
    found = read_boxes(photos, photos.train, "components_of_masks", optional=photos.val)
    assert set(found.of) == {*photos.train, *photos.val}
    with pytest.raises(ValueError, match=r"boxes: expected annotations or components_of_masks, got 'masks'"):
        read_boxes(photos, photos.train, "masks")
    bare = make_dataset(tmp_path / "bare", masks=False)
    with pytest.raises(ValueError, match=r"has no mask to make boxes from for 8 images"):
        read_boxes(bare, bare.train, "components_of_masks")


def test_a_box_outside_its_image_is_told(tmp_path: Path) -> None:
    photos = make_dataset(tmp_path)

    class Wrong:
        def boxes(self, name: str) -> np.ndarray:
            return np.array([[1, 70, 2, 90, 9]], dtype=np.float32)

    broken = replace(photos, annotations=Wrong())
    with pytest.raises(ValueError, match=r"boxes: 8 images: boxes of photo 00: a box has no area inside the 64 x 40"):
        read_boxes(broken, broken.train)


@pytest.mark.parametrize("recipe", [bana, bbam])
def test_recipes_ask_for_boxes_before_anything_is_trained(
    recipe: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(recipe.PRESETS["tiny"], out=tmp_path / "run", accelerator="cpu")
    monkeypatch.setattr(ImageSet, "boxes", lambda self, name: None)
    with pytest.raises(ValueError, match=r"boxes: demo:tiny comes without boxes for 16 images"):
        recipe.main(config)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_says_where_its_boxes_come_from(tmp_path: Path) -> None:
    run = start("bana", replace(bana.PRESETS["tiny"], out=tmp_path, accelerator="cpu"))
    boxes = boxes_for(run, "components_of_masks")
    assert set(run.train) <= set(boxes.of)
    assert run.metrics["supervision"] == boxes.supervision
    assert boxes.supervision in run.dataset.notes[-1]


class Mirror(v2.Transform):
    """Mirrors always."""

    def transform(self, inpt: object, params: dict) -> object:
        return v2.functional.horizontal_flip(inpt)


def test_boxes_go_where_their_pixels_go(tmp_path: Path) -> None:
    photos = make_dataset(tmp_path)
    boxes = read_boxes(photos, photos.train, "components_of_masks")
    crops = BoxedCrops(photos, photos.train, boxes, v2.Compose([Mirror(), v2.ToDtype(torch.float32)]))
    item = crops[2]
    (index, x1, y1, x2, y2), width = boxes.of[photos.train[2]][0], item["image"].shape[2]
    assert item["boxes"][0].tolist() == [index, width - x2, y1, width - x1, y2]
    assert item["inside"].all()


def test_boxes_are_cut_dropped_and_padded_with_their_crop(tmp_path: Path) -> None:
    photos = make_dataset(tmp_path)
    name = photos.train[0]  # 40 x 64
    rows = np.array([[1, 0, 0, 64, 40], [2, 10, 10, 11, 30]], dtype=np.float32)
    boxes = Boxes("annotations", {name: rows})
    transform = crop_transform(v2.Identity(), 96, (0.0,) * 3, (1.0,) * 3, mask_fill=0)
    item = BoxedCrops(photos, [name], boxes, transform)[0]
    assert item["boxes"].shape == (2, 5)
    assert not item["boxes"][1].any(), "a box of one column is dropped"
    assert item["inside"].sum() == 40 * 64
    index, x1, y1, x2, y2 = item["boxes"][0].int().tolist()
    assert index == 1
    assert item["inside"][0, y1:y2, x1:x2].all()
    assert (x2 - x1) * (y2 - y1) == 40 * 64
    stacked = torch.stack([item["boxes"], torch.zeros(2, 5)])
    found, classes = flat_boxes(stacked.flip(0))
    assert found.tolist() == [[1, x1, y1, x2, y2]]
    assert classes.tolist() == [1]
