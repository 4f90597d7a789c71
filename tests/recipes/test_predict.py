"""A trained segmentation network travels as a folder and segments photographs of any kind."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.cli import main
from recipes.pipeline.attention import AttendingTrunk
from recipes.pipeline.predict import _best_at
from recipes.pipeline.pretrained import from_pretrained, save_pretrained
from recipes.pipeline.segmenter import (
    CosineSegmenter,
    SegFormer,
    SegFormerConfig,
    SegFormerHead,
    SegmentConfig,
    Segmenter,
)
from recipes.pipeline.transformers import TokenConfig

CONFIG = SegmentConfig(weights="random", test_scales=(1.0,), crop=64)
LARGEFOV = replace(CONFIG, architecture="largefov", output_stride=8)
CLASSES, PALETTE = ("cat", "café"), (0, 8, 20)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a network whose last layer sees a cat everywhere."""
    torch.manual_seed(0)
    network = Segmenter(CONFIG, 3)
    torch.nn.init.zeros_(network.net.segmentation_head[0].weight)
    with torch.no_grad():
        network.net.segmentation_head[0].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    folder = tmp_path_factory.mktemp("run")
    save_pretrained(folder / "model", network, CONFIG, CLASSES, PALETTE, recipe="cam")
    return folder


def photograph(path: Path, mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: object) -> Path:
    values = np.arange(size[0] * size[1]).reshape(size[1], size[0])
    picture = Image.fromarray((values * 50 % 65536).astype(np.uint16) if mode == "I;16" else values.astype(np.uint8))
    (picture if mode == "I;16" else picture.convert(mode)).save(path, **options)
    return path


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def segformer(backbone: str) -> tuple[SegFormer, SegFormerConfig]:
    tokens = TokenConfig(backbone, weights="random", dim=48, depth=2, heads=3, grid=4)
    trunk = AttendingTrunk(tokens)
    config = SegFormerConfig(tokens, dim=8, test_scales=(1.0,), crf=True)
    return SegFormer(trunk, SegFormerHead(trunk.level_channels, 8, 3)), config


