"""W-OoD's fine-tuning: what can't work is told before the classifier is trained; see also `test_outside.py`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes import wood


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 0}, "num_clusters, dim: expected at least 1, got 1, 0 and 1"),
        ({"step": -0.1}, "step: expected at least 0, got -0.1"),
        ({"topk": 20}, r"topk: expected a number in \[0, 1\], got 20"),
        ({"selection": "class"}, 'selection: expected "batch" or "image", got \'class\''),
        ({"refresh_every": 0}, "refresh_every: expected at least 1 epoch, got 0"),
    ],
    ids=["clusters", "step", "topk", "selection", "refresh_every"],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_trained(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny = wood.PRESETS["tiny"]
    config = replace(tiny, out=tmp_path / "run", accelerator="cpu", wood=replace(tiny.wood, **options))
    with pytest.raises(ValueError, match=message):
        wood.main(config)
    assert not (tmp_path / "run").exists()


def test_a_class_to_ignore_that_the_data_set_lacks_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Begun(Exception):
        pass

    def stop(*arguments: object) -> None:
        raise Begun

    tiny = wood.PRESETS["tiny"]
    config = replace(tiny, out=tmp_path / "run", accelerator="cpu", wood=replace(tiny.wood, ignore_top=("botle",)))
    monkeypatch.setattr(wood, "train_classifier", stop)
    with pytest.raises(Begun):
        wood.main(config)
    assert "has no botle" in capsys.readouterr().out
