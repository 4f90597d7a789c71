"""Saliency maps for the systems that lean on them: the data set's own, a folder of files, or what C2AM learnt.

A map says for each pixel how likely it belongs to any object at all: 1 (white) is foreground.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from recipes.pipeline.data import IGNORE, ImageSet
from recipes.pipeline.data.image_set import first_five, listing
from recipes.pipeline.evaluation import FIXED, evaluate_masks
from recipes.pipeline.files import replacing
from recipes.pipeline.labels import measured_lists
from recipes.pipeline.run import Run

FOLDER = "saliency"  # of a run
SUFFIXES = (".png", ".npz")


def saliency_source(
    run: Run, spec: str | None = None, names: Sequence[str] | None = None
) -> Callable[[str], np.ndarray]:
    """Where the saliency maps of a run come from; every map is read once before it is relied upon.

    Args:
        run: gives the images.
        spec: None for the maps of the data set itself (the demo set has some); a folder that holds NAME.png (grey,
            white is foreground) or NAME.npz (``saliency``, or its only array) for each image; or the folder of a
            ``c2am`` run, whose ``saliency/`` is then meant.
        names: the images that need a map; by default all training images.

    Returns:
        From the name of an image to its map, (H, W) float32 in [0, 1] at the size of the photograph. Maps of another
        size are resized bilinearly. It can be pickled, so that loader processes may hold it.

    Raises:
        ValueError: no such folder, images without a map (the message names them), files that hold something else.
    """
    names = run.train if names is None else names
    if spec is not None:
        files = _maps_in(Path(spec).expanduser(), run.dataset, names)
        _read_all(files, names, run.config.workers)
        return files
    missing = _read_all(run.dataset.saliency, names, run.config.workers)
    if missing:
        raise ValueError(
            f"saliency: {run.dataset.name} comes without a map for {first_five(missing, 'image')}; give a folder of "
            "maps, or that of a c2am run (python -m recipes run c2am learns them from the photographs alone)"
        )
    return _OwnMaps(run.dataset)


def saliency_unless_none(run: Run, spec: str | None) -> Callable[[str], np.ndarray] | None:
    """:func:`saliency_source`; None where the run is told to do with tags alone, by "none"."""
    return None if spec == "none" else saliency_source(run, spec)


def save_saliency(run: Run, name: str, saliency: np.ndarray, folder: str = FOLDER) -> None:
    """Write a map (H, W) in [0, 1] as ``FOLDER/NAME.png`` of the run: 8-bit grey, white is foreground."""
    with replacing(run.path(folder, f"{name}.png")) as file:
        Image.fromarray((saliency * 255).round().astype(np.uint8)).save(file, format="PNG")


def read_saliency(run: Run, name: str, folder: str = FOLDER) -> np.ndarray:
    """What :func:`save_saliency` wrote: (H, W) float32 in [0, 1], in steps of 1/255."""
    return _read_file(run.path(folder, f"{name}.png"))


def is_object(saliency: np.ndarray) -> np.ndarray:
    """A map as a mask (H, W) uint8 of one class: 1 where an object is more likely than none."""
    return (saliency > 0.5).astype(np.uint8)


def measure_saliency(run: Run) -> None:
    """Measure the maps of the run against its masks, whose classes are all taken as one."""
    for split, names in measured_lists(run, FOLDER, ".png").items():
        measured = evaluate_masks(
            lambda name: is_object(read_saliency(run, name)),
            _Objects(run.dataset),
            names,
            what="saliency",
            split=split,
            workers=run.config.workers,
        )
        run.measured(replace(measured, threshold=0.5, threshold_from=FIXED))


class _Objects:
    """The masks of a data set with one class: any object."""

    classes = ("object",)

    def __init__(self, dataset: ImageSet) -> None:
        self.dataset = dataset

    def mask(self, name: str) -> np.ndarray | None:
        mask = self.dataset.mask(name)
        return mask if mask is None else np.where(mask == IGNORE, IGNORE, np.minimum(mask, 1))


class SaliencyCrops(Dataset):
    """`TaggedCrops` with ``saliency`` (1, crop, crop) in [0, 1], cut as the image; 0 where that is padded.

    ``transform`` should be that of `crop_transform` with ``mask_fill=0``; it resizes the maps to the nearest pixels.
    """

    def __init__(
        self,
        dataset: ImageSet,
        names: Sequence[str],
        saliency_of: Callable[[str], np.ndarray],
        transform: v2.Transform,
    ) -> None:
        self.dataset, self.names, self.saliency_of, self.transform = dataset, names, saliency_of, transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        name = self.names[index]
        saliency = tv_tensors.Mask(torch.from_numpy(np.array(self.saliency_of(name), np.float32))[None])
        image, saliency = self.transform(tv_tensors.Image(self.dataset.image(name)), saliency)
        return {
            "image": image.as_subclass(Tensor),
            "saliency": saliency.as_subclass(Tensor),
            "labels": torch.from_numpy(self.dataset.labels(name)),
            "index": torch.tensor(index),
        }


@dataclass(frozen=True)
class _OwnMaps:
    dataset: ImageSet

    def __call__(self, name: str) -> np.ndarray:
        saliency = self.dataset.saliency(name)
        if saliency is None:
            raise ValueError(f"saliency: {self.dataset.name} has none of image {name!r}")
        return saliency


@dataclass(frozen=True)
class _FileMaps:
    dataset: ImageSet
    files: Mapping[str, str]

    def __call__(self, name: str) -> np.ndarray:
        return _resized(_read_file(Path(self.files[name])), self.dataset.size(name))


def _maps_in(folder: Path, dataset: ImageSet, names: Sequence[str]) -> _FileMaps:
    hint = ""
    if (folder / "config.yaml").is_file():
        folder, hint = folder / FOLDER, "; is that c2am run finished, and was it made on the same images?"
    if not folder.is_dir():
        raise ValueError(f"saliency: expected a folder of maps or of a c2am run, found no folder {folder}{hint}")
    files = listing(folder, SUFFIXES)
    missing = [name for name in names if name not in files]
    if missing:
        raise ValueError(
            f"saliency: {folder} has no {' or '.join(SUFFIXES)} for {first_five(missing, 'image')}"
            f"{hint or f'; files are named like the images, such as {names[0]}.png'}"
        )
    return _FileMaps(dataset, {name: files[name] for name in names})


def _read_all(source: Callable[[str], np.ndarray | None], names: Sequence[str], workers: int) -> list[str]:
    # the names without a map; broken ones are an error
    def read(name: str) -> tuple[bool, str]:
        try:
            return source(name) is None, ""
        except ValueError as error:
            return False, str(error).removeprefix("saliency: ")

    with ThreadPoolExecutor(max(1, workers)) as pool:  # decoding frees the interpreter
        found = dict(zip(names, pool.map(read, names), strict=True))
    broken = [complaint for _, complaint in found.values() if complaint]
    if broken:
        raise ValueError(f"saliency: {first_five(broken, 'broken map')}")
    return [name for name, (missing, _) in found.items() if missing]


def _read_file(path: Path) -> np.ndarray:
    try:
        return _read_array(path) if path.suffix.lower() == ".npz" else _read_picture(path)
    except (OSError, EOFError, SyntaxError, zipfile.BadZipFile, zlib.error) as error:  # what broken files raise
        raise ValueError(f"{path}: cannot be read as a saliency map ({error}); is the file complete?") from error


def _read_picture(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        if picture.mode.startswith("I"):  # 16 bits
            return np.asarray(picture, dtype=np.float32) / 65535
        if picture.mode in ("1", "L"):
            return np.asarray(picture.convert("L"), dtype=np.float32) / 255
        colours = np.asarray(picture.convert("RGBA").convert("RGB"))
    if (colours != colours[..., :1]).any():
        raise ValueError(f"{path}: expected a grey picture, found colours; is it a mask?")
    return colours[..., 0].astype(np.float32) / 255


def _read_array(path: Path) -> np.ndarray:
    if not zipfile.is_zipfile(path):  # np.load would take it for a pickle
        raise zipfile.BadZipFile("not a zip file")
    with np.load(path, allow_pickle=False) as stored:
        key = FOLDER if FOLDER in stored else stored.files[0] if len(stored.files) == 1 else None
        if key is None:
            raise ValueError(f"{path}: expected one array, or one named {FOLDER}; found {', '.join(stored.files)}")
        values = stored[key]
    if values.ndim != 2:
        raise ValueError(f"{path}: expected an array (H, W), found shape {values.shape}")
    values = values.astype(np.float32) / (255 if values.dtype == np.uint8 else 1)
    if not (values.size and np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"{path}: expected values in [0, 1] (or uint8), found others")
    return values


def _resized(saliency: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if saliency.shape == size:
        return saliency
    picture = Image.fromarray(saliency).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(picture).clip(0, 1)  # rounding may step over the ends
