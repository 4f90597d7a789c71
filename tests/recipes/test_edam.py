"""EDAM trains on pairs of images, and labels by saliency."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recipes import edam
from recipes.pipeline.models import build_trunk
from recipes.pipeline.run import Run, start
from recipes.pipeline.training import RandomScale, TaggedCrops, crop_transform, poly_sgd, two_speed_groups


def run_in(folder: Path) -> Run:
    return start("edam", edam.Config(data="demo:tiny", out=folder, workers=0, accelerator="cpu"), takes=())


def test_pairs_share_a_class_and_follow_the_seed(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    transform = crop_transform(RandomScale(0.3, 0.5), 32, (0.5,) * 3, (0.5,) * 3)
    pairs = edam.PairsOfCrops(TaggedCrops(run.dataset, run.train, transform))
    assert len(pairs) == len(run.train)
    for index in range(4):
        torch.manual_seed(index)
        item = pairs[index]
        assert item["image"].shape == (2, 3, 32, 32)
        assert item["labels"].prod(0).any()
        assert item["labels"][0].tolist() == run.dataset.labels(run.train[index]).tolist()
        torch.manual_seed(index)
        again = pairs[index]
        assert all(torch.equal(again[key], value) for key, value in item.items())


def test_transformers_learn_as_slowly_as_the_backbone() -> None:
    trunk = build_trunk("tf_efficientnet_lite0", "random", 32)
    model = edam.EDAM(trunk, 3, edam.EDAMConfig(width=8))
    groups = two_speed_groups(model, edam.fast_parts(model), edam.EDAMConfig().schedule, double_biases=True)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    fast, slow = edam.EDAMConfig().schedule.head_lr, edam.EDAMConfig().schedule.lr
    attention = model.head.attention
    assert rate[id(model.head.activation.conv.weight)] == rate[id(attention.classifier)] == fast
    assert rate[id(attention.blocks[0].qkv_weight)] == rate[id(attention.embedding.segment.weight)] == slow


def test_learning_rate_rises_and_then_falls() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer, scheduler = poly_sgd([{"params": [parameter], "lr": 2.0}], 12, momentum=0.9, warmup=4)
    rates = []
    for _ in range(14):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.2, 0.65, 1.1, 1.55, 2.0])
    assert rates[8] == pytest.approx(2 * 0.5**0.9)
    assert rates[11] == rates[12] == rates[13] > 0


def test_saliency_is_asked_for_before_anything_is_trained(tmp_path: Path) -> None:
    config = replace(edam.PRESETS["tiny"], out=tmp_path / "run", saliency=str(tmp_path / "nowhere"), accelerator="cpu")
    with pytest.raises(ValueError, match=r"saliency: expected a folder of maps or of a c2am run, found no folder"):
        edam.main(config)
    assert not (tmp_path / "run" / "checkpoints").exists()
