"""What settings of the same name have in common in all recipes, checked when a run starts instead of hours later.

A recipe checks what is its own (`check` in its file); here is what any of its parts may have: schedules, crops, scales,
backbones, weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

from recipes.pipeline.attention import MIT
from recipes.pipeline.models import (
    check_name,
    check_weights,
    feature_maps,
    freeze_stages,
    has_one_stride,
    make_body,
)
from recipes.pipeline.transformers import HYBRID, TokenConfig


class Rule(NamedTuple):
    """What a value has to be, and how that is said."""

    fits: Callable[[Any], bool]
    expected: str

    def refuses(self, value: Any) -> bool:
        """Whether a value is one that cannot be; of another kind than the rule's, in a recipe of one's own, none is."""
        try:
            return value is not None and not self.fits(value)
        except TypeError:
            return False


COUNT = Rule(lambda value: value >= 1, "at least 1")
NOT_NEGATIVE = Rule(lambda value: value >= 0, "at least 0")
POSITIVE = Rule(lambda value: value > 0, "a number above 0")
SHARE = Rule(lambda value: 0 <= value < 1, "a number in [0, 1)")
SIZES = Rule(lambda value: len(value) > 0 and min(value) > 0, "at least one size, each above 0")
RANGE = Rule(lambda value: 0 < value[0] <= value[1], "the lower bound first, both above 0")
PIXELS = Rule(
    lambda value: value >= 1 if isinstance(value, int) else 1 <= value[0] <= value[1],
    "at least 1 pixel, of a range the lower bound first",
)

RULES = {
    **dict.fromkeys(("epochs", "batch_size", "crop", "max_steps"), COUNT),
    **dict.fromkeys(("lr", "head_lr", "weight_decay", "warmup", "frozen_stages", "workers", "seed"), NOT_NEGATIVE),
    **dict.fromkeys(("label_scale", "test_scale"), POSITIVE),
    **dict.fromkeys(("momentum", "dropout", "drop_path"), SHARE),
    **dict.fromkeys(("scales", "test_scales", "cam_scales", "first_scales", "prior_views"), SIZES),
    "scale": RANGE,
    **dict.fromkeys(("long_side", "side"), PIXELS),
    "output_stride": Rule(lambda value: value in (8, 16, 32), "8, 16 or 32"),
}


def check_settings(config: Any) -> None:
    """Refuse settings that could only stop a run later.

    Args:
        config: the settings of a run.

    Raises:
        ValueError: names the setting as its flag does, ``segment.schedule.epochs``.
    """
    for place, part in _parts(config):
        values = {entry.name: getattr(part, entry.name) for entry in dataclasses.fields(part)}
        for name, value in values.items():
            if name in RULES and RULES[name].refuses(value):
                raise ValueError(f"{place}{name}: expected {RULES[name].expected}, got {value!r}")
        backbone = "encoder" if "encoder" in values else "backbone"
        if backbone in values and type(part).__module__.startswith("recipes."):  # others make theirs as they like
            if values[backbone] not in MIT:
                check_name(values[backbone].removeprefix(HYBRID), f"{place}{backbone}")
            if values["weights"] != "classifier":
                check_weights(values["weights"], f"{place}weights")
            body = _body_of(part, values, f"{place}{backbone}")
            if body is not None:
                try:
                    freeze_stages(body, values.get("frozen_stages", 0))
                except ValueError as error:
                    raise ValueError(f"{place}{error}") from error
                if backbone == "backbone" and "output_stride" in values and getattr(part, "makes_cams", True):
                    _check_cells_of_maps(config, values["backbone"], values["output_stride"])


def _check_cells_of_maps(config: Any, backbone: str, output_stride: int) -> None:
    """The network of a classifier also has to be made for its maps, often with finer cells."""
    wanted = getattr(getattr(config, "cams", None), "output_stride", output_stride)
    if wanted != output_stride and not has_one_stride(backbone):
        try:
            _bare_body(backbone, wanted, "cams.output_stride")
        except ValueError as error:
            raise ValueError(f"{error}; {output_stride}, as in its training, it can") from error


def _body_of(part: Any, values: dict[str, Any], place: str) -> nn.Module | None:
    """The convolutional backbone of a part, with no weights in it; None: it has none."""
    if "encoder" in values:
        if values.get("architecture") == "deeplabv3plus":
            return _encoder(values["encoder"], values["output_stride"], values["weights"] == "random", place)
        return _bare_body(values["encoder"], values["output_stride"], place)
    if isinstance(part, TokenConfig) and not values["backbone"].startswith(HYBRID):
        return None
    # those that have no setting for it need 16, detectors 32
    stride = values.get("output_stride", 32 if "strides" in values else 16)
    return _bare_body(values["backbone"].removeprefix(HYBRID), stride, place)


@cache
def _bare_body(name: str, output_stride: int, place: str) -> nn.Module:
    """A backbone that has maps of images of any size.

    Raises:
        ValueError: it has none, or cannot be made.
    """

    def make() -> nn.Module:
        body = make_body(name, output_stride, place).eval()
        try:
            final = feature_maps(body, torch.zeros(1, 3, 64, 96)).final
            problem = "" if final.ndim == 4 else f"it gives {tuple(final.shape)}"
        except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            problem = str(error) or type(error).__name__
        if problem:
            raise ValueError(f"{place}: expected a network with maps of images of any size, got {name!r} ({problem})")
        return body

    return _without_memory(make)


@torch.no_grad()
def _without_memory(make: Callable[[], nn.Module]) -> nn.Module:
    """A network on the meta device; made in memory first where its parts can't be made there, as with older timm."""
    try:
        with torch.device("meta"):
            return make()
    except Exception:
        return make().to("meta")


@cache
def _encoder(name: str, output_stride: int, random: bool, place: str) -> nn.Module:
    """That of DeepLabV3+.

    Raises:
        ValueError: it cannot be made, or has not the names of tensors that weights come with.
    """
    try:
        if output_stride not in (8, 16):
            raise ValueError("it has cells of 8 or 16 pixels")
        body = _without_memory(
            lambda: smp.encoders.get_encoder(f"tu-{name}", weights=None, output_stride=output_stride).model
        )
        whole = _without_memory(lambda: timm.create_model(name, num_classes=0))
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f" ({error})" if str(error) else ""
        raise ValueError(
            f"{place}: expected a backbone that deeplabv3plus can take, such as a ResNet or EfficientNet of timm, with "
            f"cells of {output_stride} pixels, got {name!r}{reason}; deeplabv2 and largefov also take resnet38, vgg16 "
            "and NAME-irn"
        ) from error
    if not random and body.state_dict().keys() - whole.state_dict().keys():
        raise ValueError(
            f"{place}: deeplabv3plus cannot read pretrained weights of {name}; give random weights, or deeplabv2 or "
            "largefov, which can"
        )
    return body


def _parts(config: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The settings and all settings inside them, each with the beginning of its flags."""
    yield place, config
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            yield from _parts(value, f"{place}{entry.name}.")
