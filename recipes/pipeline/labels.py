"""From maps to masks on disk, and what they measure against ground truth where there is any."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from recipes.pipeline.cams import read_cam
from recipes.pipeline.evaluation import evaluate_masks, measure_seeds
from recipes.pipeline.files import load_mask, save_mask
from recipes.pipeline.run import Run
from wsss_modules import IRN_CRF, cam_to_mask, dense_crf, unary_from_mask


def write_masks(run: Run, names: Sequence[str], mask_of: Callable[[str], Tensor], folder: str = "mask") -> None:
    """Write ``mask_of(name)`` (H, W), 0 background, 1..K or 255, as ``folder/IMAGE.png`` for each image."""

    @torch.no_grad()
    def work(name: str) -> None:
        mask = mask_of(name).to(torch.uint8).cpu().numpy()
        save_mask(run.path(folder, f"{name}.png"), mask, run.dataset.palette_index)

    run.for_each(names, lambda name: run.path(folder, f"{name}.png"), work)


def read_mask(run: Run, name: str, folder: str = "mask") -> np.ndarray:
    """(H, W) uint8: 0 background, 1..K, 255 unsure."""
    return load_mask(run.path(folder, f"{name}.png"), run.dataset.palette_index)


def threshold_mask(run: Run, name: str, threshold: float, folder: str = "cam") -> Tensor:
    """The CAM of an image as a mask: its strongest class where that exceeds ``threshold``."""
    cam, keys = read_cam(run, name, folder).tensors()
    return cam_to_mask(cam, threshold, keys=keys)[0]


def crf_mask(run: Run, name: str, folder: str = "mask") -> Tensor:
    """A mask refined by a dense CRF over the photograph, with IRN's settings: (H, W)."""
    image = run.image(name)
    return refine_mask(image, torch.from_numpy(read_mask(run, name, folder)).to(image.device).long())


def refine_mask(image: Tensor, mask: Tensor) -> Tensor:
    """A mask (H, W) refined by a dense CRF over ``image`` (3, H, W) uint8, with IRN's settings."""
    present, compact = mask.unique(return_inverse=True)
    refined = dense_crf(image[None], unary_from_mask(compact[None], len(present)), IRN_CRF)
    return present[refined[0].argmax(0)]


def refine_masks(run: Run, everywhere: bool, refined: Callable[[str], Tensor] | None = None) -> None:
    """From ``mask/`` to ``mask_crf/``, ``everywhere`` or only where it is measured, and measure both.

    ``refined(name)`` gives the refined mask; by default :func:`crf_mask`.
    """
    measure_masks(run)
    mask_of = refined or (lambda name: crf_mask(run, name))
    write_masks(run, run.train if everywhere else run.seeds, mask_of, "mask_crf")
    measure_masks(run, "mask_crf", "mask+crf")


def masks_by_threshold(run: Run, threshold: float, everywhere: bool) -> None:
    """The CAMs above ``threshold`` as ``mask/``, refined as by :func:`refine_masks`."""
    write_masks(run, run.train, lambda name: threshold_mask(run, name, threshold))
    refine_masks(run, everywhere)


def measure_cams(run: Run, threshold: float, folder: str = "cam", what: str = "seed") -> None:
    """Measure CAMs as label maps at a fixed threshold and at the best of all thresholds, on the seed and val lists."""

    def cams(name: str) -> tuple[np.ndarray, np.ndarray]:
        stored = read_cam(run, name, folder)
        return stored.cam, stored.keys

    for split, names in measured_lists(run, folder, ".npz").items():
        sweep = measure_seeds(
            cams, run.dataset, names, threshold=threshold, what=what, split=split, workers=run.config.workers
        )
        run.measured(sweep.fixed, sweep.best)


def measure_masks(run: Run, folder: str = "mask", what: str = "mask") -> None:
    """Measure the masks in ``folder`` on those of the seed and val lists that it holds."""
    for split, names in measured_lists(run, folder, ".png").items():
        run.measured(
            evaluate_masks(
                lambda name: read_mask(run, name, folder),
                run.dataset,
                names,
                what=what,
                split=split,
                workers=run.config.workers,
            )
        )


def measured_lists(run: Run, folder: str, suffix: str) -> dict[str, tuple[str, ...]]:
    """Of the seed and val lists, the images that have ground truth; only lists that ``folder`` holds whole."""
    lists = {}
    for split, names in {"seed": run.seeds, "val": run.val}.items():
        measurable = with_truth(run, names)
        if measurable and all(run.path(folder, f"{name}{suffix}").exists() for name in measurable):
            lists[split] = measurable
    return lists


def with_truth(run: Run, names: Sequence[str]) -> tuple[str, ...]:
    """Those images that have masks."""
    return tuple(name for name in names if run.dataset.annotations.mask_size(name) is not None)
