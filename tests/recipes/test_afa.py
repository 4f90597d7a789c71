"""AFA's labels of a step, and backbones whose attention can be read."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric

from recipes import afa
from recipes.pipeline.attention import AttendingTrunk
from recipes.pipeline.run import start
from recipes.pipeline.segmenter import merge_views
from recipes.pipeline.training import AdamSchedule, Moment, warmup_adamw
from recipes.pipeline.transformers import TokenConfig

HYBRID = TokenConfig(weights="random", frozen_stages=3, dim=24, depth=2, heads=3, grid=4)


@pytest.mark.parametrize(
    "config",
    [HYBRID, TokenConfig(backbone="vit_tiny_patch16_224", weights="random"), TokenConfig("mit_b0", "random")],
    ids=lambda config: config.backbone,
)
def test_backbones_give_maps_and_square_attention_on_any_grid(config: TokenConfig) -> None:
    trunk = AttendingTrunk(config).eval()
    images = torch.rand(1, 3, 48, 80)
    out = trunk(images)
    assert out.final.shape == (1, trunk.out_channels, 3, 5)
    assert tuple(level.shape[1] for level in out.levels) == tuple(trunk.level_channels)
    assert sum(a.shape[1] for a in out.attentions) == trunk.num_maps
    assert {tuple(a.shape[2:]) for a in out.attentions} == {(15, 15)}
    again = trunk.encode(trunk.stem(images), attention=False)
    torch.testing.assert_close(again.final, out.final)


def test_labels_of_a_step_keep_out_of_the_padding_and_the_mode() -> None:
    torch.manual_seed(0)
    config = afa.AFAConfig(cam_scales=(1.0, 0.5), decoder_dim=8, par_steps=2)
    model = afa.AFANet(AttendingTrunk(HYBRID), 3, config).train()
    batch = {
        "image": torch.randn(2, 3, 64, 64),
        "labels": torch.tensor([[1.0, 0, 1], [0, 1, 0]]),
        "region": torch.tensor([[0, 0, 64, 64], [8, 0, 64, 48]]),
    }
    run = SimpleNamespace(fabric=Fabric(accelerator="cpu", devices=1))
    for walk in (False, True):
        plain, mask = afa.pseudo_labels(run, model, batch, config, walk)
        assert model.training
        assert set(plain[0].unique().tolist()) <= {0, 1, 3, 255}
        for label in (plain, mask):
            assert bool((label[1, 48:] == 255).all())
            assert bool((label[1, :, :8] == 255).all())
    out = model(batch["image"])
    assert out.affinity.shape == (2, 16, 16)
    assert out.seg_logits.shape == (2, 4, 16, 16)


def test_views_are_merged_by_the_largest_score() -> None:
    low, high = torch.zeros(2, 2, 4, 4), torch.ones(2, 2, 2, 2)
    high[1] = 3.0
    assert torch.equal(merge_views([low, high]), torch.full((1, 2, 4, 4), 2.0))


@pytest.mark.parametrize("crf", [False, True])
def test_a_crf_refines_the_masks_of_the_decoder_if_asked(crf: bool, tmp_path: Path) -> None:
    config = replace(afa.PRESETS["tiny"], out=tmp_path, workers=0, accelerator="cpu", segment_crf=crf)
    run = start("afa", config, takes=())
    model = afa.AFANet(AttendingTrunk(HYBRID), len(run.dataset.classes), config.afa).eval()
    afa.segment(run, model, config)
    written = {folder.name: len(list(folder.glob("*.png"))) for folder in tmp_path.glob("segmentation*")}
    assert written == dict.fromkeys(["segmentation", "segmentation_crf"] if crf else ["segmentation"], len(run.val))


def test_warm_up_may_start_from_a_given_share() -> None:
    schedule = AdamSchedule(1, 1, lr=1.0, head_lr=1.0, warmup=0.5, start=0.1, decay="poly")
    _, scheduler = warmup_adamw([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}], 8, schedule)
    rates = [scheduler.lr_lambdas[0](t) for t in range(8)]
    assert rates == pytest.approx([0.1, 0.325, 0.55, 0.775, 0.5, 0.375, 0.25, 0.125])


def test_when_a_step_learns_from_which_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(afa.PRESETS["tiny"], out=tmp_path, workers=0, accelerator="cpu")
    run = start("afa", config, takes=())
    classes = len(run.dataset.classes)
    model = afa.AFANet(AttendingTrunk(TokenConfig("vit_tiny_patch16_224", "random")), classes, config.afa)
    learnt, walked = [], []
    monkeypatch.setattr(afa, "fit", lambda *arguments: learnt.append(arguments[4]))

    def labels_of(run, model, batch, config, walk):
        walked.append(walk)
        label = torch.zeros(2, 72, 72, dtype=torch.int64)
        label[:, :, 36:] = 1
        return label, torch.full_like(label, 255) if walk else label

    monkeypatch.setattr(afa, "pseudo_labels", labels_of)
    afa.train(run, model, config.afa)
    batch = {"image": torch.randn(2, 3, 72, 72), "labels": torch.ones(2, classes)}  # 4 x 4 whole patches of 16
    terms = [learnt[0](model, batch, Moment(step, 100, 0, 1, 100)) for step in (0, 9, 10, 29, 30)]
    assert walked == [False, False, True]
    assert [bool(t.affinity > 0) for t in terms] == [False, False, True, True, True]
    assert [bool(t.segmentation > 0) for t in terms] == [False, False, True, True, False]


def test_masks_walk_at_size_1_and_labels_of_a_step_at_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    config = afa.AFAConfig(cam_scales=(1.0, 1.5, 0.5), decoder_dim=8)
    model, grids = afa.AFANet(AttendingTrunk(HYBRID), 3, config).eval(), []
    localise = afa.localise
    monkeypatch.setattr(afa, "localise", lambda *args: grids.append(localise(*args).grid) or localise(*args))
    batch = {"image": torch.randn(1, 3, 64, 64), "labels": torch.ones(1, 3), "region": torch.tensor([[0, 0, 64, 64]])}
    photo = torch.zeros(3, 64, 96, dtype=torch.uint8)
    run = SimpleNamespace(image=lambda name: photo, fabric=Fabric(accelerator="cpu", devices=1))
    afa.pseudo_labels(run, model, batch, config, walk=True)
    model.eval()
    with torch.no_grad():
        afa.found_in(run, model, "photo", (0.5, 1.5, 1.0))
    assert grids == [(6, 6), (4, 6)]


def test_merged_views_of_several_images_are_those_of_each() -> None:
    views = [torch.randn(4, 3, *size) for size in ((4, 6), (2, 3))]
    each = [merge_views([view[i::2] for view in views]) for i in range(2)]
    torch.testing.assert_close(merge_views(views), torch.cat(each))
