"""Data sets in the form of COCO."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.pipeline.data import load_dataset
from recipes.pipeline.data.coco import decode_runs, decode_segmentation
from tests.recipes.data.photos import write_photo

RUNS = [6, 2, 4, 2, 10]  # 4 x 6 pixels, down the columns


@pytest.fixture
def coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WSSS_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "coco"
    square = [[1, 1, 5, 1, 5, 3, 1, 3]]
    images = {
        "train": [
            (1, "000001", [(90, 0, 8.0, [1, 1, 4, 2], square), (1, 0, 2.0, [2, 2, 1, 1], [[2, 2, 3, 2, 3, 3, 2, 3]])]),
            (2, "000002", [(1, 1, 4.0, [1, 2, 3, 2], {"counts": RUNS, "size": [4, 6]})]),
            (3, "000003", []),
        ],
        "val": [(7, "000007", [(90, 0, 8.0, [1, 1, 4, 2], square)])],
    }
    for split, entries in images.items():
        content = {
            "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
            "images": [{"id": i, "file_name": f"{n}.jpg", "height": 4, "width": 6} for i, n, _ in entries],
            "annotations": [
                {"image_id": i, "category_id": c, "iscrowd": crowd, "area": area, "bbox": box, "segmentation": shape}
                for i, _, objects in entries
                for c, crowd, area, box, shape in objects
            ],
        }
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        for _, name, _ in entries:
            write_photo(root / f"{split}2017" / f"{name}.jpg", (4, 6))
    return root


def test_coco_paints_small_objects_on_top_and_crowds_as_ignore(coco: Path) -> None:
    data = load_dataset(f"coco:{coco}")
    assert data.classes == ("person", "toothbrush")
    assert (data.train, data.seed, data.val) == (("000001", "000002"), ("000001", "000002"), ("000007",))
    assert data.out_of_distribution == ("000003",)
    assert data.labels("000001").tolist() == [1, 1]
    expected = np.zeros((4, 6), dtype=np.uint8)
    expected[1:3, 1:5] = 2
    expected[2, 2] = 1
    np.testing.assert_array_equal(data.mask("000001"), expected)
    crowd = np.zeros((4, 6), dtype=np.uint8)
    crowd[2:4, 1] = crowd[0:2, 3] = 255
    np.testing.assert_array_equal(data.mask("000002"), crowd)
    np.testing.assert_array_equal(data.boxes("000001"), [[2, 1, 1, 5, 3], [1, 2, 2, 3, 3]])
    assert data.boxes("000002").shape == (0, 5)
    assert data.check() == 4
    again = pickle.loads(pickle.dumps(load_dataset(f"coco:{coco}")))
    np.testing.assert_array_equal(again.mask("000001"), expected)


def test_coco_classes_restrict_masks_boxes_and_crowds(coco: Path) -> None:
    data = load_dataset(f"coco:{coco}", classes="toothbrush")
    assert data.train == ("000001",)
    assert data.out_of_distribution == ("000002", "000003")
    assert data.palette_index == (0, 2)
    assert np.unique(data.mask("000001")).tolist() == [0, 1]
    assert data.mask("000001")[2, 2] == 0  # a person on top is background here
    assert not data.mask("000002").any()
    assert data.boxes("000001")[:, 0].tolist() == [1]


def test_coco_lists_and_mistakes(coco: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("000001\n")
    assert load_dataset(f"coco:{coco}", train_list=tmp_path / "few.txt").train == ("000001",)
    assert load_dataset(f"coco:{coco}", seed_list=tmp_path / "few.txt").seed == ("000001",)
    assert load_dataset(f"coco:{coco}", seed_list=tmp_path / "few.txt").notes == load_dataset(f"coco:{coco}").notes
    (tmp_path / "few.txt").write_text("000009\n")
    data = load_dataset(f"coco:{coco}", seed_list=tmp_path / "few.txt")
    assert data.seed == ()
    assert any("seed_list that are not in train: 1." in note for note in data.notes)
    with pytest.raises(ValueError, match=r"train_list: .* 1 image: 000009 not in the instance file"):
        load_dataset(f"coco:{coco}", train_list=tmp_path / "few.txt")
    with pytest.raises(ValueError, match=r"labels: coco: reads its tags from the instance files"):
        load_dataset(f"coco:{coco}", labels="tags.csv")
    with pytest.raises(
        ValueError, match=r"looked for annotations/instances_train2017.json \(or 2014\) in .*, there is"
    ):
        load_dataset(f"coco:{tmp_path}")
    (coco / "val2017" / "000007.jpg").unlink()
    with pytest.raises(ValueError, match=r"annotated, but not there: 1 photograph: .*000007.jpg"):
        load_dataset(f"coco:{coco}")
    (coco / "annotations" / "instances_val2017.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"instances_val2017.json is not a COCO instance file \(KeyError: 'categories'\)"
    ):
        load_dataset(f"coco:{coco}")


def pack(counts: list[int]) -> str:
    """COCO's run-length string, written from its definition."""
    text = ""
    for position, count in enumerate(counts):
        value = count - counts[position - 2] if position > 2 else count
        while True:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)
            text += chr(48 + (digit | (32 if more else 0)))
            if not more:
                break
    return text


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=12))
def test_packed_runs_equal_plain_runs(counts: list[int]) -> None:
    size = (1, sum(counts))
    plain = decode_segmentation({"counts": counts, "size": size}, size)
    np.testing.assert_array_equal(decode_segmentation({"counts": pack(counts), "size": size}, size), plain)
    assert plain.sum() == sum(counts[1::2])


def test_runs_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"runs of 3 pixels for an image of 2 x 2"):
        decode_runs([1, 2], (2, 2))


@pytest.mark.parametrize("sides", [3, 7, 40])
def test_polygons_cover_the_pixels_whose_centre_they_hold(sides: int) -> None:
    angles = np.linspace(0, 2 * np.pi, sides, endpoint=False) + 0.3
    corners = np.stack([25.3 + 19 * np.cos(angles), 20.6 + 14 * np.sin(angles)], axis=1)
    mask = decode_segmentation([corners.ravel().tolist()], (40, 50))
    y, x = np.mgrid[0:40, 0:50] + 0.5
    inside = np.ones((40, 50), dtype=bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, 0), strict=True):  # a convex polygon, clockwise
        inside &= (x2 - x1) * (y - y1) - (y2 - y1) * (x - x1) >= 0
    # two rasterisations may differ where an edge cuts a pixel near its centre
    assert (mask != inside).mean() < 0.01
    assert abs(int(mask.sum()) - int(inside.sum())) < 0.02 * inside.sum()
