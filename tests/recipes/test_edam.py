"""EDAM trains on pairs of images, and labels by saliency."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import edam
from recipes.pipeline.models import build_trunk, make_body
from recipes.pipeline.run import Run, start
from recipes.pipeline.training import RandomScale, Schedule, TaggedCrops, crop_transform, poly_sgd
from wsss_modules import ResNet38


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


def test_rates_and_decay_of_backbone_heads_and_transformers() -> None:
    trunk = build_trunk("tf_efficientnet_lite0", "random", 32)
    model, schedule = edam.EDAM(trunk, 3, edam.EDAMConfig(width=8)), Schedule(1, 1, lr=0.001, head_lr=0.01)
    groups = edam.parameter_groups(model, schedule)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    head, slow, fast = model.head, (0.001, 1e-4), (0.01, 1e-4)
    for parameter in (head.activation.conv.weight, head.project.weight, head.attention.classifier):
        assert found[id(parameter)] == fast
    for part in (head.attention.embedding, head.attention.blocks):
        assert all(found[id(parameter)] == slow for parameter in part.parameters()), "biases and norms too"
    for name, parameter in trunk.named_parameters():
        assert found[id(parameter)] == ((0.002, 0.0) if name.endswith("bias") else slow), name


def test_paper_takes_about_the_published_number_of_steps() -> None:
    schedule, warmup = edam.PRESETS["paper"].edam.schedule, edam.PRESETS["paper"].edam.warmup
    steps = schedule.epochs * (10582 // schedule.batch_size)  # an image is the first of one pair an epoch
    assert steps == pytest.approx(33050, rel=0.05)
    assert warmup * steps == pytest.approx(2000, rel=0.05)


def test_paper_reads_masks_off_signed_features() -> None:
    config = edam.PRESETS["paper"].edam
    with torch.device("meta"):
        body = make_body(config.backbone, config.output_stride)
    assert isinstance(body, ResNet38)
    assert not body.final_relu


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


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        (None, {"alpha": 0.9, "beta": 0.5}, "alpha: expected at most beta = 0.5, got 0.9"),
        ("edam", {"normalization": "l2"}, 'normalization: expected "l2_abs", "softmax" or "sigmoid", got \'l2\''),
        ("edam", {"heads": 3}, "heads: expected a divisor of width = 16, got 3"),
        ("edam", {"classes": 99}, "count: expected 1..[0-9], got 99"),
    ],
    ids=["alpha", "normalization", "heads", "classes"],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_trained(
    part: str | None, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny = edam.PRESETS["tiny"]
    changed = options if part is None else {part: replace(getattr(tiny, part), **options)}
    with pytest.raises(ValueError, match=message):
        edam.main(replace(tiny, out=tmp_path / "run", accelerator="cpu", **changed))
    assert not (tmp_path / "run" / "checkpoints").exists()
