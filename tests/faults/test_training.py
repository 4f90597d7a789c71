"""A training whose numbers are not finite, or whose loader dies, stops with a message; and it keeps no memory."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import Dataset, get_worker_info

from recipes.cli import _told_plainly
from recipes.pipeline.classification import ClassifyConfig, train_classifier
from recipes.pipeline.run import Run, RunConfig
from recipes.pipeline.training import Moment, Schedule, _told_of_dead_loaders, fit, two_speed_groups
from tests.heap import bytes_in_use
from tests.recipes.synthetic import make_dataset
from tests.recipes.test_training import SCHEDULE, NoisyPoints, make_run, same, small_model, squared_error, train


def spoilt_at(step: int, number: float) -> Callable[[nn.Module, dict[str, Tensor], Moment], Tensor]:
    def loss(model: nn.Module, batch: dict[str, Tensor], at: Moment) -> Tensor:
        return squared_error(model, batch, at) * (number if at.step == step else 1.0)

    return loss


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [2, 5])  # of 0..5: between the steps whose loss is looked at, and the last
def test_weights_that_are_not_finite_are_never_kept(step: int, number: float, tmp_path: Path) -> None:
    whole, run = train(make_run(tmp_path / "whole")), make_run(tmp_path / "spoilt")
    with pytest.raises(FloatingPointError, match=r"points.*(not finite|loss is (nan|inf)).*lower the learning rate"):
        train(run, spoilt_at(step, number))
    kept = list(run.folder.rglob("*.pt"))
    assert [file.name for file in kept] == ["points.partial.pt"]
    assert all(value.isfinite().all() for value in torch.load(kept[0], weights_only=True)["model"].values())
    assert same(train(run), whole)  # from the last good step on


class Deadly(Dataset):
    """Points that kill the loader process that reads the last of them."""

    def __init__(self) -> None:
        self.points = NoisyPoints()

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == len(self) - 1 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.points[index]


class Wrong(Deadly):
    """Points with a bug."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        raise RuntimeError("a bug in the data set")


def fit_deadly(run: Run, points: type[Deadly] = Deadly) -> dict[str, Tensor]:
    model = small_model()
    fit(run, "points", model, points(), squared_error, two_speed_groups(model, [model[2]], SCHEDULE), SCHEDULE)
    return model.state_dict()


def test_a_dead_loader_is_told_and_the_run_goes_on_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, _told_plainly(["run"]):
        fit_deadly(make_run(tmp_path / "a", workers=1))
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"points: a loader process died \((DataLoader worker \(pid|.*Connection reset)", said)
    assert "--workers 0" in said
    assert not (tmp_path / "a" / "checkpoints" / "points.pt").exists()
    assert same(fit_deadly(make_run(tmp_path / "a", workers=0)), fit_deadly(make_run(tmp_path / "b", workers=0)))


def test_a_bug_in_a_data_set_is_not_told_as_a_dead_loader(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug in the data set"):
        fit_deadly(make_run(tmp_path / "a", workers=1), Wrong)


class Unreachable(Deadly):
    """Points on a disk that is far away."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        raise ConnectionResetError("the disk is far away")


@pytest.mark.parametrize("said", ["", "[Errno 104] Connection reset by peer"])
def test_a_loader_that_dies_while_it_hands_over_is_told_as_dead(said: str) -> None:
    class Dying:
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            yield {}
            raise ConnectionResetError(said) if said else EOFError

    with pytest.raises(ChildProcessError, match="points: a loader process died"):
        list(_told_of_dead_loaders(Dying(), "points"))


def test_the_death_of_a_loader_is_waited_for_and_does_not_break_into_the_message() -> None:
    def tell(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    class Dying:
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            yield {}
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            raise ConnectionResetError

    before = signal.signal(signal.SIGALRM, tell)
    try:
        with pytest.raises(ChildProcessError, match="points: a loader process died .* killed by signal: Killed"):
            list(_told_of_dead_loaders(Dying(), "points"))
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_disk_that_is_far_away_is_not_told_as_a_dead_loader(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError, match="the disk is far away"):
        fit_deadly(make_run(tmp_path / "a", workers=1), Unreachable)


def test_a_training_step_keeps_no_memory(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", 12)
    config = RunConfig(out=tmp_path / "run", workers=0)
    run = Run("cam", config, make_run(tmp_path).fabric, dataset, tmp_path / "run")
    schedule = Schedule(epochs=30, batch_size=2, lr=0.001, head_lr=0.01)
    settings = ClassifyConfig(weights="random", long_side=(32, 40), crop=32, schedule=schedule)
    held: list[int] = []
    bytes_in_use()  # a test that can't be made is skipped here and not in a step
    hook = register_optimizer_step_post_hook(lambda *_: held.append(bytes_in_use()))
    try:
        train_classifier(run, settings)
    finally:
        hook.remove()
    assert len(held) == 120
    # one image of a batch kept in each step would be 12 kB each, the activations many times that
    assert max(held[110:]) - max(held[10:20]) < 100 * 2_000