@pytest.mark.parametrize(
    "make",
    [
        lambda: (Segmenter(CONFIG, 3), CONFIG),
        lambda: (Segmenter(CONFIG, 3, depth=4, decoder_channels=16), CONFIG),
        lambda: (CosineSegmenter(CONFIG, 3, temperature=7.0), CONFIG),
        lambda: (CosineSegmenter(LARGEFOV, 3, temperature=7.0), LARGEFOV),
        lambda: segformer("hybrid:tf_efficientnet_lite0"),
        lambda: segformer("mit_b0"),
    ],
    ids=["whole", "student", "cosines", "cosines on DeepLab", "hybrid SegFormer", "SegFormer"],
)
def test_the_network_comes_back_as_it_was(tmp_path: Path, make: Callable) -> None:
    network, config = make()
    network.eval()
    save_pretrained(tmp_path, network, config, CLASSES, PALETTE, recipe="cam")
    found = from_pretrained(tmp_path)
    images, photograph = torch.randn(1, 3, 32, 48), torch.randint(256, (3, 12, 50), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(found.network(images), network(images))
        probabilities = found.network.probabilities(photograph, (1.0, 0.5))
        assert torch.equal(probabilities, network.probabilities(photograph, (1.0, 0.5)))
    assert probabilities.shape == (3, 12, 50)
    torch.testing.assert_close(probabilities.sum(0), torch.ones(12, 50))
    assert (found.config.crf, found.network.crf_settings) == (config.crf, network.crf_settings)
    assert (found.classes, found.palette_index, found.config.test_scales) == (CLASSES, PALETTE, (1.0,))
    assert json.loads((tmp_path / "config.json").read_text())["recipe"] == "cam"


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("plain.jpg", "RGB", {}),
        ("grey.png", "L", {}),
        ("sixteen bits.png", "I;16", {}),
        ("print.jpg", "CMYK", {}),
        ("clear.png", "RGBA", {}),
        ("köln.webp", "RGB", {}),
        ("palette.png", "P", {"transparency": bytes(range(256))}),
        ("small.bmp", "RGB", {"size": (1, 1)}),
        ("a line.png", "RGB", {"size": (1, 50)}),
    ],
)
def test_photographs_of_any_kind_get_mask_and_overlay(
    name: str, mode: str, options: dict, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = photograph(tmp_path / name, mode, **options)
    assert main(["predict", str(run), str(photo), "--out", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / f"{photo.stem}.png") as picture:
        mask = np.asarray(picture)
    size = options.get("size", (40, 30))
    assert mask.shape == size[::-1]
    assert (mask == 8).all()  # a cat, in the palette's index
    assert size_of(tmp_path / "out" / f"{photo.stem}_overlay.jpg") == size
    assert "cat 100 %" in capsys.readouterr().out


def test_a_turned_photograph_is_segmented_upright(run: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = photograph(tmp_path / "turned.jpg", exif=exif)
    main(["predict", str(run), str(photo)])
    assert size_of(run / "predictions" / "turned.png") == (30, 40)


def test_large_photographs_are_seen_smaller_and_small_ones_as_they_are(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    probabilities = Segmenter.probabilities

    def watched(self: Segmenter, image: torch.Tensor, scales: tuple[float, ...]) -> torch.Tensor:
        seen.append(tuple(image.shape))
        return probabilities(self, image, scales)

    monkeypatch.setattr(Segmenter, "probabilities", watched)
    Image.new("RGB", (120, 60), (90, 120, 60)).save(tmp_path / "a.jpg")
    for side, size in ((40, (3, 20, 40)), (120, (3, 60, 120)), (None, (3, 60, 120))):
        main(["predict", str(run), str(tmp_path / "a.jpg"), "--out", str(tmp_path), "--long-side", str(side)])
        assert seen.pop() == size
        with Image.open(tmp_path / "a.png") as mask:
            assert mask.size == (120, 60)


def test_scores_are_enlarged_one_by_one_to_the_same_mask() -> None:
    scores = torch.rand(4, 7, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(scores[None], (31, 23), mode="bilinear", align_corners=False)[0].argmax(
        0
    )
    assert torch.equal(_best_at(scores, (31, 23)).long(), expected)
    assert torch.equal(_best_at(scores, (7, 5)).long(), scores.argmax(0))


def test_a_damaged_photograph_is_told_and_the_others_are_done(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photograph(tmp_path / "good.jpg")
    (tmp_path / "bad.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:200])
    with pytest.raises(SystemExit):
        main(["predict", str(run), str(tmp_path), "--out", str(tmp_path / "out")])
    assert "bad.jpg: cannot be read as a photograph" in capsys.readouterr().err.replace("\n", "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["good.png", "good_overlay.jpg"]


@pytest.mark.parametrize("lost", ["x.png", "y_overlay.jpg"])
def test_no_photograph_is_overwritten(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "q"
    folder.mkdir()
    for name in ("a.jpg", lost, "y.jpg"):
        photograph(folder / name)
    (tmp_path / "link").symlink_to(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for photos, out in ((folder, folder), ("q", tmp_path / "link"), (tmp_path / "link", "q")):
        told = fails([str(run), str(photos), "--out", str(out)], capsys)
        assert "out: masks or overlays would overwrite 1 photograph: " in told
        assert f"{lost}; give another folder" in told
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert main(["predict", str(run), "q/a.jpg", "--out", "q"]) == 0
    assert {file.name for file in folder.iterdir()} == {*before, "a.png", "a_overlay.jpg"}


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["predict", *arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err.replace("\n", "")


def test_wrong_input_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = str(photograph(tmp_path / "a.jpg"))
    photograph(tmp_path / "a.png")
    assert "expected config.json and model.safetensors" in fails([str(tmp_path), photo], capsys)
    assert "would both be a.png; predict them apart" in fails([str(run), str(tmp_path)], capsys)
    assert f"photos: there is no {tmp_path / 'b.jpg'}" in fails([str(run), str(tmp_path / "b.jpg")], capsys)
    assert "photos: expected at least one photograph" in fails([str(run)], capsys)
    assert "long_side: expected at least 1 pixel, got 0" in fails([str(run), photo, "--long-side", "0"], capsys)
    for device in ("nonsense", "meta:x", *(() if torch.cuda.is_available() else ("cuda",))):
        assert f"device: expected cpu, or cuda where there is one, got '{device}'" in fails(
            [str(run), photo, "--device", device], capsys
        )
    assert "photos: expected .jpg" in fails([str(run), str(run / "model" / "config.json")], capsys)


def test_a_damaged_network_is_told(run: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run / "model" / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((run / "model" / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model\.safetensors: not the weights of this network"):
        from_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "format": 2}))
    with pytest.raises(ValueError, match=r"of a network of this version \('format 2, this version reads 1'\)"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json: not the configuration of a network of this version"):
        from_pretrained(tmp_path)
