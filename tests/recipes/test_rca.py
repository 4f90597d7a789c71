"""RCA's training carries state from image to image: memory, prototypes and accumulated attention."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recipes import rca
from recipes.pipeline.data.drawing import CLASSES
from recipes.pipeline.run import Run, start
from recipes.pipeline.training import Schedule, fit

SMALL = rca.RCAConfig(
    weights="random",
    channels=8,
    slots=4,
    prototypes=2,
    size=64,
    schedule=Schedule(epochs=3, batch_size=4, lr=0.01, head_lr=0.1),
)


def run_in(folder: Path, **options: object) -> Run:
    return start("rca", rca.Config(data="demo:tiny", out=folder, workers=0, accelerator="cpu", **options), takes=())


def train(run: Run, config: rca.RCAConfig = SMALL, threshold: float = 0.4) -> dict[str, Tensor]:
    """The whole state after training; a low threshold lets an untrained network fill the memory."""
    torch.manual_seed(0)
    make = rca.RegionMemoryBank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rca, "RegionMemoryBank", partial(make, threshold=threshold))
        return rca.train_rca(run, None, config).state_dict()


@pytest.mark.slow
def test_training_killed_and_resumed_gathers_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rca, "fit", partial(fit, checkpoint_seconds=0))
    whole = train(run_in(tmp_path / "whole"))
    assert whole["memory.filled"].sum() > 0
    assert whole["prototypes"].any()
    assert whole["attention.written"].all()

    forward, calls = rca.RegionalContrastLoss.forward, []

    def forward_until_killed(*arguments: object, **options: object) -> Tensor:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return forward(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(rca.RegionalContrastLoss, "forward", forward_until_killed)
        with pytest.raises(KeyboardInterrupt):
            train(run_in(tmp_path / "killed"))
    assert (tmp_path / "killed" / "checkpoints" / "rca.partial.pt").exists()
    resumed = train(run_in(tmp_path / "killed"))
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


@pytest.mark.slow
def test_read_out_contrast_and_attention_wait_for_their_epoch(tmp_path: Path) -> None:
    later = replace(SMALL, read_from=5, contrast_from=5)
    state = train(run_in(tmp_path / "later"), later)
    assert not state["prototypes"].any()
    assert state["memory.filled"].sum() > 0  # it fills from the start
    assert state["attention.written"].all()  # by the last epoch


def test_fine_head_is_a_stack_of_layers_for_each_class() -> None:
    fine = rca.class_maps(6, 3, stacks=3)
    x = torch.randn(2, 6, 5, 5)
    for k in range(3):
        y = x
        for layer in fine:
            if not isinstance(layer, torch.nn.Conv2d):
                y = y.relu()
                continue
            part = slice(k * len(layer.weight) // 3, (k + 1) * len(layer.weight) // 3)
            y = torch.nn.functional.conv2d(y, layer.weight[part], layer.bias[part], padding=layer.padding)
        torch.testing.assert_close(fine(x)[:, k : k + 1], y)


def test_saliency_is_asked_for_before_anything_is_trained(tmp_path: Path) -> None:
    config = replace(rca.PRESETS["tiny"], out=tmp_path / "run", saliency=str(tmp_path / "nowhere"), accelerator="cpu")
    with pytest.raises(ValueError, match=r"saliency: expected a folder of maps or of a c2am run, found no folder"):
        rca.main(config)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_one_class_has_no_region_and_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    config = replace(rca.PRESETS["tiny"], out=tmp_path / "run", workers=0, accelerator="cpu", classes=CLASSES[0])
    with pytest.raises(ValueError, match="classes: expected at least 2, since a region is where a class has more than"):
        rca.main(config)
    assert not (tmp_path / "run" / "checkpoints").exists()
