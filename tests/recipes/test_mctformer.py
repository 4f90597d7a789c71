"""MCTformer's networks on the hybrid: what they learn from, what they are read by, the maps they leave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from recipes import mctformer
from recipes.pipeline.cams import CamConfig, read_cam, write_cams
from recipes.pipeline.run import start
from recipes.pipeline.training import two_speed_groups
from wsss_losses import mctformer_loss

TINY = mctformer.PRESETS["tiny"]


def build(variant: str, seed: int = 0) -> tuple:
    torch.manual_seed(seed)
    run = SimpleNamespace(dataset=SimpleNamespace(classes=("cat", "dog", "cow")), weights=lambda wanted: "random")
    return mctformer.build(run, replace(TINY, mct=replace(TINY.mct, variant=variant)))


@pytest.mark.parametrize("variant", ["v1", "v2", "plus"])
def test_all_that_is_not_frozen_learns_and_new_parts_learn_faster(variant: str) -> None:
    trunk, model = build(variant)
    out = model.train()(torch.randn(2, 3, 64, 96))
    tokens = out.class_tokens if variant == "plus" else None
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    mctformer_loss(out.class_logits, out.patch_logits, tokens, labels).total.backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == learning
    assert any(".trunk.body.blocks." in name for name in learning)
    assert trunk.convolutional.body.conv_stem.weight.grad is None
    groups = two_speed_groups(model, mctformer.new_parts(trunk, model), TINY.mct.schedule)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert len(rates) == len(learning)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (1e-4 if ".trunk.body." in name else 1e-3), name


@pytest.mark.parametrize(("variant", "mode"), [("v1", "mct"), ("v2", "patchcam"), ("plus", "fused")])
@pytest.mark.parametrize("refine", [True, False])
def test_localizer_maps_every_class(variant: str, mode: str, refine: bool) -> None:
    trunk, model = build(variant)
    localizer = mctformer.Localizer(trunk, model, mode, refine).eval()
    with torch.no_grad():
        cam = localizer(torch.randn(2, 3, 48, 64)).cam
    assert cam.shape == (2, 3, 3, 4)
    assert (cam >= 0).all()
    assert cam.isfinite().all()


def test_strong_augmentation_depends_on_the_seed_of_torch_alone() -> None:
    trunk, _ = build("v1")
    transform = mctformer.augmentation(replace(TINY.mct, augmentation="strong", crop=32), trunk)
    image = tv_tensors.Image(torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8))

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return transform(image)

    assert draw(0).shape == (3, 32, 32)
    assert draw(0).dtype == torch.float32
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


class Parabola(torch.nn.Module):
    """Maps that grow to the right as the square of the column, whatever the image, in cells of 16 pixels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes, self.sizes = classes, []
        self.trunk = SimpleNamespace(mean=(0.5,) * 3, std=(0.5,) * 3, with_output_stride=lambda stride: self.trunk)

    def forward(self, images: torch.Tensor) -> mctformer.Maps:
        self.sizes.append(tuple(images.shape[2:]))
        columns = (torch.arange(images.shape[3] // 16) + 0.5) / (images.shape[3] // 16)
        return mctformer.Maps(columns.square().expand(len(images), self.classes, images.shape[2] // 16, -1))


def test_views_of_whole_cells_cover_the_image_and_stretched_maps_go_from_0_to_1(tmp_path: Path) -> None:
    run = start("mctformer", replace(TINY, out=tmp_path, workers=1, accelerator="cpu"), takes=())
    name, model = run.train[0], Parabola(len(run.dataset.classes))
    write_cams(run, model, [name], CamConfig(output_stride=16, scales=(1.3, 0.9)), stretch=True, whole_cells=True)
    assert all(side % 16 == 0 for size in model.sizes for side in size)
    stored = read_cam(run, name)
    assert stored.cam.shape[1:] == run.dataset.size(name)
    assert stored.cam.min() == 0
    assert stored.cam.max() == pytest.approx(1, abs=1e-3)  # stored in half precision
    # with the mirror image: lowest in the middle, the same on both sides, as long as no margin is left out
    np.testing.assert_allclose(stored.cam, stored.cam[..., ::-1], atol=2e-3)  # measured 0; 0.25 with views of any size
    middle = stored.cam.shape[2] // 2
    assert stored.cam[..., middle].max() < 0.05
    assert stored.cam[..., [0, -1]].min() > 0.9


@pytest.mark.parametrize(
    ("backbone", "variant", "mode"),
    [
        ("hybrid:tf_efficientnet_lite0", "v1", "mct"),
        ("hybrid:tf_efficientnet_lite0", "v2", "patchcam"),
        ("deit_small_patch16_224", "v2", "fused"),
        ("deit_small_patch16_224", "plus", "fused"),
        ("deit_small_patch16_224", "v1", "mct"),
    ],
)
def test_the_maps_that_are_the_seeds_by_default(backbone: str, variant: str, mode: str) -> None:
    preset = mctformer.PRESETS["demo"]
    tokens, mct = replace(preset.tokens, backbone=backbone), replace(preset.mct, variant=variant)
    assert mctformer.mode_of(replace(preset, tokens=tokens, mct=mct)) == mode


def test_attention_that_cannot_be_read_is_told_before_the_training() -> None:
    run = SimpleNamespace(dataset=SimpleNamespace(classes=("cat", "dog")), weights=lambda wanted: "random")
    tokens = replace(TINY.tokens, backbone="cait_xxs24_224")
    with pytest.raises(TypeError, match="block: expected attention by products of queries and keys alone"):
        mctformer.build(run, replace(TINY, tokens=tokens))
    with pytest.raises(ValueError, match="n_layers: expected at least 1, got 0"):
        mctformer.build(run, replace(TINY, mct=replace(TINY.mct, layers=0)))
