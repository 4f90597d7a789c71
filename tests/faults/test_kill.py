"""A run that is killed again and again, in each of its stages, ends as one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pytest
import torch

from recipes.pipeline import training
from tests.recipes.processes import command, run

SEED = 8


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


def deaths(whole: Path, seed: int) -> Iterator[Death]:
    """One for each kind of file that a run writes, in the order in which it does: which one, and when, is random."""
    draw = random.Random(seed)
    kinds: dict[str, list[Path]] = {}
    for file in sorted((f for f in whole.rglob("*.*") if f.is_file()), key=lambda f: (f.stat().st_mtime_ns, f)):
        kind = file.parent if file.suffix in (".npz", ".png") else file
        kinds.setdefault(str(kind.relative_to(whole)), []).append(file)
    for kind, files in kinds.items():
        if kind == "recipe.py":  # a copy of the script, which nobody reads
            continue
        file = draw.choice(files).relative_to(whole)
        if file.suffix == ".jsonl":  # the curve of a training is written when it is done
            partial_file = f"checkpoints/{file.stem}.partial.pt"
            yield Death(partial_file, draw.choice(["half", "after"]), draw.randint(1, 2))
        yield Death(str(file), draw.choice(["half", "after"]))


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_as_one_left_alone(whole_irn: Path, tmp_path: Path) -> None:
    arguments = ("run", "irn", "--preset", "tiny", "--out", tmp_path)
    chosen = list(deaths(whole_irn, SEED))
    for death in chosen:
        ended = command(*arguments, before=partial(die, tmp_path, death))
        assert ended.status == -signal.SIGKILL, f"{death} did not come: {ended.output}"
        assert (tmp_path / death.file).exists() or death.at == "half"
    assert {"cam", "ir_label", "mask", "mask_crf", "instances", "segmentation", "checkpoints", "model"} <= {
        str(Path(death.file).parent) for death in chosen
    }
    run(*arguments)
    compare(tmp_path, whole_irn)


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
