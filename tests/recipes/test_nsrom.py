"""NSROM accumulates attention, regresses it, and trains two segmentation networks from the same beginning."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from recipes import nsrom
from recipes.pipeline import segmentation
from recipes.pipeline.models import build_trunk
from recipes.pipeline.run import Run, start
from recipes.pipeline.training import Moment, Schedule, fit
from wsss_modules import GlobalReasoningUnit

SMALL = nsrom.NSROMConfig(
    weights="random", channels=8, nodes=2, size=64, schedule=Schedule(epochs=2, batch_size=8, lr=0.01, head_lr=0.1)
)


def run_in(folder: Path) -> Run:
    return start("nsrom", nsrom.Config(data="demo:tiny", out=folder, workers=0, accelerator="cpu"), takes=())


def train(run: Run) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return nsrom.train_first(run, SMALL).state_dict()


@pytest.mark.slow
def test_training_killed_and_resumed_accumulates_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsrom, "fit", partial(fit, checkpoint_seconds=0))
    whole = train(run_in(tmp_path / "whole"))
    assert whole["attention.written"].all()
    assert whole["attention.maps"].any()

    update, calls = nsrom.OnlineAttentionAccumulator.update, []

    def update_until_killed(*arguments: object, **options: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        update(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(nsrom.OnlineAttentionAccumulator, "update", update_until_killed)
        with pytest.raises(KeyboardInterrupt):
            train(run_in(tmp_path / "killed"))
    resumed = train(run_in(tmp_path / "killed"))
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


def test_attention_is_kept_from_the_second_epoch_on_and_forced_in_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[tuple[int, bool]] = []
    epoch = 0

    def steps(run: Run, stage: str, net: torch.nn.Module, squares: Dataset, loss_of: Callable, *_: object) -> None:
        nonlocal epoch
        batch = {key: value[None] for key, value in squares[0].items()}
        per_epoch = len(squares) // SMALL.schedule.batch_size
        assert per_epoch > 1
        for step in range(3 * per_epoch):
            epoch = step // per_epoch
            loss_of(net, batch, Moment(step, 3 * per_epoch, epoch, 3, per_epoch))
        assert [kept.count(pair) for pair in ((1, False), (2, True))] == [per_epoch, per_epoch]

    def note(*_: object, last: bool, **options: object) -> None:
        kept.append((epoch, last))

    monkeypatch.setattr(nsrom, "fit", steps)
    monkeypatch.setattr(nsrom.OnlineAttentionAccumulator, "update", note)
    nsrom.train_first(run_in(tmp_path), SMALL)
    assert set(kept) == {(1, False), (2, True)}


def test_the_first_classifier_rectifies_after_the_reasoning_and_the_second_before() -> None:
    backbone = build_trunk("tf_efficientnet_lite0", "random", 32)
    first, second = (nsrom.Reasoner(backbone, 3, SMALL, second=second).head for second in (False, True))
    kinds = [[type(layer) for layer in head] for head in (first, second)]
    conv, relu = torch.nn.Conv2d, torch.nn.ReLU
    assert kinds[0] == [conv, relu, conv, relu, conv, GlobalReasoningUnit, relu, conv]
    assert kinds[1] == [conv, relu, conv, relu, conv, relu, GlobalReasoningUnit, conv]


@pytest.mark.parametrize("warm", [False, True])
def test_both_segmentation_networks_start_from_the_initial_weights(
    warm: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(nsrom.PRESETS["tiny"].segment, weights="random")
    run, initial = run_in(tmp_path), {}

    def fit_nothing(run: Run, stage: str, model: torch.nn.Module, *_: object) -> None:
        initial[stage] = {key: value.clone() for key, value in model.state_dict().items()}
        for parameter in model.parameters():
            parameter.data += 1

    monkeypatch.setattr(segmentation, "fit", fit_nothing)
    torch.manual_seed(0)
    first = segmentation.train_segmentation(run, lambda name: np.zeros(0), config, stage="segment_first")
    torch.manual_seed(0)
    segmentation.train_segmentation(run, lambda name: np.zeros(0), config, start_from=first if warm else None)
    trained = first.state_dict()
    for key, value in initial["segment"].items():
        assert torch.equal(value, trained[key] if warm else initial["segment_first"][key]), key


def test_a_missing_map_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    config = replace(nsrom.PRESETS["tiny"], out=tmp_path / "run", saliency=str(tmp_path / "maps"), accelerator="cpu")
    run = run_in(tmp_path / "other")
    (tmp_path / "maps").mkdir()
    for name in run.train[1:]:
        Image.fromarray(np.zeros(run.dataset.size(name), np.uint8)).save(tmp_path / "maps" / f"{name}.png")
    with pytest.raises(ValueError, match=f"has no .png or .npz for .*{run.train[0]}"):
        nsrom.main(config)
    assert not (tmp_path / "run" / "checkpoints").exists()
