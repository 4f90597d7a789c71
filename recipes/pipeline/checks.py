"""What settings of the same name have in common in all recipes, checked when a run starts instead of hours later.

A recipe checks what is its own (`check` in its file); here is what any of its parts may have: schedules, crops, scales,
backbones, weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from recipes.pipeline.attention import MIT
from recipes.pipeline.models import check_name, check_weights
from recipes.pipeline.transformers import HYBRID


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


def _parts(config: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The settings and all settings inside them, each with the beginning of its flags."""
    yield place, config
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            yield from _parts(value, f"{place}{entry.name}.")
