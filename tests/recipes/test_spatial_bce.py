"""Spatial-BCE's phases hand on how much of each image a class covers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes import spatial_bce
from recipes.pipeline.files import save_arrays
from recipes.pipeline.run import Run, start


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return start("spatial_bce", spatial_bce.Config(data="demo:tiny", out=tmp_path, workers=0, accelerator="cpu"))


def write(run: Run, phase: int, ratio: float, lost: str | None = None) -> None:
    """Give every class of every image the same ratio, and those of the image ``lost`` none."""
    for name in run.train:
        values = np.full(len(run.dataset.classes), 0.0 if name == lost else ratio)
        save_arrays(run.path(f"ratios{phase}", f"{name}.npz"), ratio=values)


def priors(run: Run, phase: int, **options: object) -> torch.Tensor:
    return spatial_bce.priors_of(run, phase, spatial_bce.SpatialConfig(**options))


def tags(run: Run) -> torch.Tensor:
    return torch.from_numpy(np.stack([run.dataset.labels(name) for name in run.train])).float()


def test_only_tagged_classes_have_a_prior(run: Run) -> None:
    write(run, 1, 0.25)
    torch.testing.assert_close(priors(run, 1), 0.25 * tags(run))


def test_a_class_that_the_masks_have_lost_keeps_the_prior_of_the_phase_before(run: Run) -> None:
    lost = run.train[3]
    write(run, 1, 0.25)
    write(run, 2, 0.5, lost)
    write(run, 3, 0.75, lost)
    expected = 0.75 * tags(run)
    expected[3] /= 3
    torch.testing.assert_close(priors(run, 3), expected)
    expected[3] = 0.0625 * tags(run)[3]
    torch.testing.assert_close(priors(run, 3, keep_lost=False, least_prior=0.0625), expected)


def test_a_class_without_any_mask_is_not_taught_to_be_nowhere(run: Run) -> None:
    write(run, 1, 0.25, run.train[0])
    torch.testing.assert_close(priors(run, 1, least_prior=0.125)[0], 0.125 * tags(run)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet18"}, "weights: expected those of resnet18, got a classifier with tf_efficientnet_lite0"),
        ({"cycle": 0}, "cycle: expected at least 1 step, got 0"),
        ({"network_steps": 5}, "network_steps: expected 0..4, the steps of a cycle, got 5"),
        ({"phases": 0}, "spatial.phases: expected at least 1, got 0"),
        ({"mid_channels": 2}, r"spatial.mid_channels: expected at least the \d classes, got 2"),
    ],
    ids=["backbone", "cycle", "network-steps", "phases", "mid-channels"],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_trained(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny = spatial_bce.PRESETS["tiny"]
    config = replace(tiny, out=tmp_path / "run", workers=0, accelerator="cpu", spatial=replace(tiny.spatial, **options))
    with pytest.raises(ValueError, match=message):
        spatial_bce.main(config)
    assert not (tmp_path / "run" / "checkpoints").exists()
