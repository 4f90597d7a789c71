"""Put something around every training of a recipe."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import nn

Fit = Callable[..., nn.Module]

SHARED = ("classification", "segmentation")
"""Modules of the pipeline whose trainings most recipes have in common."""
OF_FEW = ("captions", "detection", "instances")
"""Those whose trainings belong to one recipe or two."""


def wrap_trainings(recipe: str, wrap: Callable[[Fit], Fit], pipeline: tuple[str, ...]) -> None:
    """Replace ``fit`` by ``wrap(fit)`` in a recipe and in these modules of the pipeline, for good in this process."""
    for name in (recipe, *(f"pipeline.{part}" for part in pipeline)):
        module = importlib.import_module(f"recipes.{name}")
        if name != recipe or hasattr(module, "fit"):  # advcam and cam train by the pipeline alone
            module.fit = wrap(module.fit)
