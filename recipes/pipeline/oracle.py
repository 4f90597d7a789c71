"""A checkpoint chosen on masks, as some authors do: supervision by pixel labels, by name and never by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from recipes.pipeline.evaluation import evaluate_masks, measure_seeds
from recipes.pipeline.labels import with_truth
from recipes.pipeline.run import Run
from recipes.pipeline.training import Moment

Choose = Callable[[Moment], float | None]
"""After a step, a score of the model as it is, or None; see :func:`recipes.pipeline.training.fit`."""


def judges(run: Run, split: Literal["seed", "val"]) -> tuple[str, ...]:
    """The images of a list whose masks choose the checkpoint.

    Raises:
        ValueError: none of them has a mask.
    """
    found = with_truth(run, run.seeds if split == "seed" else run.val)
    if not found:
        raise ValueError(
            f"oracle_checkpoint_selection: {run.dataset.name} has no masks of the {split} list to choose by"
        )
    return found


def choose_by_masks(
    run: Run,
    split: Literal["seed", "val"],
    model: nn.Module,
    mask_of: Callable[[str], Tensor],
    due: Callable[[Moment], bool],
) -> Choose:
    """Score by the mIoU of ``mask_of(name)`` (H, W), with ``model`` in eval mode, where ``due(at)`` and at the end."""
    names = judges(run, split)

    @torch.no_grad()
    def prediction(name: str) -> np.ndarray:
        return mask_of(name).cpu().numpy()

    def score(at: Moment) -> float | None:
        if not (due(at) or at.last):
            return None
        model.eval()
        return evaluate_masks(prediction, run.dataset, names, split=split, workers=run.config.workers).miou

    return score


def choose_by_cams(
    run: Run,
    cams_now: Callable[[], Callable[[str], tuple[Tensor, Tensor]]],
    due: Callable[[Moment], bool],
    threshold: float,
) -> Choose:
    """Score by the mIoU of CAMs on the seed list at their best threshold, where ``due(at)`` and at the end.

    ``cams_now()`` gives, for the model as it is, a function from the name of an image to maps (k, H, W) and keys (k,).
    """
    names = judges(run, "seed")

    def score(at: Moment) -> float | None:
        if not (due(at) or at.last):
            return None
        cams = cams_now()

        def arrays(name: str) -> tuple[np.ndarray, np.ndarray]:
            maps, keys = cams(name)
            return maps.float().cpu().numpy(), keys.cpu().numpy()

        sweep = measure_seeds(arrays, run.dataset, names, threshold=threshold, workers=run.config.workers)
        return sweep.best.miou

    return score
