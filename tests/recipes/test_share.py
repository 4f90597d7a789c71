"""Taking over another run's classifier, checked on files alone."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from recipes import bbam, cam
from recipes.pipeline.cams import CamConfig
from recipes.pipeline.classification import ClassifyConfig
from recipes.pipeline.run import Run, start
from recipes.pipeline.segmenter import SegmentConfig

TINY = replace(cam.PRESETS["tiny"], preset="tiny", accelerator="cpu")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The files of a finished plain run, with nothing in them."""
    folder = tmp_path / "cam-s0"
    run = start("cam", replace(TINY, out=folder))
    run.record(stages={stage: {"seconds": 3.0, "peak_mb": 1.0} for stage in ("classify", "cams", "masks")})
    for file in ("checkpoints/classify.pt", "curves/classify.jsonl", *(f"cam/{name}.npz" for name in run.train)):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(file)
    return folder


def begin(folder: Path, plain: Path, takes: tuple[str, ...] = ("classify", "cams"), **changes: object) -> Run:
    return start("other", replace(TINY, out=folder, share=plain, **changes), takes)


def test_share_takes_what_agrees(plain: Path, tmp_path: Path) -> None:
    run = begin(tmp_path / "run", plain)
    assert run.path("checkpoints/classify.pt").samefile(plain / "checkpoints/classify.pt")
    assert len(list(run.path("cam").iterdir())) == len(run.train)
    assert run.metrics["reused"] == str(plain)
    assert run.metrics["taken"] == list(run.metrics["stages"]) == ["classify", "cams"]


def test_a_folder_that_is_no_run_is_told_by_the_flag_that_named_it(tmp_path: Path) -> None:
    for flag in ("share", "reuse"):
        with pytest.raises(ValueError, match=f"{flag}: expected a run folder with config.yaml, got .*nowhere"):
            start("other", replace(TINY, out=tmp_path / flag, **{flag: tmp_path / "nowhere"}))


def test_share_leaves_the_cams_where_only_they_differ(plain: Path, tmp_path: Path, capsys) -> None:
    run = begin(tmp_path / "run", plain, cams=CamConfig(scales=(3.0,)))
    assert run.path("checkpoints/classify.pt").exists()
    assert not run.path("cam").exists()
    assert run.metrics["taken"] == ["classify"]
    assert "cams is made anew" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"classify": replace(TINY.classify, crop=96)}, {"takes": ()}],
    ids=["seed", "classifier", "recipe without one"],
)
def test_share_takes_nothing_of_another_classifier(plain: Path, tmp_path: Path, changes: dict) -> None:
    run = begin(tmp_path / "run", plain, **changes)
    assert not run.path("checkpoints").exists()
    assert "reused" not in run.metrics


@pytest.mark.parametrize("own", ["classify.pt", "classify.partial.pt"])
def test_cams_of_two_classifiers_are_never_mixed(plain: Path, tmp_path: Path, own: str, capsys) -> None:
    begun = start("other", replace(TINY, out=tmp_path / "run"))
    begun.path("checkpoints").mkdir()
    begun.path("checkpoints", own).write_text("its own")
    run = begin(tmp_path / "run", plain)
    assert not run.path("cam").exists()
    assert run.path("checkpoints", own).read_text() == "its own"
    assert "reused" not in run.metrics
    assert "a classifier of its own" in capsys.readouterr().out
    with pytest.raises(ValueError, match="reuse: .*run has trained a classifier of its own"):
        start("other", replace(TINY, out=tmp_path / "run", reuse=plain))


@pytest.mark.parametrize(
    ("missing", "taken"),
    [("cam", ["classify"]), ("checkpoints", [])],
    ids=["stopped in the maps", "stopped in training"],
)
def test_share_takes_only_the_stages_that_are_finished(
    plain: Path, tmp_path: Path, capsys, missing: str, taken: list[str]
) -> None:
    next((plain / missing).iterdir()).unlink()
    run = begin(tmp_path / "run", plain)
    assert run.metrics.get("taken", []) == taken
    assert not run.path("cam").exists()
    stage = "cams" if taken else "classify"
    assert f"{stage} is made anew, not that of {plain}: it is not finished" in capsys.readouterr().out


def test_maps_of_another_system_are_not_the_plain_ones(plain: Path, tmp_path: Path, capsys) -> None:
    start("recam", replace(TINY, out=tmp_path / "recam"), ("classify",))
    for folder in ("checkpoints", "cam"):
        (plain / folder).rename(tmp_path / "recam" / folder)
    run = begin(tmp_path / "run", tmp_path / "recam")
    assert run.metrics["taken"] == ["classify"]
    assert "cams: recam makes its own" in capsys.readouterr().out
    with pytest.raises(ValueError, match="cams: recam makes its own"):
        start("other", replace(TINY, out=tmp_path / "other", reuse=tmp_path / "recam"))


