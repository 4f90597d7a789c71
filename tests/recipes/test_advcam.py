"""AdvCAM's maps: one step is the plain CAM, and more steps are another map."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes import advcam
from recipes.pipeline.cams import read_cam, write_cams
from recipes.pipeline.classification import build_classifier
from recipes.pipeline.run import Run, start

NETWORK = replace(advcam.PRESETS["tiny"].classify, weights="random")


def run_in(folder: Path) -> Run:
    return start("advcam", advcam.Config(data="demo:tiny", out=folder, workers=0, accelerator="cpu"))


@pytest.mark.slow
def test_one_step_writes_the_plain_cam_and_more_steps_another(tmp_path: Path) -> None:
    runs = [run_in(tmp_path / name) for name in ("plain", "one", "three")]
    torch.manual_seed(0)
    classifier = build_classifier(runs[0], NETWORK)
    names, cams = runs[0].train[:3], replace(advcam.PRESETS["tiny"].cams, scales=(1.0, 0.5))
    write_cams(runs[0], classifier, names, cams)
    for run, steps in zip(runs[1:], (1, 3), strict=True):
        advcam.write_climbed_cams(run, classifier, names, cams, advcam.ClimbConfig(steps=steps))
    for name in names:
        plain, one, three = (read_cam(run, name) for run in runs)
        assert plain.keys.tolist() == one.keys.tolist() == three.keys.tolist()
        # the scale of the regions differs from that of the CAMs, which the 1e-5 under the maximum shows
        np.testing.assert_allclose(one.cam, plain.cam, atol=0.03)
        assert np.abs(three.cam - plain.cam).max() > 1e-3


def test_the_published_preset_climbs_as_released() -> None:
    climb, cams = advcam.PRESETS["paper"].climb, advcam.PRESETS["paper"].cams
    assert (climb.steps, climb.step_size, climb.ad_coeff, climb.threshold) == (27, 0.08, 7.0, 0.5)
    assert climb.legacy_scale_weight
    assert set(cams.scales) == {0.5, 1.0, 1.5, 2.0}
    assert advcam.PRESETS["paper"].walk.cam_power == 1.5
