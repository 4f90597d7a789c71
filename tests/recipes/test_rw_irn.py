"""What PSA and IRN refuse before the classifier is trained."""

from dataclasses import replace
from pathlib import Path

import pytest

from recipes import irn, rw


@pytest.mark.parametrize(
    ("affinity", "walk", "message"),
    [
        ({"backbone": "resnet50"}, {}, r"weights: expected those of resnet50, got a classifier with tf_efficientnet"),
        ({"radius": 1}, {}, r"radius: expected an integer of at least 2, got 1"),
        ({}, {"steps": -1}, r"n_steps: expected an integer >= 0, got -1"),
        ({}, {"method": "lanczos"}, r"method: expected 'power' or 'chebyshev', got 'lanczos'"),
    ],
)
def test_rw_tells_a_wrong_option_at_once(affinity: dict, walk: dict, message: str, tmp_path: Path) -> None:
    config = replace(rw.PRESETS["tiny"], out=tmp_path / "run", accelerator="cpu")
    config = replace(config, affinity=replace(config.affinity, **affinity), walk=replace(config.walk, **walk))
    with pytest.raises(ValueError, match=message):
        rw.main(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("relation", "walk", "message"),
    [
        ({"background": 0.4}, {}, r"relation.background: expected at most relation.foreground = 0.3, got 0.4"),
        ({"radius": 1}, {}, r"radius: expected an integer of at least 2, got 1"),
        ({}, {"radius": 0}, r"radius: expected an integer of at least 2, got 0"),
        ({}, {"steps": -1}, r"n_steps: expected an integer >= 0, got -1"),
    ],
)
def test_irn_tells_a_wrong_option_at_once(relation: dict, walk: dict, message: str, tmp_path: Path) -> None:
    config = replace(irn.PRESETS["tiny"], out=tmp_path / "run", accelerator="cpu")
    config = replace(config, relation=replace(config.relation, **relation), walk=replace(config.walk, **walk))
    with pytest.raises(ValueError, match=message):
        irn.main(config)
    assert not (tmp_path / "run").exists()