def test_another_list_of_val_images_can_mean_other_training_images(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for k in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / f"a{k}.png")
    (tmp_path / "photos" / "tags.csv").write_text("name,tags\n" + "".join(f"a{k},cat\n" for k in range(6)))
    (tmp_path / "val.txt").write_text("a0\n")
    config = replace(
        TINY, data=f"folder:{tmp_path / 'photos'}", labels=str(tmp_path / "photos" / "tags.csv"), out=tmp_path / "run"
    )
    start("cam", config)
    with pytest.raises(ValueError, match="training images and their tags: 6 there, 5 others now"):
        start("rw", replace(config, out=tmp_path / "rw", reuse=tmp_path / "run", val_list=str(tmp_path / "val.txt")))
    (tmp_path / "photos" / "tags.csv").write_text("name,tags\n" + "".join(f"a{k},dog\n" for k in range(6)))
    with pytest.raises(ValueError, match="out: .*run holds a run with other settings .training images and their tags"):
        start("cam", config)


def test_share_copies_from_another_disk(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    run = begin(tmp_path / "run", plain)
    assert run.path("checkpoints/classify.pt").read_text() == "checkpoints/classify.pt"
    assert begin(tmp_path / "run", plain).metrics["taken"] == ["classify", "cams"]  # a copy is the same classifier


def test_reuse_wants_a_finished_run(plain: Path, tmp_path: Path) -> None:
    (plain / "checkpoints/classify.pt").unlink()
    with pytest.raises(ValueError, match="reuse: .*cam-s0 is not finished, 1 files are missing"):
        start("other", replace(TINY, out=tmp_path / "run", reuse=plain))


def test_another_share_is_the_same_run(plain: Path, tmp_path: Path) -> None:
    begin(tmp_path / "run", plain)
    run = start("other", replace(TINY, out=tmp_path / "run"))
    assert run.metrics["taken"] == ["classify", "cams"]


def test_a_schedule_of_another_kind_than_the_default_is_gone_on_with(tmp_path: Path) -> None:
    config = replace(bbam.PRESETS["small"], data="demo:tiny", boxes="annotations", accelerator="cpu", out=tmp_path)
    assert type(config.detect.schedule) is not type(bbam.Config().detect.schedule)
    for _ in range(2):
        start("bbam", config, takes=())


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run" / "films").mkdir(parents=True)
    theirs = tmp_path / "run" / "films" / "film.part-1-of-2.mkv"
    theirs.touch()
    for _ in range(2):
        start("cam", replace(TINY, out=tmp_path / "run"))
        assert theirs.exists()
    left_over = tmp_path / "run" / "metrics.json.part-12-345"
    left_over.touch()
    start("cam", replace(TINY, out=tmp_path / "run"))
    assert not left_over.exists()


def test_columns_in_another_order_are_other_classes(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "tags.csv").write_text("name,cat,dog\na,1,1\n")
    config = replace(TINY, data=f"folder:{tmp_path}", labels=str(tmp_path / "tags.csv"), out=tmp_path / "run")
    start("cam", config)
    (tmp_path / "tags.csv").write_text("name,dog,cat\na,1,1\n")
    with pytest.raises(ValueError, match="training images and their tags: 1 there, 1 others now"):
        start("cam", config)


def test_a_run_that_is_gone_on_with_is_not_finished(tmp_path: Path) -> None:
    run = start("cam", replace(TINY, out=tmp_path / "run"))
    run.record(finished=True)
    assert start("cam", replace(TINY, out=tmp_path / "run")).metrics["finished"] is False


def forget(folder: Path, *settings: str) -> None:
    """Leave settings out of ``config.yaml``, as of a run begun before they came."""
    file = folder / "config.yaml"
    told = yaml.safe_load(file.read_text())
    for setting in settings:
        *groups, last = setting.split(".")
        place = told
        for group in groups:
            place = place[group]
        del place[last]
    file.write_text(yaml.safe_dump(told))


def test_a_run_begun_before_a_setting_came_had_its_default(plain: Path, tmp_path: Path) -> None:
    forget(plain, "classify.jitter", "cams.output_stride", "mask_crf", "segment")
    run = begin(tmp_path / "run", plain, segment=SegmentConfig())
    assert run.metrics["taken"] == ["classify", "cams"]
    start("cam", replace(TINY, out=plain, segment=SegmentConfig()))
    assert yaml.safe_load((plain / "config.yaml").read_text())["mask_crf"] is True  # from now on it is told


def test_a_run_begun_before_a_setting_came_is_no_run_with_another_value(plain: Path, tmp_path: Path) -> None:
    forget(plain, "classify.jitter", "mask_crf")
    with pytest.raises(ValueError, match="mask_crf: True there, False now"):
        start("cam", replace(TINY, out=plain, mask_crf=False))
    jittered = replace(TINY.classify, jitter=not ClassifyConfig().jitter)
    assert "taken" not in begin(tmp_path / "run", plain, classify=jittered).metrics
