"""SIPE's maps have a background of their own, which the files other recipes share have no channel for."""

from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes import sipe
from recipes.pipeline.run import Run, start
from wsss_modules import cam_to_mask


def run_in(folder: Path) -> Run:
    return start("sipe", sipe.Config(data="demo:tiny", out=folder, workers=0, accelerator="cpu"), takes=())


@given(st.integers(0, 99))
def test_shares_above_one_half_are_the_argmax_with_the_background(seed: int) -> None:
    scores = torch.rand(4, 6, 7, generator=torch.Generator().manual_seed(seed))
    scores[:, 0, 0] = 0  # nothing at all is background
    shares = sipe.share_of_classes(scores)
    assert ((shares >= 0) & (shares <= 1)).all()
    assert torch.equal(cam_to_mask(shares[None], 0.5)[0], scores.argmax(0))


def test_crops_know_their_padding(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    config = sipe.ClassifyConfig(weights="random", long_side=(60, 60), crop=96)
    trunk = sipe.make_trunk(run, config, config.output_stride)
    torch.manual_seed(0)
    item = sipe.CropsWithInside(run, config, trunk)[0]
    height, width = run.dataset.size(run.train[0])
    assert item["inside"].shape == (1, 96, 96)
    share = round(60 * height / max(height, width)) * round(60 * width / max(height, width)) / 96**2
    assert abs(float(item["inside"].float().mean()) - share) < 1e-6
    assert not item["image"][:, item["inside"][0] == 0].any(), "padded with 0 after the normalisation"


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
