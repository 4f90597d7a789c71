"""Data sets in the form of VOC: lists, masks, boxes, and what is said of mistakes."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.pipeline.data import load_dataset
from recipes.pipeline.data.image_set import voc_palette
from recipes.pipeline.data.voc import VOC_CLASSES
from tests.recipes.data.photos import SIZES, half_mask, write_list, write_mask, write_photo, write_xml


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


def test_two_photographs_of_one_name_are_refused(voc: Path) -> None:
    photo = next((voc / "JPEGImages").glob("v.*"))
    photo.with_suffix(".webp").write_bytes(photo.read_bytes())
    with pytest.raises(ValueError, match=r"JPEGImages: expected one file a name, got v\.\w+ and v\.\w+"):
        load_dataset(f"voc:{voc}")


def test_seed_images_that_are_not_in_train_are_said(voc: Path) -> None:
    write_list(voc, "few", "av")
    data = load_dataset(f"voc:{voc}", seed_list="few")
    assert data.seed == ("a",)
    assert data.notes == ("Images of seed_list that are not in train: 1.",)
    data = load_dataset(f"voc:{voc}", seed_list="val")
    assert data.seed == ()
    assert data.notes[1:] == ("No image of seed_list is left: seeds and pseudo masks are not measured.",)


def test_out_of_distribution_folder_takes_the_place_of_untagged_images(voc: Path, tmp_path: Path) -> None:
    write_photo(tmp_path / "else" / "JPEGImages" / "x.JPG", (9, 8))
    data = load_dataset(f"voc:{voc}", classes="cat", out_of_distribution=tmp_path / "else")
    assert data.out_of_distribution == ("ood__x",)
    assert data.image("ood__x").size == (8, 9)
    assert data.labels("ood__x").tolist() == [0]
    assert data.mask("ood__x") is None


def test_out_of_distribution_images_are_not_of_train_or_val(voc: Path) -> None:
    with pytest.raises(
        ValueError, match=r"out_of_distribution: expected .*, got 2 images of train or val of voc:.*a.jpg, .*v.jpg$"
    ):
        load_dataset(f"voc:{voc}", classes="cat", out_of_distribution=voc)


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
    for size in ("3+1", "6+0"):
        with pytest.raises(ValueError, match=rf"expected demo, demo:tiny .* and 1 in val; got demo:{re.escape(size)}"):
            load_dataset(f"demo:{size}")


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


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("image_labels.json", "{", r'labels: .*image_labels.json is not JSON \(.*\); expected \{"a": \["cat", '),
        ("image_labels.json", "[1]", r"labels: .*image_labels.json: expected .*, got a list"),
        ("image_labels.json", '{"classes": [], "labels": {}}', r"image_labels.json: expected the names .*, got \[\]"),
        ("captions.json", "{", r'data: .*captions.json is not JSON \(.*\); expected \{"NAME": "a sentence", '),
        ("captions.json", '["a"]', r"data: .*captions.json: expected .*, got a list"),
        ("captions.json", '{"a": "a cat", "b": ["a dog"]}', r"expected .*, got \['a dog'\] for 'b'"),
    ],
)
def test_broken_json_files_are_named(voc: Path, file: str, content: str, message: str) -> None:
    (voc / file).write_text(content)
    with pytest.raises(ValueError, match=message):
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
