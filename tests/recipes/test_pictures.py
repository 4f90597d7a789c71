from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recipes.pipeline import pictures
from recipes.pipeline.pictures import (
    CONFUSED,
    FALSE_FOREGROUND,
    MISSED,
    Example,
    cam_overlay,
    class_colours,
    error_map,
    fit_within,
    mask_overlay,
    picture,
    resize_cam,
    resize_mask,
)

IMAGE = np.full((8, 8, 3), 100, np.uint8)


def rgb(code: str) -> np.ndarray:
    return np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)])


def test_error_map_gives_each_mistake_its_colour():
    truth = np.array([[0, 0, 1, 1, 2, 2, 255, 255]], np.uint8)
    guess = np.array([[0, 1, 0, 1, 1, 255, 1, 0]], np.uint8)
    shown = error_map(np.full((1, 8, 3), 100, np.uint8), guess, truth)[0].astype(float)
    nearest = [
        min((FALSE_FOREGROUND, MISSED, CONFUSED), key=lambda c: np.abs(shown[i] - rgb(c)).sum()) for i in range(8)
    ]
    distance = [np.abs(shown[i] - rgb(nearest[i])).max() for i in range(8)]
    mistakes = {1: FALSE_FOREGROUND, 2: MISSED, 4: CONFUSED, 5: MISSED}
    for pixel in range(8):
        if pixel in mistakes:
            assert nearest[pixel] == mistakes[pixel]
            assert distance[pixel] < 50
        else:  # grey: right, or left out
            assert np.ptp(shown[pixel]) < 12
    assert shown[3].mean() > shown[0].mean()  # right foreground stands out from right background


def test_mask_overlay_leaves_the_background_and_tints_the_class():
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 2
    colours = class_colours(2)
    shown = mask_overlay(IMAGE, mask, colours)
    assert (shown[:, :3] == 100).all()
    assert (shown[:, 3] == 255).all()  # the outline
    np.testing.assert_allclose(shown[:, 5:], np.broadcast_to(0.3 * 100 + 0.7 * colours[2], (8, 3, 3)), atol=1)


def test_bands_of_an_overlay_do_not_show(monkeypatch):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2 * pictures.BAND + 7, 20, 3), dtype=np.uint8)
    mask = rng.choice(np.array([0, 1, 2, 255], np.uint8), image.shape[:2])
    shown = mask_overlay(image, mask, class_colours(2))
    monkeypatch.setattr(pictures, "BAND", len(image))
    np.testing.assert_array_equal(shown, mask_overlay(image, mask, class_colours(2)))


def test_an_overlay_takes_little_more_than_the_photograph():
    image = np.zeros((20 * pictures.BAND, 500, 3), np.uint8)
    tracemalloc.start()
    mask_overlay(image, np.zeros(image.shape[:2], np.uint8), class_colours(1))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * image.nbytes  # measured: 3.0; as floating point all at once: 25


def test_cam_overlay_grows_brighter_with_the_strongest_class():
    cam = np.stack([np.linspace(0, 1, 8) * np.ones((8, 1)), np.zeros((8, 8))])
    shown = cam_overlay(IMAGE, cam).astype(int).sum(-1)
    assert (np.diff(shown[0]) > 0).all()
    np.testing.assert_array_equal(shown, cam_overlay(IMAGE, cam[::-1]).astype(int).sum(-1))


def test_cam_overlay_without_a_class_is_that_of_zeros():
    np.testing.assert_array_equal(cam_overlay(IMAGE, np.zeros((0, 8, 8))), cam_overlay(IMAGE, np.zeros((1, 8, 8))))


def test_overlays_leave_their_inputs_alone():
    image, mask = IMAGE.copy(), np.full((8, 8), 255, np.uint8)
    mask_overlay(image, mask, class_colours(1))
    error_map(image, mask, mask)
    cam_overlay(image, np.ones((1, 8, 8)))
    assert (image == 100).all()
    assert (mask == 255).all()


