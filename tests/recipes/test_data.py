import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from recipes.pipeline.data import load_dataset
from recipes.pipeline.data.coco import decode_runs, decode_segmentation
from recipes.pipeline.data.image_set import voc_palette
from recipes.pipeline.data.tags import read_tags
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


def write_list(root: Path, name: str, names: Sequence[str]) -> None:
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
    assert any("having no tag of these classes: 1." in note for note in data.notes)


def test_image_set_survives_pickling(voc: Path) -> None:
    data = load_dataset(f"voc:{voc}")
    copy = pickle.loads(pickle.dumps(data))
    assert copy.train == data.train == ("a", "b", "c")
    np.testing.assert_array_equal(copy.mask("a"), data.mask("a"))
    assert copy.image("a").size == (30, 20)
    assert copy.size("a") == (20, 30)


# VOC


def write_xml(path: Path, objects: list[tuple[str, tuple[int, int, int, int], int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    items = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, (x1, y1, x2, y2), difficult in objects
    )
    path.write_text(f"<annotation>{items}</annotation>")


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


def test_train_is_every_augmented_mask_outside_val(real_voc: Path) -> None:
    data = load_dataset(f"voc:{real_voc}")
    assert (data.train, data.seed, data.val) == (("a", "b", "c"), ("a",), ("v",))
    assert data.classes == VOC_CLASSES
    assert data.palette_index == tuple(range(21))
    assert data.check() == 4


def test_a_train_aug_list_is_preferred_to_the_masks(real_voc: Path) -> None:
    write_list(real_voc, "train_aug", "ba")
    assert load_dataset(f"voc:{real_voc}").train == ("b", "a")


@pytest.mark.parametrize("as_path", [False, True], ids=["name", "path"])
def test_lists_are_given_by_name_or_path(real_voc: Path, as_path: bool) -> None:
    (real_voc / "ImageSets/Segmentation/few.txt").write_text("/JPEGImages/c.jpg /SegmentationClassAug/c.png\n\n")
    few = str(real_voc / "ImageSets/Segmentation/few.txt") if as_path else "few"
    data = load_dataset(f"voc:{real_voc}", train_list=few)
    assert data.train == ("c",)
    assert data.seed == ()
    assert any("No hand-made masks" in note for note in data.notes)


def test_hand_made_masks_come_before_augmented_ones(real_voc: Path) -> None:
    other = half_mask(SIZES["a"], 3)
    Image.fromarray(other).save(real_voc / "SegmentationClassAug" / "a.png")
    np.testing.assert_array_equal(load_dataset(f"voc:{real_voc}").mask("a"), half_mask(SIZES["a"], 8))


def test_difficult_objects_are_tags_and_parts_are_not(real_voc: Path) -> None:
    data = load_dataset(f"voc:{real_voc}", classes="chair,cat")
    assert data.labels("a").tolist() == [1, 1]


def test_boxes_are_half_open_and_clipped(real_voc: Path) -> None:
    data = load_dataset(f"voc:{real_voc}", classes="chair,cat")
    expected = np.array([[2, 0, 0, 30, 20], [1, 3, 4, 9, 20]], dtype=np.float32)
    np.testing.assert_array_equal(data.boxes("a"), expected)
    assert data.boxes("b").shape == (0, 5)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_masks_are_read_in_every_usual_form(real_voc: Path, mode: str) -> None:
    mask = half_mask(SIZES["a"], 8)
    image = Image.fromarray(mask)
    if mode != "L":
        image.putpalette(voc_palette().tobytes())
    image.convert(mode).save(real_voc / "SegmentationClass" / "a.png")
    np.testing.assert_array_equal(load_dataset(f"voc:{real_voc}").mask("a"), mask)


def test_masks_tell_the_tags_only_aloud(voc: Path) -> None:
    (voc / "image_labels.json").unlink()
    with pytest.warns(UserWarning, match="image tags are read off the ground-truth masks"):
        data = load_dataset(f"voc:{voc}", classes="cat,dog,chair")
    assert data.labels("a").tolist() == [1, 0, 0]
    assert any("read off" in note for note in data.notes)


def test_val_without_any_mask_is_said(voc: Path) -> None:
    (voc / "SegmentationClass" / "v.png").unlink()
    data = load_dataset(f"voc:{voc}")
    assert data.mask("v") is None
    assert any("not measured" in note for note in data.notes)


def test_out_of_distribution_folder_takes_the_place_of_untagged_images(voc: Path, tmp_path: Path) -> None:
    write_photo(tmp_path / "else" / "JPEGImages" / "x.JPG", (9, 8))
    data = load_dataset(f"voc:{voc}", classes="cat", out_of_distribution=tmp_path / "else")
    assert data.out_of_distribution == ("ood__x",)
    assert data.image("ood__x").size == (8, 9)
    assert data.labels("ood__x").tolist() == [0]
    assert data.mask("ood__x") is None


def test_images_in_train_and_val_are_warned_about(voc: Path) -> None:
    with pytest.warns(UserWarning, match="2 images: a, c both in train and in val"):
        load_dataset(f"voc:{voc}", val_list="train_official", train_list="train").check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": "cat,dgo"}, r"classes: no class 'dgo'; did you mean 'dog'\?"),
        ({"classes": "zebra"}, r"classes: no class 'zebra'; there are aeroplane, "),
        ({"classes": ","}, r"classes: expected at least one name, got ','"),
        ({"classes": "cat,cat"}, r"classes: 1 name: cat given more than once"),
        ({"classes": "bus"}, r"no image of the train list is tagged with any of bus"),
        ({"train_list": "trian"}, r"train_list: looked for trian, .*did you mean 'train'\?"),
        ({"seed_list": "none"}, r"seed_list: looked for none, .*has train.txt, train_official.txt, val.txt"),
        ({"labels": "tags.txt"}, r"labels: no file tags.txt"),
        ({"out_of_distribution": "nowhere"}, r"out_of_distribution: no photographs in "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_explained(voc: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset(f"voc:{voc}", **options)


def test_wrong_specifications_are_explained(voc: Path) -> None:
    with pytest.raises(ValueError, match=r"expected demo, voc:PATH, .* got 'imagenet'"):
        load_dataset("imagenet")
    with pytest.raises(ValueError, match=r"did you mean folder:"):
        load_dataset(str(voc))
    with pytest.raises(ValueError, match=r"data: no folder .*nowhere"):
        load_dataset(f"voc:{voc}/nowhere")
    with pytest.raises(
        ValueError, match=r"looked for JPEGImages/ in .*, there is VOC2012/; did you mean voc:.*VOC2012\?"
    ):
        load_dataset(f"voc:{voc.parent}")
    with pytest.raises(ValueError, match=r"expected demo, demo:tiny or demo:TRAIN\+VAL.*got demo:3\+1"):
        load_dataset("demo:3+1")


def test_missing_lists_photographs_and_masks_are_listed(voc: Path) -> None:
    (voc / "SegmentationClass" / "c.png").unlink()
    with pytest.raises(ValueError, match=r"SegmentationClass lacks 1 mask of the seed list: c$"):
        load_dataset(f"voc:{voc}")
    write_list(voc, "train", [*"abc", *"uwxyz", "last"])
    with pytest.raises(ValueError, match=r"JPEGImages lacks 6 images of the train list: u, w, x, y, z and 1 more"):
        load_dataset(f"voc:{voc}")
    (voc / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(ValueError, match=r"val_list: looked for .*val.txt; .* has train.txt, train_official.txt"):
        load_dataset(f"voc:{voc}")


def test_images_without_tags_are_listed(voc: Path, real_voc: Path, tmp_path: Path) -> None:
    (tmp_path / "tags.csv").write_text("name,tags\na,cat\n")
    with pytest.raises(ValueError, match=r"labels: .*tags.csv has no row for 2 images of the train list: b, c$"):
        load_dataset(f"voc:{voc}", labels=tmp_path / "tags.csv")
    (voc / "image_labels.json").unlink()
    (voc / "Annotations" / "b.xml").unlink()
    with pytest.raises(ValueError, match=r"Annotations lacks the XML of 1 image of the train list: b$"):
        load_dataset(f"voc:{voc}")


def test_unknown_classes_in_annotations_are_named(real_voc: Path) -> None:
    write_xml(real_voc / "Annotations" / "b.xml", [("hourse", (1, 1, 2, 2), 0)])
    with pytest.raises(ValueError, match=r"b.xml: unknown class 'hourse'; did you mean 'horse'\?"):
        load_dataset(f"voc:{real_voc}")
    (real_voc / "Annotations" / "b.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"b.xml: not a VOC annotation"):
        load_dataset(f"voc:{real_voc}")


def test_wrong_mask_values_and_colours_are_named(real_voc: Path) -> None:
    data = load_dataset(f"voc:{real_voc}")
    Image.fromarray(half_mask(SIZES["a"], 37)).save(real_voc / "SegmentationClass" / "a.png")
    with pytest.raises(ValueError, match=r"a.png: expected values 0..20 or 255, found 37"):
        data.mask("a")
    Image.fromarray(np.full((*SIZES["a"], 3), (1, 2, 3), dtype=np.uint8)).save(real_voc / "SegmentationClass" / "a.png")
    with pytest.raises(ValueError, match=r"colour \(1, 2, 3\), which is not in the VOC palette"):
        data.mask("a")
    Image.fromarray(np.zeros(SIZES["a"], dtype=np.uint8)).convert("LA").save(real_voc / "SegmentationClass" / "a.png")
    with pytest.raises(ValueError, match=r"expected a PNG of class indices .* got mode LA"):
        data.mask("a")


def test_a_wrong_name_gets_a_suggestion(voc: Path) -> None:
    data = load_dataset("voc:" + str(voc))
    with pytest.raises(KeyError, match="has no image 'bb'"):
        data.image("bb")
    with pytest.raises(KeyError, match="has no image 'bb'"):
        data.labels("bb")


def test_check_reports_broken_files(voc: Path) -> None:
    whole = (voc / "JPEGImages" / "a.jpg").read_bytes()
    (voc / "JPEGImages" / "a.jpg").write_bytes(whole[:-200])
    (voc / "JPEGImages" / "b.jpg").write_bytes(b"no photograph")
    write_mask(voc / "SegmentationClass" / "v.png", np.zeros((4, 5)))
    data = load_dataset(f"voc:{voc}")
    with pytest.raises(ValueError, match=r"3 broken images: ") as caught:
        data.check()
    for part in ("a.jpg: ", "truncated", "b.jpg: cannot be read as a photograph", "mask of v: 5 x 4 pixels, its photo"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=r"a.jpg: cannot be read as a photograph \(.*truncated"):
        data.image("a")
    with pytest.raises(ValueError, match=r"mask of v: 5 x 4 pixels, its photograph is 21 x 19$"):
        data.mask("v")


# Orientation


def write_turned(path: Path, size: tuple[int, int], orientation: int, **options: object) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    write_photo(path, size, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_orientation_is_applied_as_pillow_does(voc: Path, orientation: int, suffix: str) -> None:
    (voc / "JPEGImages" / "a.jpg").unlink()
    path = voc / "JPEGImages" / f"a.{suffix}"
    write_turned(path, SIZES["a"], orientation)
    data = load_dataset(f"voc:{voc}")
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(data.image("a")), expected)
    assert data.size("a") == expected.shape[:2]


def test_a_mask_of_the_unturned_photograph_is_refused(voc: Path) -> None:
    write_turned(voc / "JPEGImages" / "a.jpg", SIZES["a"], 6)
    data = load_dataset(f"voc:{voc}")
    with pytest.raises(ValueError, match=r"mask of a: 30 x 20 pixels, its photograph is 20 x 30 after its EXIF orient"):
        data.mask("a")
    write_mask(voc / "SegmentationClass" / "a.png", half_mask((30, 20), 8))
    assert data.mask("a").shape == data.size("a") == (30, 20)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_of_photograph_becomes_rgb(voc: Path, mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    (voc / "JPEGImages" / "a.jpg").unlink()
    with Image.open(voc / "JPEGImages" / "b.jpg") as photo:
        options = {"transparency": bytes(range(256))} if mode == "P" else {}
        photo.convert(mode).save(voc / "JPEGImages" / f"a.{suffix}", **options)
    image = load_dataset(f"voc:{voc}").image("a")
    assert image.mode == "RGB"
    assert image.size == (18, 24)


# Tags


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name,tags\na,cat dog\nb,\nc,dog\n", {"a": ("cat", "dog"), "b": (), "c": ("dog",)}),
        ("file,tags\na,traffic light;cat\nb,cat\n", {"a": ("cat", "traffic light"), "b": ("cat",)}),
        ("image,tag\na,cat|dog\n", {"a": ("cat", "dog")}),
        ("name,tag,tag\na,traffic light,cat\nb,cat\n", {"a": ("cat", "traffic light"), "b": ("cat",)}),
        ("\ufeffName,dog,cat\r\na,1,0\r\nb,1,1\r\n", {"a": ("dog",), "b": ("dog", "cat")}),
        ('name,tags\n"a, b",cat\n', {"a, b": ("cat",)}),
    ],
    ids=["spaces", "semicolons", "bars", "cells", "table", "quoted"],
)
def test_csv_tags_are_read(tmp_path: Path, text: str, expected: dict[str, tuple[str, ...]]) -> None:
    path = tmp_path / "tags.csv"
    path.write_text(text, encoding="utf-8")
    tags = read_tags(path)
    assert {name: tuple(tags.classes[i - 1] for i in indices) for name, indices in tags.of.items()} == expected


def test_class_order_is_the_columns_or_the_alphabet(tmp_path: Path) -> None:
    path = tmp_path / "tags.csv"
    path.write_text("name,dog,cat\na,1,0\n")
    assert read_tags(path).classes == ("dog", "cat")
    path.write_text("name,tags\na,dog\nb,cat\n")
    assert read_tags(path).classes == ("cat", "dog")


def test_json_and_npz_tags_agree_with_csv(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("name,cat,dog\na,1,1\nb,0,1\n")
    (tmp_path / "t.json").write_text('{"a": ["dog", "cat"], "b": ["dog"]}')
    (tmp_path / "i.json").write_text('{"classes": ["cat", "dog"], "labels": {"a": [0, 1], "b": {"tags": [1]}}}')
    labels = np.array([[1, 1], [0, 1]], dtype=np.uint8)
    np.savez(tmp_path / "t.npz", names=np.array(["a", "b"]), labels=labels, classes=np.array(["cat", "dog"]))
    expected = read_tags(tmp_path / "t.csv")
    for name in ("t.json", "i.json", "t.npz"):
        assert read_tags(tmp_path / name) == expected


def test_npz_columns_follow_the_data_set(real_voc: Path, tmp_path: Path) -> None:
    labels = np.zeros((3, 20), dtype=np.uint8)
    labels[[0, 1, 2], [7, 11, 8]] = 1
    np.savez(tmp_path / "cls_labels.npz", names=np.array(["a", "b", "c"]), labels=labels)
    data = load_dataset(f"voc:{real_voc}", labels=tmp_path / "cls_labels.npz", classes="cat,dog,chair")
    assert [data.labels(name).tolist() for name in "abc"] == np.eye(3).tolist()
    assert data.labels("v").tolist() == [1, 0, 0]
    assert any("val whose tags were read off their masks, if they have any: 1." in note for note in data.notes)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("t.csv", "", r"t.csv is empty; expected a header name,tags"),
        ("t.csv", "name,tags\n", r"t.csv has a header and no image"),
        ("t.csv", "a.jpg,cat\n", r"must begin with a header: .* its first line is 'a.jpg,cat'"),
        ("t.csv", "name\na\n", r"must begin with a header"),
        ("t.csv", "name,tags\na,\nb,\n", r"no image has a tag"),
        ("t.csv", "name,tags\na,cat\na,dog\n", r"1 name: a given more than once"),
        ("t.csv", "name,cat,dog\na,1,0\nb,1\n", r"1 row: b without 3 cells"),
        ("t.json", "{", r"t.json is not JSON"),
        ("t.json", "[]", r'expected \{"a": \["cat", \.\.\.\]\}'),
        ("t.json", '{"a": "cat"}', r"the entry of 'a' is not a list"),
        ("t.json", '{"classes": ["cat"], "labels": {"a": [1]}}', r"tag 1 of 'a' is not a class name or an index"),
        ("t.npy", "", r"is a pickle, which can run code .* np.savez\('x.npz'"),
        ("t.npz", "zip", r"t.npz cannot be read as plain arrays"),
        ("t.xlsx", "", r"expected a .csv, .json or .npz file"),
    ],
)
def test_malformed_tags_are_explained(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_tags(tmp_path / file)


def test_unknown_tags_and_wrong_arrays_are_explained(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("name,tags\na,hose\n")
    with pytest.raises(ValueError, match=r"1 unknown tag: 'hose' of a; did you mean 'horse'\?"):
        read_tags(tmp_path / "t.csv", VOC_CLASSES)
    with pytest.raises(ValueError, match=r"labels: no file .*t.cvs; did you mean 't.csv'\?"):
        read_tags(tmp_path / "t.cvs")
    np.savez(tmp_path / "t.npz", names=np.array(["a"]), labels=np.ones((1, 3)))
    with pytest.raises(ValueError, match=r"expected labels of shape \(1, 20\), got \(1, 3\)"):
        read_tags(tmp_path / "t.npz", VOC_CLASSES)
    with pytest.raises(ValueError, match=r'no array "classes" to name the columns'):
        read_tags(tmp_path / "t.npz")
    np.savez(tmp_path / "t.npz", labels=np.ones((1, 3)))
    with pytest.raises(ValueError, match=r'expected arrays "names" and "labels", found \[\'labels\'\]'):
        read_tags(tmp_path / "t.npz")


# Folder


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
    assert data.boxes("one") is data.saliency("one") is data.captions("one") is None
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


def test_folder_masks_may_lie_elsewhere(photos: Path, tmp_path: Path) -> None:
    write_mask(tmp_path / "truth" / "one.png", half_mask((12, 16), 1))
    data = load_dataset(f"folder:{photos}", labels=photos / "tags.csv", masks=tmp_path / "truth")
    assert data.seed == ("one",)
    write_mask(tmp_path / "truth" / "none.png", half_mask((12, 16), 1))
    with pytest.raises(ValueError, match=r"none.png belongs to no photograph"):
        load_dataset(f"folder:{photos}", labels=photos / "tags.csv", masks=tmp_path / "truth")
    with pytest.raises(ValueError, match=r"masks: no folder"):
        load_dataset(f"folder:{photos}", labels=photos / "tags.csv", masks=tmp_path / "nowhere")


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


# COCO

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
    (tmp_path / "few.txt").write_text("000009\n")
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
