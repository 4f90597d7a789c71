import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from recipes.pipeline.data import ImageSet, load_dataset
from recipes.pipeline.data.cache import cached
from recipes.pipeline.data.drawing import CLASSES, SCENES, draw_picture


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WSSS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_dataset("demo:tiny")


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_demo_has_what_every_system_needs(demo: ImageSet) -> None:
    assert demo.name == "demo:tiny"
    assert demo.classes == CLASSES
    assert (len(demo.train), len(demo.seed), len(demo.val)) == (16, 16, 8)
    assert len(demo.out_of_distribution) == 6
    assert demo.palette_index == tuple(range(7))
    assert demo.check() == 30
    assert demo.notes == ()
    for name in (*demo.train, *demo.val):
        height, width = demo.size(name)
        assert demo.image(name).size == (width, height)
        saliency = demo.saliency(name)
        assert saliency.shape == (height, width)
        assert saliency.dtype == np.float32
        assert 0 <= saliency.min() < 0.1 < 0.2 < saliency.max() <= 1
        assert demo.caption(name).startswith("a photo of a ")
        for index in np.flatnonzero(demo.labels(name)):
            assert f"a {demo.classes[index]}" in demo.caption(name)


def test_tags_boxes_and_masks_of_the_demo_agree(demo: ImageSet) -> None:
    for name in (*demo.train, *demo.val):
        mask, boxes = demo.mask(name), demo.boxes(name)
        present = set(np.unique(mask)) - {0, 255}
        assert present == set(np.flatnonzero(demo.labels(name)) + 1) == set(boxes[:, 0])
        covered = np.zeros(mask.shape, dtype=bool)
        for index, x1, y1, x2, y2 in boxes.astype(int):
            inside = mask[y1:y2, x1:x2] == index
            covered[y1:y2, x1:x2] |= inside
            assert inside.sum() >= 0.01 * mask.size
        assert not (~covered & (mask > 0) & (mask < 255)).any()
        assert 0.002 < (mask == 255).mean() < 0.12


def test_demo_sizes_and_numbers_of_classes_vary(demo: ImageSet) -> None:
    sizes = {demo.size(name) for name in demo.train}
    assert len(sizes) >= 3
    assert any(height != width for height, width in sizes)
    per_image = {int(demo.labels(name).sum()) for name in demo.train}
    assert {1, 2} <= per_image
    assert all(sum(demo.labels(name)[k] for name in demo.train) >= 2 for k in range(6))


def test_edges_of_the_demo_objects_can_be_seen(demo: ImageSet) -> None:
    # colour changes more across the outline of an object than elsewhere, or no refinement could find it
    ratios = []
    for name in demo.train:
        image = np.asarray(demo.image(name), dtype=np.float64)
        step = np.abs(np.diff(image, axis=1)).sum(-1)
        outline = np.abs(np.diff((demo.mask(name) == 255).astype(int), axis=1)) > 0
        ratios.append(step[outline].mean() / step[~outline].mean())
    assert np.median(ratios) > 1.5
    assert min(ratios) < 4  # nor is the background flat


def test_saliency_is_right_in_general_and_wrong_in_places(demo: ImageSet) -> None:
    images = [(demo.saliency(name) > 0.5, demo.mask(name)) for name in (*demo.train, *demo.val)]
    hit = sum((found & (mask > 0) & (mask < 255)).sum() for found, mask in images)
    wrong = sum((found & (mask == 0)).sum() for found, mask in images)
    missed = sum((~found & (mask > 0) & (mask < 255)).sum() for found, mask in images)
    assert 0.6 < hit / (hit + wrong + missed) < 0.98


def test_demo_is_the_same_everywhere_and_small_sets_begin_large_ones(
    demo: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WSSS_CACHE", str(tmp_path))
    again = load_dataset("demo:6+2")
    assert again.train == demo.train[:6]
    first, second = (Path(data.path(data.train[0])).parents[1] for data in (demo, again))
    large, small = content(first), content(second)
    pictures = [name for name in small if name.startswith(("JPEG", "Seg", "Ann", "Sal", "Out"))]
    assert len(pictures) == 8 * 4 + 6
    assert all(small[name] == large[name] for name in pictures)


def test_out_of_distribution_pictures_show_every_scene_without_objects(demo: ImageSet) -> None:
    for name in demo.out_of_distribution:
        assert demo.labels(name).sum() == 0
        assert demo.image(name).mode == "RGB"
    rng = np.random.default_rng(0)
    for scene in SCENES:
        picture = draw_picture(rng, (), scene, (60, 70))
        assert picture.image.shape == (60, 70, 3)
        assert not picture.mask.any()
        assert picture.objects == []


def test_every_class_can_be_drawn_everywhere() -> None:
    rng = np.random.default_rng(1)
    for index in range(1, 7):
        picture = draw_picture(rng, (index,), SCENES[index % 6], (96, 112))
        assert set(np.unique(picture.mask)) == {0, index, 255}


def load_in_process(cache: str) -> int:
    os.environ["WSSS_CACHE"] = cache
    return load_dataset("demo:6+1").check()


def test_two_processes_may_draw_the_demo_at_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(load_in_process, [str(tmp_path)] * 2) == [13, 13]
    assert [path.name for path in tmp_path.iterdir()] == ["demo-v3-6+1"]


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSSS_CACHE", str(tmp_path))

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("thing", fail)
    assert list(tmp_path.iterdir()) == []
    assert (cached("thing", lambda folder: (folder / "all").touch()) / "all").is_file()


def test_the_loser_of_a_race_uses_the_winners_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSSS_CACHE", str(tmp_path))

    def overtaken(folder: Path) -> None:
        (folder / "mine").touch()
        cached("thing", lambda other: (other / "theirs").touch())

    assert [path.name for path in cached("thing", overtaken).iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
