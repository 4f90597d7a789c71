"""Measuring again what lies on disk: a run directory, or any folder of mask PNGs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from recipes.pipeline.data import ImageSet
from recipes.pipeline.data.image_set import first_five, read_mask
from recipes.pipeline.evaluation import IGNORE, Measurement, evaluate_masks, measure_seeds
from recipes.pipeline.files import load_arrays, load_mask
from recipes.pipeline.tables import WHATS


def remeasure_run(
    folder: Path,
    dataset: ImageSet,
    recorded: Sequence[Measurement],
    *,
    threshold: float | None = None,
    workers: int = 2,
    say: Callable[[str], None] = print,
) -> Iterator[Measurement]:
    """Measure the CAMs and masks of a run directory, finished or not.

    Args:
        folder: the run directory.
        dataset: gives the ground truth.
        recorded: what the run measured itself.
        threshold: background threshold of the seeds; by default the recorded one. Without either, only an oracle.
        workers: threads.
        say: told what is incomplete, and what differs from ``recorded``.
    """

    def read_cam(name: str) -> tuple[np.ndarray, np.ndarray]:
        stored = load_arrays(folder / "cam" / f"{name}.npz")
        return stored["cam"], stored["keys"]

    for what in WHATS:
        place = folder / ("cam" if what == "seed" else what.replace("+", "_"))
        suffix = "npz" if what == "seed" else "png"

        def read(name: str, place: Path = place) -> np.ndarray:
            return load_mask(place / f"{name}.png", dataset.palette_index)

        for split in ("seed", "val"):
            known = measurable(dataset, split)
            names = [name for name in known if (place / f"{name}.{suffix}").is_file()]
            if not names:
                continue
            if len(names) < len(known):
                say(f"{what} on {split}: {len(names)} of {len(known)} images are there")
            before = {m.oracle: m for m in recorded if (m.what, m.split) == (what, split)}
            if what != "seed":
                now = [evaluate_masks(read, dataset, names, what=what, split=split, workers=workers)]
            else:
                point = before[False].threshold if threshold is None and False in before else threshold
                sweep = measure_seeds(read_cam, dataset, names, threshold=point or 0.0, split=split, workers=workers)
                now = [sweep.best] if point is None else [sweep.fixed, sweep.best]
            for m in now:
                was = before.get(m.oracle)
                if was is not None and was.threshold == m.threshold and abs(was.miou - m.miou) > 0.005:
                    say(
                        f"{what} on {split}: metrics.json says {was.miou:.2f} on {was.images} images, "
                        f"the files give {m.miou:.2f} on {m.images}"
                    )
            yield from now


def measure_folder(
    folder: Path, dataset: ImageSet, split: str, *, workers: int = 2, say: Callable[[str], None] = print
) -> Measurement:
    """Measure NAME.png of every image of ``split``, in the data set's own indices or VOC colours.

    Where ``dataset`` keeps only some classes of more, all others count as background, in the masks as in the truth.

    Raises:
        ValueError: no ground truth, a mask that is missing, a value that is no class.
    """
    names = measurable(dataset, split)
    if not names:
        raise ValueError(f"data: {dataset.name} has no ground truth for the images of split {split!r}")
    missing = [f"{name}.png" for name in names if not (folder / f"{name}.png").is_file()]
    if missing:
        raise ValueError(
            f"{folder}: expected masks of the {len(names)} images of split {split!r}, "
            f"but {first_five(missing, 'file')} not there"
        )
    restricted = dataset.palette_index != tuple(range(len(dataset.palette_index)))
    table = np.full(256, 0 if restricted else -1, np.int64)
    table[list(dataset.palette_index)] = np.arange(len(dataset.palette_index))
    table[IGNORE] = IGNORE
    others: set[int] = set()

    def read(name: str) -> np.ndarray:
        path = folder / f"{name}.png"
        stored = read_mask(str(path))
        mask = table[stored]
        if (mask < 0).any():
            wrong = np.unique(stored[mask < 0])[:5].tolist()
            found = ", ".join(map(str, wrong))
            raise ValueError(f"{path}: expected values 0..{len(dataset.classes)} or 255, found {found}")
        others.update(np.unique(stored[(mask == 0) & (stored != 0)]).tolist())
        return mask

    measured = evaluate_masks(read, dataset, names, what=folder.resolve().name, split=split, workers=workers)
    if others:
        values = ", ".join(map(str, sorted(others)))
        say(f"values {values} of the masks are none of the chosen classes and count as background")
    return measured


def measurable(dataset: ImageSet, split: str) -> tuple[str, ...]:
    """The images of "seed" or "val" that have a ground truth."""
    names = dataset.seed if split == "seed" else dataset.val
    return tuple(name for name in names if dataset.annotations.mask_size(name) is not None)
