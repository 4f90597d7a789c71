"""SIPE's maps have a background of their own, which the files other recipes share have no channel for."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes import sipe
from recipes.pipeline.run import Run, start


def run_in(folder: Path) -> Run:
    return start("sipe", sipe.Config(data="demo:tiny", out=folder, workers=0, accelerator="cpu"), takes=())


def test_maps_are_written_with_and_without_the_background(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    torch.manual_seed(0)
    trunk = sipe.make_trunk(run, sipe.ClassifyConfig(weights="random"), 16)
    model = sipe.SIPE(trunk, len(run.dataset.classes), sipe.ExploreConfig(side_channels=(4, 4, 8)))
    name = run.train[0]
    sipe.write_maps(run, model, (name,), sipe.CamConfig(scales=(1.0,)))
    keys, scores = sipe.read_maps(run, name)
    assert keys.tolist() == (np.flatnonzero(run.dataset.labels(name)) + 1).tolist()
    assert scores.shape == (1, 1 + len(keys), *run.dataset.size(name))
    with np.load(run.path("cam", f"{name}.npz")) as stored:
        assert stored["cam"].shape == (len(keys), *scores.shape[2:])
        assert stored["keys"].tolist() == keys.tolist()


def test_a_wrong_option_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    config = replace(sipe.PRESETS["tiny"], out=tmp_path / "run", accelerator="cpu")
    with pytest.raises(ValueError, match=r"bg_doubt: expected a number in \[0, 1\], got 1.5"):
        sipe.main(replace(config, bg_doubt=1.5))
    with pytest.raises(ValueError, match=r"n_steps: expected an integer >= 0, got -1"):
        sipe.main(replace(config, walk=replace(config.walk, steps=-1)))
    assert not (tmp_path / "run").exists()
