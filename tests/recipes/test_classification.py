"""A network may go on from the plain classifier, which is then a stage of its own."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recipes import rca
from recipes.pipeline.classification import classifier_before, make_trunk, stages_before
from recipes.pipeline.run import Run, start

TINY = rca.PRESETS["tiny"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return start("rca", replace(TINY, out=tmp_path, workers=0, accelerator="cpu", max_steps=1))


def test_network_goes_on_from_the_plain_classifier(run: Run) -> None:
    classifier = classifier_before(run, TINY.rca, TINY.classify)
    assert list(run.metrics["stages"]) == list(stages_before(TINY.rca)) == ["classify"]
    trunk = make_trunk(run, TINY.rca, TINY.rca.output_stride, classifier.trunk)
    ours, theirs = trunk.body.state_dict(), classifier.trunk.body.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_network_with_other_weights_needs_no_classifier(run: Run) -> None:
    other = replace(TINY.rca, weights="random")
    assert classifier_before(run, other, TINY.classify) is None
    assert run.metrics["stages"] == {}
    assert stages_before(other) == ()
