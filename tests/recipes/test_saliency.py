import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lightning_fabric import Fabric
from PIL import Image

from recipes.pipeline.data.image_set import ImageSet
from recipes.pipeline.run import Run, RunConfig
from recipes.pipeline.saliency import measure_saliency, read_saliency, saliency_source, save_saliency
from tests.recipes.synthetic import make_dataset


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", make_dataset(tmp_path / "data", 6))


def make_run(folder: Path, dataset: ImageSet) -> Run:
    return Run("test", RunConfig(), Fabric(accelerator="cpu", devices=1), dataset, folder)


def ramp(size: tuple[int, int]) -> np.ndarray:
    return np.linspace(0, 1, size[1], dtype=np.float32) * np.ones((size[0], 1), np.float32)


def write_all(run: Run, folder: Path, scale: int = 1) -> Path:
    folder.mkdir(parents=True)
    for name in run.train:
        height, width = run.dataset.size(name)
        picture = (ramp((height * scale, width * scale)) * 255).round().astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{name}.png")
    return folder


def test_folder_of_grey_pictures(run: Run, tmp_path: Path) -> None:
    source = saliency_source(run, str(write_all(run, tmp_path / "maps")))
    for name in run.train:
        saliency = source(name)
        assert saliency.dtype == np.float32
        assert saliency.shape == run.dataset.size(name)
        np.testing.assert_allclose(saliency, ramp(saliency.shape), atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("scale", [2, 3])
def test_maps_of_another_size_are_resized(run: Run, tmp_path: Path, scale: int) -> None:
    source = saliency_source(run, str(write_all(run, tmp_path / "maps", scale)))
    for name in run.train:
        saliency = source(name)
        assert saliency.shape == run.dataset.size(name)
        np.testing.assert_allclose(saliency, ramp(saliency.shape), atol=1 / saliency.shape[1])
        assert 0 <= saliency.min() <= saliency.max() <= 1


@pytest.mark.parametrize("kind", ["npz", "npz-uint8", "16 bits", "RGB", "palette", "1 bit"])
def test_other_ways_to_store_a_map(run: Run, tmp_path: Path, kind: str) -> None:
    folder, name = write_all(run, tmp_path / "maps"), run.train[0]
    expected = ramp(run.dataset.size(name))
    if kind == "1 bit":
        expected = (expected > 0.5).astype(np.float32)
    grey = (expected * 255).round().astype(np.uint8)
    (folder / f"{name}.png").unlink()
    match kind:
        case "npz":
            np.savez_compressed(folder / f"{name}.npz", saliency=expected, other=np.zeros(3))
        case "npz-uint8":
            np.savez_compressed(folder / f"{name}.npz", grey)
        case "16 bits":
            Image.fromarray((expected * 65535).round().astype(np.uint16)).save(folder / f"{name}.png")
        case "RGB":
            Image.fromarray(np.repeat(grey[..., None], 3, -1)).save(folder / f"{name}.png")
        case "palette":
            Image.fromarray(grey).convert("P").save(folder / f"{name}.png")
        case "1 bit":
            Image.fromarray(expected > 0).save(folder / f"{name}.png")
    np.testing.assert_allclose(saliency_source(run, str(folder))(name), expected, atol=0.5 / 255 + 1e-6)


def test_c2am_run_is_a_source_and_what_it_wrote_comes_back(run: Run, tmp_path: Path) -> None:
    earlier = make_run(tmp_path / "c2am", run.dataset)
    for name in run.train:
        save_saliency(earlier, name, ramp(run.dataset.size(name)))
    (tmp_path / "c2am" / "config.yaml").write_text("recipe: c2am\n")
    source = saliency_source(run, str(tmp_path / "c2am"))
    for name in run.train:
        np.testing.assert_array_equal(source(name), read_saliency(earlier, name))
        np.testing.assert_allclose(source(name), ramp(run.dataset.size(name)), atol=0.5 / 255 + 1e-6)
        with Image.open(tmp_path / "c2am" / "saliency" / f"{name}.png") as picture:
            assert picture.mode == "L"


def test_own_maps_of_the_data_set(run: Run, tmp_path: Path) -> None:
    folder = write_all(run, tmp_path / "maps")
    files = {name: str(folder / f"{name}.png") for name in run.train}
    run.dataset = replace(run.dataset, annotations=replace(run.dataset.annotations, saliencies=files))
    source = saliency_source(run)
    for name in run.train:
        np.testing.assert_array_equal(source(name), run.dataset.saliency(name))


def test_own_maps_are_read_once_and_broken_ones_are_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_all(run, tmp_path / "maps")
    files = {name: str(folder / f"{name}.png") for name in run.train}
    run.dataset = replace(run.dataset, annotations=replace(run.dataset.annotations, saliencies=files))
    seen, saliency = [], type(run.dataset.annotations).saliency
    with monkeypatch.context() as patch:
        patch.setattr(
            type(run.dataset.annotations), "saliency", lambda self, name: seen.append(name) or saliency(self, name)
        )
        saliency_source(run)
    assert sorted(seen) == sorted(run.train)
    first, second, third, _ = (Path(file) for file in files.values())
    first.write_text("nothing")
    second.write_bytes(second.read_bytes()[:60])
    Image.new("L", (3, 2)).save(third)
    with pytest.raises(ValueError, match="saliency: 3 broken maps: ") as caught:
        saliency_source(run)
    for part in ("photo 00.png: cannot be read as a saliency map", "photo 01.png: cannot be", "photo 02: 3 x 2 pixels"):
        assert part in str(caught.value)


def test_measured_saliency_takes_all_classes_as_one(run: Run) -> None:
    for name in run.seeds:
        truth = run.dataset.mask(name)
        save_saliency(run, name, np.where(truth == 255, 0.5, truth > 0).astype(np.float32))
    measure_saliency(run)
    (measured,) = run.metrics["measurements"]
    assert measured["what"] == "saliency"
    assert measured["iou"] == {"background": 100.0, "object": 100.0}
    name = run.seeds[0]
    save_saliency(run, name, 1 - read_saliency(run, name))
    measure_saliency(run)
    (measured,) = run.metrics["measurements"]
    assert 50 < measured["miou"] < 100


def test_source_can_be_pickled_for_loader_processes(run: Run, tmp_path: Path) -> None:
    source = saliency_source(run, str(write_all(run, tmp_path / "maps")))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))(run.train[0]), source(run.train[0]))


