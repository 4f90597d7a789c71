"""Photographs as cameras write them: turned, grey, with transparency."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from recipes.pipeline.data import load_dataset
from tests.recipes.data.photos import SIZES, half_mask, write_mask, write_photo


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
