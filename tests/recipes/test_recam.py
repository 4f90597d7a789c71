"""ReCAM's fine-tuning: what can't work is told before the classifier is trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes import recam


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sce_weight": -1.0}, "sce_weight: expected at least 0, got -1.0"),
        ({"pool": "max"}, 'pool: expected "mean" or "mass", got \'max\''),
        ({"readout": "both"}, 'mode: expected "product", "sum", "recam" or "cam", got \'both\''),
        ({"readout": "cam", "clamp_negative": True}, "clamp_negative: expected mode=\"product\", got mode='cam'"),
    ],
    ids=["sce_weight", "pool", "readout", "clamp_negative"],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_trained(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny = recam.PRESETS["tiny"]
    config = replace(tiny, out=tmp_path / "run", accelerator="cpu", recam=replace(tiny.recam, **options))
    with pytest.raises(ValueError, match=message):
        recam.main(config)
    assert not (tmp_path / "run").exists()
