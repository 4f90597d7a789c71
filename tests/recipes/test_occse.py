"""OC-CSE's second network learns under a judge that stays what it is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import occse
from recipes.pipeline.classification import build_classifier
from recipes.pipeline.run import Run, start
from recipes.pipeline.training import Schedule

NETWORK = replace(occse.PRESETS["tiny"].classify, weights="random", crop=64)
LEARNER = replace(NETWORK, schedule=Schedule(epochs=3, batch_size=8, lr=0.01, head_lr=0.1))


def run_in(folder: Path) -> Run:
    return start("occse", occse.Config(data="demo:tiny", out=folder, workers=0, accelerator="cpu"))


def trained(
    folder: Path, erasing: occse.ErasingConfig, weights: str = "random"
) -> tuple[occse.Learner, dict[str, torch.Tensor], Run]:
    """The learner, the judge's weights before it learnt, and the run; the judge is asserted not to change."""
    run = run_in(folder)
    torch.manual_seed(0)
    judge = build_classifier(run, NETWORK).eval()
    before = {name: value.clone() for name, value in judge.state_dict().items()}
    learner = occse.train_learner(run, judge, replace(LEARNER, weights=weights), erasing)
    assert all(torch.equal(value, before[name]) for name, value in judge.state_dict().items())
    return learner, before, run


def test_the_weight_of_the_judge_grows_from_epoch_to_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, real = [], occse.class_specific_erasing_loss

    def noted(*arguments: Any, weight: float) -> Any:
        weights.append(weight)
        return real(*arguments, weight=weight)

    monkeypatch.setattr(occse, "class_specific_erasing_loss", noted)
    _, _, run = trained(tmp_path, occse.ErasingConfig())
    assert weights == pytest.approx([w for w in (0.3, 0.65, 1.0) for _ in range(len(run.train) // 8)])


def test_the_judge_is_not_part_of_the_checkpoint(tmp_path: Path) -> None:
    learner, judge, run = trained(tmp_path, occse.ErasingConfig(parts=2))
    stored = torch.load(run.path("checkpoints", "erase.pt"), weights_only=True)["model"]
    assert stored.keys() == learner.state_dict().keys() == judge.keys()
    assert not torch.equal(stored["head.classifier.weight"], judge["head.classifier.weight"])


@pytest.mark.parametrize("weights", ["random", "classifier"])
def test_the_learner_starts_where_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    monkeypatch.setattr(occse, "fit", lambda *_: None)  # so that the learner comes back as it started
    learner, judge, _ = trained(tmp_path, occse.ErasingConfig(), weights=weights)
    for name in ("head.classifier.weight", "trunk.body.conv_stem.weight"):
        assert torch.equal(learner.state_dict()[name], judge[name]) == (weights == "classifier")


def test_the_published_preset_starts_from_pretrained_weights() -> None:
    short = {name for name, config in occse.PRESETS.items() if config.learner.weights == "classifier"}
    assert short == {"demo", "small", "tiny"}
