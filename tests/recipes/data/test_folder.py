"""Folders of photographs."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.pipeline.data import load_dataset
from tests.recipes.data.photos import half_mask, write_mask, write_photo


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for path in ("one.JPG", "beach 2024/IMG (3).jpeg", "beach 2024/two.webp", "deep/er/three.bmp", "four.png"):
        write_photo(root / path, (12, 16))
    write_photo(root / ".hidden" / "x.jpg", (5, 5))
    (root / "tags.csv").write_text(
        "name,tags\none.JPG,cat\nbeach 2024/IMG (3),dog cat\ntwo.webp,dog\ndeep\\er\\three.bmp,\n./four.png,cat\n"
    )
    return root


def test_a_folder_needs_only_tags(photos: Path) -> None:
    data = load_dataset(f"folder:{photos}", labels=photos / "tags.csv")
    assert data.classes == ("cat", "dog")
    assert data.train == ("beach_2024__IMG__3_", "beach_2024__two", "four", "one")
    assert data.out_of_distribution == ("deep__er__three",)
    assert data.val == data.seed == ()
    assert data.mask("one") is None
    assert data.boxes("one") is data.saliency("one") is data.caption("one") is None
    assert data.labels("beach_2024__IMG__3_").tolist() == [1, 1]
    assert data.image("beach_2024__two").size == (16, 12)
    assert data.check() == 5


def test_folder_masks_make_seed_and_val_measurable(photos: Path) -> None:
    write_mask(photos / "masks" / "beach 2024" / "two.png", half_mask((12, 16), 2))
    write_mask(photos / "masks" / "one.png", half_mask((12, 16), 1))
    (photos / "val.txt").write_text("one.JPG\nfour\n")
    data = load_dataset(f"folder:{photos}", labels=photos / "tags.csv", val_list=photos / "val.txt", classes="dog")
    assert data.train == ("beach_2024__IMG__3_", "beach_2024__two")
    assert data.seed == ("beach_2024__two",)
    assert data.val == ("one", "four")
    assert data.palette_index == (0, 2)
    np.testing.assert_array_equal(data.mask("beach_2024__two"), half_mask((12, 16), 1))
    assert set(np.unique(data.mask("one"))) == {0, 255}
    assert data.mask("four") is None


def test_seed_images_without_a_mask_or_outside_train_are_said(photos: Path) -> None:
    (photos / "seed.txt").write_text("one.JPG\ntwo\nfour\n")
    (photos / "val.txt").write_text("four\n")
    options = {"labels": photos / "tags.csv", "val_list": photos / "val.txt", "seed_list": photos / "seed.txt"}
    data = load_dataset(f"folder:{photos}", **options)
    assert "There are no masks: nothing is measured." in data.notes
    assert not any("seed_list" in note for note in data.notes)
    write_mask(photos / "masks" / "one.png", half_mask((12, 16), 1))
    data = load_dataset(f"folder:{photos}", **options)
    assert data.seed == ("one",)
    notes = ("Images of seed_list that are not in train: 1.", "Images of seed_list that have no mask: 1.")
    assert data.notes[-2:] == notes


def test_photographs_in_train_and_val_are_warned_about(photos: Path) -> None:
    (photos / "train.txt").write_text("one.JPG\nfour\n")
    (photos / "val.txt").write_text("one\ntwo.webp\n")
    lists = {"train_list": photos / "train.txt", "val_list": photos / "val.txt"}
    with pytest.warns(UserWarning, match="folder:.*photos: 1 image: one both in train and in val") as caught:
        load_dataset(f"folder:{photos}", labels=photos / "tags.csv", **lists)
    assert caught[0].filename == __file__


def test_folder_masks_may_lie_elsewhere(photos: Path, tmp_path: Path) -> None:
    write_mask(tmp_path / "truth" / "one.png", half_mask((12, 16), 1))
    data = load_dataset(f"folder:{photos}", labels=photos / "tags.csv", masks=tmp_path / "truth")
    assert data.seed == ("one",)
    write_mask(tmp_path / "truth" / "none.png", half_mask((12, 16), 1))
    with pytest.raises(ValueError, match=r"none.png belongs to no photograph"):
        load_dataset(f"folder:{photos}", labels=photos / "tags.csv", masks=tmp_path / "truth")
    with pytest.raises(ValueError, match=r"masks: no folder"):
        load_dataset(f"folder:{photos}", labels=photos / "tags.csv", masks=tmp_path / "nowhere")


@pytest.mark.parametrize(("on_disk", "written"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_letters_with_marks_are_the_same_however_they_are_kept(tmp_path: Path, on_disk: str, written: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / unicodedata.normalize(on_disk, "köln.jpg"))
    (tmp_path / "tags.csv").write_text(unicodedata.normalize(written, "name,tags\nköln.jpg,tower\n"))
    data = load_dataset(f"folder:{tmp_path}", labels=tmp_path / "tags.csv")
    assert [data.tags[name] for name in data.train] == [(1,)]


def test_folder_tags_and_photographs_must_match(photos: Path) -> None:
    rows = "".join(f"missing{i},cat\n" for i in range(7))
    (photos / "tags.csv").write_text(f"name,tags\none.JPG,cat\ntwo,dog\nfour.png,cat\n{rows}")
    message = (
        r"7 rows: missing0, missing1, missing2, missing3, missing4 and 2 more without a photograph in .*; "
        r"2 photographs: beach 2024/IMG \(3\).jpeg, deep/er/three.bmp without a row"
    )
    with pytest.raises(ValueError, match=message):
        load_dataset(f"folder:{photos}", labels=photos / "tags.csv")


def test_folder_mistakes_are_explained(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"labels: folder:.* needs a tags file, such as .*tags.csv"):
        load_dataset(f"folder:{photos}")
    with pytest.raises(ValueError, match=r"data: no folder"):
        load_dataset(f"folder:{tmp_path}/nowhere", labels=photos / "tags.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no photographs \(.jpg, .*\) in .*empty"):
        load_dataset(f"folder:{tmp_path}/empty", labels=photos / "tags.csv")
    with pytest.raises(ValueError, match=r"classes: no class 'cart'; did you mean 'cat'"):
        load_dataset(f"folder:{photos}", labels=photos / "tags.csv", classes="cart")
    (photos / "val.txt").write_text("five\n")
    with pytest.raises(ValueError, match=r"val_list: .* 1 line: five without a photograph"):
        load_dataset(f"folder:{photos}", labels=photos / "tags.csv", val_list=photos / "val.txt")
    with pytest.raises(ValueError, match=r"train_list: no file"):
        load_dataset(f"folder:{photos}", labels=photos / "tags.csv", train_list="nowhere.txt")
    (photos / "tags.csv").write_text("name,tags\none.JPG,cat\none,dog\n")
    with pytest.raises(ValueError, match=r"1 name: one.JPG given more than once"):
        load_dataset(f"folder:{photos}", labels=photos / "tags.csv")


@pytest.mark.parametrize("twin", ["one.png", "ONE.jpg", "deep__er/three.png"])
def test_photographs_that_would_share_a_name_are_refused(photos: Path, twin: str) -> None:
    write_photo(photos / twin, (5, 5))
    with pytest.raises(ValueError, match=r"same name for a run's files: 1 clash: .* and "):
        load_dataset(f"folder:{photos}", labels=photos / "tags.csv")