def test_only_the_images_asked_for_need_a_map(run: Run, tmp_path: Path) -> None:
    folder = write_all(run, tmp_path / "maps")
    (folder / f"{run.train[0]}.png").unlink()
    saliency_source(run, str(folder), run.train[1:])
    with pytest.raises(ValueError, match="1 image: photo 00; files are named like the images"):
        saliency_source(run, str(folder))


def test_missing_maps_are_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"synthetic comes without a map for 4 images: photo 00, .*run c2am"):
        saliency_source(run)
    with pytest.raises(ValueError, match="found no folder .*nowhere"):
        saliency_source(run, str(tmp_path / "nowhere"))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text("recipe: c2am\n")
    with pytest.raises(ValueError, match="found no folder .*saliency; is that c2am run finished"):
        saliency_source(run, str(tmp_path / "unfinished"))
    write_all(run, tmp_path / "unfinished" / "saliency")
    (tmp_path / "unfinished" / "saliency" / "photo 02.png").unlink()
    with pytest.raises(ValueError, match="for 1 image: photo 02; is that c2am run finished"):
        saliency_source(run, str(tmp_path / "unfinished"))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut short", r"photo 00.png: cannot be read as a saliency map .*; is the file complete\?"),
        ("no picture", r"photo 00.png: cannot be read as a saliency map"),
        ("colours", r"photo 00.png: expected a grey picture, found colours; is it a mask\?"),
        ("not an archive", r"photo 00.npz: cannot be read as a saliency map"),
        ("two arrays", r"photo 00.npz: expected one array, or one named saliency; found a, b"),
        ("three axes", r"photo 00.npz: expected an array \(H, W\), found shape \(1, 4, 4\)"),
        ("logits", r"photo 00.npz: expected values in \[0, 1\]"),
        ("nan", r"photo 00.npz: expected values in \[0, 1\]"),
    ],
)
def test_broken_maps_are_found_before_they_are_used(run: Run, tmp_path: Path, kind: str, message: str) -> None:
    folder, name = write_all(run, tmp_path / "maps"), run.train[0]
    png, npz = folder / f"{name}.png", folder / f"{name}.npz"
    whole = png.read_bytes()
    if "npz" in message:
        png.unlink()
    match kind:
        case "cut short":
            png.write_bytes(whole[: len(whole) // 2])
        case "no picture":
            png.write_text("nothing")
        case "colours":
            Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(png)
        case "not an archive":
            npz.write_text("PK nothing")
        case "two arrays":
            np.savez(npz, a=np.zeros((4, 4)), b=np.zeros((4, 4)))
        case "three axes":
            np.savez(npz, np.zeros((1, 4, 4)))
        case "logits":
            np.savez(npz, np.full((4, 4), 3.0))
        case "nan":
            np.savez(npz, np.full((4, 4), np.nan))
    with pytest.raises(ValueError, match="1 broken map: .*" + message):
        saliency_source(run, str(folder))
