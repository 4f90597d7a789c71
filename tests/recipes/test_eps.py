"""EPS's training step, with and without padding, and where its saliency comes from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recipes import eps
from recipes.pipeline.run import start
from recipes.pipeline.saliency import saliency_source
from recipes.pipeline.training import Moment
from wsss_losses import EPSTerms, eps_loss

NETWORK = replace(eps.PRESETS["tiny"].eps, weights="random", crop=192)  # the images are smaller


def step_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[eps.EPSNet, dict[str, torch.Tensor], EPSTerms]:
    """The network, two images and the terms of a step, without any training."""
    config = eps.Config(data="demo:tiny", out=folder, workers=0, accelerator="cpu", eps=NETWORK, **options)
    caught: dict[str, Any] = {}
    monkeypatch.setattr(eps, "fit", lambda run, stage, net, crops, loss_of, *_: caught.update(c=crops, l=loss_of))
    run = start("eps", config, takes=())
    torch.manual_seed(0)
    net = eps.train_eps(run, config, saliency_source(run)).eval()
    items = [caught["c"][i] for i in range(2)]
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    return net, batch, caught["l"](net, batch, Moment(0, 10, 0, 2, 5))


def test_padding_is_background_unless_it_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for background in (True, False):
        net, batch, terms = step_of(tmp_path / str(background), monkeypatch, padding_is_background=background)
        salient = batch["saliency"]
        padded = salient == eps.PADDING
        assert padded.any()
        assert not padded.all()
        assert 0 <= salient[~padded].min() < salient[~padded].max() <= 1
        with torch.no_grad():
            out = net(batch["image"])
            zeroed = torch.where(padded, 0.0, salient)
            expected = eps_loss(out.logits, out.scores, zeroed, batch["labels"], None if background else ~padded)
        torch.testing.assert_close(terms.total, expected.total)
        found[background] = terms.saliency
    assert found[True] != found[False]


def test_every_map_learns_and_classes_are_what_the_softmax_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, batch, terms = step_of(tmp_path, monkeypatch)
    terms.total.backward()
    gradient = net.head.classifier.weight.grad
    assert all(gradient[channel].any() for channel in range(len(gradient)))
    out = net(batch["image"])
    assert out.cam.shape[1] == out.scores.shape[1] - 1 == out.logits.shape[1]
    torch.testing.assert_close(out.cam.sum(1), 1 - out.scores.softmax(1)[:, 0])


def test_a_missing_map_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    config = replace(eps.PRESETS["tiny"], out=tmp_path / "run", saliency=str(tmp_path / "maps"), accelerator="cpu")
    run = start("eps", replace(config, out=tmp_path / "other"), takes=())
    (tmp_path / "maps").mkdir()
    for name in run.train[1:]:
        Image.fromarray(np.zeros(run.dataset.size(name), np.uint8)).save(tmp_path / "maps" / f"{name}.png")
    with pytest.raises(ValueError, match=f"has no .png or .npz for .*{run.train[0]}"):
        eps.main(config)
    assert not (tmp_path / "run" / "checkpoints").exists()