@given(classes=st.integers(0, 120))
def test_class_colours_differ(classes):
    colours = class_colours(classes)
    assert colours.shape == (1 + classes, 3)
    assert len({tuple(colour) for colour in colours.tolist()}) == 1 + classes


@given(height=st.integers(1, 900), width=st.integers(1, 900), side=st.integers(1, 400))
def test_fit_within_keeps_the_proportions_and_never_enlarges(height, width, side):
    new_height, new_width = fit_within(side, np.zeros((height, width), bool))
    assert max(new_height, new_width) <= max(1, min(side, max(height, width)))
    if max(height, width) <= side:
        assert (new_height, new_width) == (height, width)
    factor = max(new_height, new_width) / max(height, width)
    assert abs(new_height - max(1, height * factor)) <= 1
    assert abs(new_width - max(1, width * factor)) <= 1


def test_resizing_keeps_labels_and_numbers_of_maps():
    mask = np.kron(np.array([[0, 3], [255, 1]], np.uint8), np.ones((10, 10), np.uint8))
    assert set(np.unique(resize_mask(mask, (7, 5)))) == {0, 1, 3, 255}
    assert resize_cam(np.zeros((0, 4, 4)), (3, 2)).shape == (0, 3, 2)
    assert resize_cam(np.ones((2, 4, 4), np.float16), (3, 2)).tolist() == np.ones((2, 3, 2)).tolist()


@pytest.fixture
def example():
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 10:20] = 2
    return Example(np.full((30, 40, 3), 90, np.uint8), (mask == 2)[None].astype(np.float32), mask, mask)


def size_of(path) -> tuple[int, int]:
    with Image.open(path) as stored:
        return stored.size


def test_picture_has_a_row_an_example_and_a_column_a_panel(tmp_path, example):
    sizes = []
    for rows in (1, 2):
        picture(tmp_path / "a picture.png", [example] * rows, height=96)
        sizes.append(size_of(tmp_path / "a picture.png"))
    gap, margin = 96 // 24, 96 // 12
    assert sizes[0][0] == sizes[1][0] == 4 * 128 + 3 * gap + 2 * margin
    assert sizes[1][1] - sizes[0][1] == 96 + gap


def test_picture_shows_its_panels_unchanged(tmp_path, example):
    picture(tmp_path / "p.png", [example], height=30)
    shown = np.asarray(Image.open(tmp_path / "p.png"))
    gap, margin = 30 // 24, 30 // 12
    panels = [example.image, cam_overlay(example.image, example.cam)]
    panels += [mask_overlay(example.image, example.mask, class_colours(2))] * 2
    for column, panel in enumerate(panels):
        left = margin + column * (40 + gap)
        np.testing.assert_array_equal(shown[margin : margin + 30, left : left + 40], panel)


def test_picture_without_truth_has_three_columns_and_with_names_a_legend(tmp_path, example):
    sizes = {}
    for name, rows, classes in (
        ("plain", [example], ()),
        ("legend", [example], ("cat", "dog")),
        ("no truth", [example._replace(truth=None)], ()),
    ):
        picture(tmp_path / f"{name}.png", rows, classes=classes, height=96)
        sizes[name] = size_of(tmp_path / f"{name}.png")
    assert sizes["legend"][1] > sizes["plain"][1]
    assert sizes["plain"][0] - sizes["no truth"][0] == 128 + 96 // 24
    shown = np.asarray(Image.open(tmp_path / "legend.png")).reshape(-1, 3)
    assert (shown == class_colours(2)[2]).all(1).any()  # the box of dog, which occurs
    assert not (shown == class_colours(2)[1]).all(1).any()  # cat does not


def test_picture_refuses_what_it_cannot_draw(tmp_path, example):
    with pytest.raises(ValueError, match="examples: expected at least one"):
        picture(tmp_path / "p.png", [])
    with pytest.raises(ValueError, match="captions: expected 4, one for each column, got 2"):
        picture(tmp_path / "p.png", [example], captions=("a", "b"))
