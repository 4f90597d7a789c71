"""Settings that cannot be are told before anything is done: no folder is made, nothing is trained."""

import dataclasses
import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from recipes.cli import discover
from recipes.pipeline import checks
from recipes.pipeline.checks import check_settings
from recipes.pipeline.models import make_body
from recipes.pipeline.training import AdamSchedule, Schedule

LITE1 = "tf_efficientnet_lite1"
CASES = {
    "advcam": [({"climb.steps": 0}, "steps: expected at least 1")],
    "aeft": [
        ({"triplet.margin": -0.1}, "margin: expected at least 0, got -0.1"),
        ({"triplet.min_hard": -1}, "min_hard: expected at least 0, got -1"),
        ({"walk.steps": -1}, "steps: expected"),
    ],
    "afa": [
        ({"afa.low": 0.6}, "afa.low: expected at most afa.high = 0.55, got 0.6"),
        ({"afa.par_steps": -1}, "num_iter, w1: expected at least 0"),
        ({"afa.dilations": ()}, "dilations: expected at least one number of pixels"),
        ({"afa.radius": -1}, "radius: expected at least 0 or None, got -1"),
        ({"afa.seg_weight": -0.1}, "seg_weight: expected at least 0, got -0.1"),
        ({"afa.cam_scales": ()}, r"afa.cam_scales: expected at least one size, each above 0, got \(\)"),
    ],
    "bana": [
        ({"temperature": 0.0}, "^temperature: expected"),
        ({"gamma": -1.0}, "^gamma: expected"),
        ({"lam": -0.1}, "^lam: expected"),
    ],
    "bbam": [
        ({"explain.lr": -1.0}, "^lr: expected at least 0"),
        ({"explain.stride": (0.0, 10.0)}, "^smallest, growth: expected above 0"),
        ({"explain.at_once": 0}, "^explain: expected at least 1 of at_once"),
        ({"masks.strict": 85.0}, r"^theta: expected a number in \[0, 1\], got 85"),
        ({"mask_head.threshold": 9.0}, r"^threshold: expected a number in \[0, 1\]"),
    ],
    "c2am": [
        ({"contrast.backbone": "resnet18"}, "weights: expected those of resnet18, got a classifier with tf_effici"),
        ({"contrast.alpha": -1.0}, "alpha: expected at least 0, got -1.0"),
        ({"contrast.normalize": "n"}, "normalize: expected 'n2', 'pairs' or 'weights', got 'n'"),
        ({"contrast.border": 0}, "border: expected at least 1, got 0"),
        ({"cue.invert": "minus"}, 'invert: expected "one_minus" or "negate", got \'minus\''),
    ],
    "cam": [
        ({"cams.scales": ()}, r"^cams.scales: expected at least one size, each above 0, got \(\)"),
        ({"classify.backbone": "mobilenetv3_small_100"}, "^cams.output_stride: mobilenetv3_small_100 cannot"),
        ({"classify.output_stride": 12}, "^classify.output_stride: expected 8, 16 or 32, got 12"),
        ({"classify.backbone": "resnet51"}, "^classify.backbone: 'resnet51' is not a timm model; did you mean"),
        ({"segment.encoder": "resnet51"}, "^segment.encoder: 'resnet51' is not a timm model; did you mean"),
        ({"segment.encoder": "resnet38"}, "^segment.encoder: expected .* got 'resnet38' .Unknown model"),
        ({"segment.encoder": "resnet50-irn"}, "^segment.encoder: expected .* got 'resnet50-irn'"),
        ({"segment.encoder": "vgg16"}, "^segment.encoder: expected .* got 'vgg16'; deeplabv2 and largefov also"),
        ({"segment.encoder": "vit_tiny_patch16_224"}, "^segment.encoder: expected .* got 'vit_tiny_patch16_224'"),
        ({"segment.output_stride": 32}, "^segment.encoder: expected .* with cells of 32 pixels"),
        (
            {
                "segment.architecture": "deeplabv2",
                "segment.encoder": "vit_tiny_patch16_224",
                "segment.output_stride": 32,
            },
            "^segment.encoder: expected a network with maps of images of any size, got 'vit_tiny_patch16_224'",
        ),
        ({"classify.backbone": "swin_tiny_patch4_window7_224"}, "^classify.backbone: expected a network with maps"),
        ({"classify.backbone": "resnet50.nowhere"}, "^classify.backbone: Invalid pretrained tag"),
        (
            {"segment.encoder": "convnext_atto", "segment.weights": "imagenet"},
            "^segment.encoder: deeplabv3plus cannot read pretrained weights of convnext_atto",
        ),
        ({"classify.backbone": "vgg16"}, "^classify.frozen_stages: expected 0 with a VGG; only ResNets, EfficientNets"),
        ({"classify.backbone": "tf_efficientnet_lite0-irn"}, "^classify.backbone: expected a ResNet of timm before"),
        ({"segment.weights": "no.pt"}, "^segment.weights: expected imagenet, random or a file, got 'no.pt'"),
        ({"segment.scale": (1.5, 0.5)}, r"^segment.scale: expected the lower bound first, both above 0, got \(1.5, 0"),
        ({"segment.test_scales": (1.0, 0.0)}, "^segment.test_scales: expected at least one size, each above 0"),
        ({"segment.crop": 0}, "^segment.crop: expected at least 1, got 0"),
        ({"segment.schedule.batch_size": 0}, "^segment.schedule.batch_size: expected at least 1, got 0"),
        ({"segment.schedule.momentum": 1.0}, r"^segment.schedule.momentum: expected a number in \[0, 1\), got 1.0"),
        ({"segment.schedule.lr": -0.1}, "^segment.schedule.lr: expected at least 0, got -0.1"),
        ({"classify.long_side": (400, 256)}, "^classify.long_side: expected at least 1 pixel, of a range the lower"),
        ({"max_steps": 0}, "^max_steps: expected at least 1, got 0"),
    ],
    "clims": [
        ({"clims.weights": (10.0, -24.0, 1.0, 0.2)}, "background_weight: expected at least 0, got -24"),
        ({"clims.objective": "camera_ready", "clims.leak": -1.0}, "leak: expected at least 0, got -1"),
    ],
    "edam": [({"edam.heads": 3}, "^heads: expected a divisor of width = 16, got 3")],
    "eps": [({"foreground_weight": 2.0}, r"foreground_weight: expected a number in \[0, 1\], got 2")],
    "irn": [
        ({"relation.background": 0.4}, r"relation.background: expected at most relation.foreground = 0.3, got 0.4"),
        ({"relation.radius": 1}, "radius: expected an integer of at least 2, got 1"),
        ({"walk.radius": 0}, "radius: expected an integer of at least 2, got 0"),
        ({"walk.steps": -1}, "n_steps: expected an integer >= 0, got -1"),
    ],
    "l2g": [
        ({"l2g.crop": 200}, r"crop: expected 1 x 1 pixels up to size \(128, 128\), got \(200, 200\)"),
        ({"l2g.crops": 3}, "number: expected at least the four corners, got 3"),
        ({"l2g.crops": 0, "l2g.corners": False}, "l2g.crops: expected at least 1, got 0"),
        ({"l2g.weight": -1.0}, "weight: expected at least 0, got -1.0"),
        ({"l2g.threshold": -1.0}, "threshold: expected at least 0, got -1.0"),
    ],
    "mctformer": [({"mct.variant": "v1", "mct.mode": "patchcam"}, "mct.mode: expected .* for v1")],
    "nsrom": [({"dilation": 0}, "dilation: expected at least 1 pixel, got 0")],
    "occse": [
        ({"learner.backbone": "resnet18", "learner.weights": "random"}, "learner.backbone: expected the normalisation"),
        ({"learner.backbone": LITE1}, f"weights: expected those of {LITE1}, got a classifier with"),
        ({"erasing.first_weight": -0.1}, "erasing.first_weight: expected at least 0, got -0.1"),
        ({"erasing.last_weight": -1.0}, "erasing.last_weight: expected at least 0, got -1.0"),
        ({"erasing.normalise": "class"}, 'normalise: expected "batch" or "image", got \'class\''),
        ({"erasing.parts": 0}, "parts: expected at least 1 or None, got 0"),
        ({"walk.steps": -1}, "steps: expected"),
    ],
    "ppc": [
        ({"saliency": "maps"}, "saliency: only --variant eps reads it, got maps with --variant seam"),
        ({"affinity.backbone": "resnet50"}, "weights: expected those of resnet50, got a classifier with tf_efficientn"),
    ],
    "rca": [
        ({"rca.read_out": "sum"}, 'scale: expected "released", "mean" or a number, got \'sum\''),
        ({"rca.prototypes": 0}, "prototypes: expected at least 1, got 0"),
        ({"rca.slots": 0}, "slots: expected at least 1, got 0"),
        ({"rca.channels": 0}, "channels: expected at least 1, got 0"),
        ({"rca.size": 0}, "rca.size: expected at least 1 pixel, got 0"),
    ],
    "recam": [
        ({"recam.sce_weight": -1.0}, "sce_weight: expected at least 0, got -1.0"),
        ({"recam.pool": "max"}, 'pool: expected "mean" or "mass", got \'max\''),
        ({"recam.readout": "both"}, 'mode: expected "product", "sum", "recam" or "cam", got \'both\''),
        ({"recam.readout": "cam", "recam.clamp_negative": True}, 'clamp_negative: expected mode="product", got mode='),
    ],
    "reviewkd": [
        ({"student.depth": 2}, "student.depth: expected 3 to 5, got 2"),
        ({"student.mid_channels": 0}, "student.decoder_channels, student.mid_channels: expected at least 1, got 64"),
        ({"student.warmup": -1}, "student.weight, student.warmup: expected at least 0, got 1.0 and -1"),
    ],
    "rw": [
        ({"affinity.backbone": "resnet50"}, "weights: expected those of resnet50, got a classifier with tf_efficientn"),
        ({"affinity.radius": 1}, "radius: expected an integer of at least 2, got 1"),
        ({"walk.steps": -1}, "n_steps: expected an integer >= 0, got -1"),
        ({"walk.method": "lanczos"}, "method: expected 'power' or 'chebyshev', got 'lanczos'"),
    ],
    "sipe": [({"bg_doubt": 1.5}, r"bg_doubt: expected a number in \[0, 1\], got 1.5")],
    "spatial_bce": [
        ({"spatial.phases": 0}, "spatial.phases: expected at least 1, got 0"),
        ({"spatial.backbone": LITE1, "spatial.weights": "classifier"}, f"weights: expected those of {LITE1}, got a c"),
    ],
    "vitpcm": [({"test_scale": 0.0}, "test_scale: expected a number above 0, got 0.0")],
    "wood": [
        ({"wood.clusters": 0}, "num_clusters, dim: expected at least 1, got 1, 0 and 1"),
        ({"wood.step": -0.1}, "step: expected at least 0, got -0.1"),
        ({"wood.topk": 20}, r"topk: expected a number in \[0, 1\], got 20"),
        ({"wood.selection": "class"}, 'selection: expected "batch" or "image", got \'class\''),
        ({"wood.refresh_every": 0}, "refresh_every: expected at least 1 epoch, got 0"),
    ],
}


