"""C2AM's second network: what can't work is told before the classifier is trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes import c2am


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("contrast", {"backbone": "resnet18"}, "weights: expected those of resnet18, got a classifier with tf_effici"),
        ("contrast", {"alpha": -1.0}, "alpha: expected at least 0, got -1.0"),
        ("contrast", {"normalize": "n"}, "normalize: expected 'n2', 'pairs' or 'weights', got 'n'"),
        ("contrast", {"border": 0}, "border: expected at least 1, got 0"),
        ("cue", {"invert": "minus"}, 'invert: expected "one_minus" or "negate", got \'minus\''),
    ],
    ids=["backbone", "alpha", "normalize", "border", "invert"],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_trained(
    part: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny = c2am.PRESETS["tiny"]
    changed = {part: replace(getattr(tiny, part), **options)}
    with pytest.raises(ValueError, match=message):
        c2am.main(replace(tiny, out=tmp_path / "run", accelerator="cpu", **changed))
    assert not (tmp_path / "run").exists()