def recipe(name: str) -> ModuleType:
    return importlib.import_module(f"recipes.{name}")


def changed(config: Any, place: str, value: object) -> Any:
    """The settings with one of them, ``part.part.name``, replaced."""
    name, _, rest = place.partition(".")
    return replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})


def schedules(config: Any, place: str = "") -> Iterator[str]:
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if isinstance(value, Schedule | AdamSchedule):
            yield f"{place}{entry.name}"
        elif dataclasses.is_dataclass(value):
            yield from schedules(value, f"{place}{entry.name}.")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        pytest.param(name, changes, message, id=f"{name}-{'-'.join(changes)}")
        for name, cases in CASES.items()
        for changes, message in cases
    ],
)
def test_what_cannot_be_is_told_before_anything_is_done(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = replace(recipe(name).PRESETS["tiny"], out=tmp_path / "run", accelerator="cpu")
    for place, value in changes.items():
        config = changed(config, place, value)
    with pytest.raises(ValueError, match=message):
        recipe(name).main(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", discover())
def test_every_training_of_every_recipe_is_looked_at_first(name: str, tmp_path: Path) -> None:
    assert name in CASES
    tiny = replace(recipe(name).PRESETS["tiny"], out=tmp_path / "run", accelerator="cpu")
    places = list(schedules(tiny))
    assert places
    for place in places:
        with pytest.raises(ValueError, match=f"^{place}.epochs: expected at least 1, got 0$"):
            recipe(name).main(changed(tiny, f"{place}.epochs", 0))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", discover())
def test_presets_pass(name: str) -> None:
    for config in recipe(name).PRESETS.values():
        check_settings(config)


def test_a_file_of_weights_passes_only_if_it_is_there(tmp_path: Path) -> None:
    place = tmp_path / "weights.pt"
    config = changed(recipe("cam").PRESETS["tiny"], "classify.weights", str(place))
    with pytest.raises(ValueError, match=r"^classify.weights: expected imagenet, random or a file, got '.*weights.pt'"):
        check_settings(config)
    place.touch()
    check_settings(config)


def test_a_recipe_of_ones_own_may_have_settings_of_another_kind() -> None:
    @dataclasses.dataclass(frozen=True)
    class Own:
        scale: float = 0.5
        scales: float = 2.0
        long_side: str = "224"
        backbone: str = "a network of mine"

    check_settings(Own())


def test_a_backbone_that_cannot_be_made_without_memory_is_made_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str, *rest: Any) -> nn.Module:
        if torch.empty(0).is_meta:  # as timm before 1.0.22 with ConvNeXts
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        return make_body(name, *rest)

    monkeypatch.setattr(checks, "make_body", make)
    body = checks._bare_body.__wrapped__("resnet10t", 16, "backbone")
    assert all(parameter.is_meta for parameter in body.parameters())
    with pytest.raises(ValueError, match="backbone: densenet121 cannot have cells of 16 pixels"):
        checks._bare_body.__wrapped__("densenet121", 16, "backbone")
