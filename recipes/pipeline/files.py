"""The files of a run: written whole or not at all, and read with errors that name the file and say what to do.

Torch is imported by what needs it, so that tables of runs come at once.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import yaml
from PIL import Image

from recipes.pipeline.data.image_set import voc_palette

if TYPE_CHECKING:
    import torch


@contextmanager
def replacing(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` and rename it to ``path`` once it is written whole.

    Raises:
        OSError: the disk is full, or whatever else the system says; ``path`` is as it was before.
    """
    part = path.with_name(f"{path.name}.part-{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open(mode) as file:
            yield file
        part.replace(path)
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error  # torch.save hides what the system said behind an error of its own
        while cause is not None and getattr(cause, "errno", None) not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            cause = cause.__context__
        if isinstance(cause, OSError):
            told = f"{cause.strerror}; make room, and the same command goes on where it stopped"
            raise OSError(cause.errno, told, str(path)) from error
        raise
    finally:
        part.unlink(missing_ok=True)


class FolderInUse(ValueError):
    """Another process is writing a run folder."""


def try_lock(file: Path, *, with_children: bool) -> int | None:
    """Lock a file, or tell that another process has it.

    Args:
        file: made if it is not there.
        with_children: whether processes that this one starts hold the lock too, even after its end. Without them it is
            lost as soon as this process closes any descriptor of the file.

    Returns:
        A descriptor that has to stay open; None if the file is locked. Where there are no locks it is one all the same.

    Raises:
        OSError: the file cannot be opened.
    """
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        import fcntl
    except ImportError:  # on Windows
        return lock
    os.set_inheritable(lock, with_children)
    try:
        (fcntl.flock if with_children else fcntl.lockf)(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # others: of a file system that has no locks
        if error.errno in (errno.EAGAIN, errno.EACCES):
            os.close(lock)
            return None
    return lock


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


# What broken files raise in the libraries that read them.
_DAMAGE = (
    OSError,
    EOFError,
    KeyError,
    SyntaxError,
    ValueError,
    RuntimeError,
    pickle.UnpicklingError,
    yaml.YAMLError,
    zipfile.BadZipFile,
    zlib.error,
)


# What the system says that is no fault of the file; of one that was cut short it says EINVAL.
_NOT_OF_THE_FILE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)

ANEW = "Remove it, and the same command makes it anew"
OF_ANOTHER_RUN = "Remove it and give the command of that run again, or leave that run out"


@contextmanager
def reading(path: Path, advice: str = ANEW) -> Iterator[None]:
    """Tell which file it is that can't be read, and what to do; by default it is one that a run has written.

    Raises:
        ValueError: the file is damaged, or holds a pickle.
        OSError: the system can't read it, say for want of permission; that is told as it is.
        torch.OutOfMemoryError: there is no room for what is in it.
    """
    try:
        yield
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno in _NOT_OF_THE_FILE:
            raise
        if isinstance(error, RuntimeError) and _is_want_of_memory(error):
            raise
        reason = first_reason(error)
        raise ValueError(f"{path}: cannot be read ({reason}); it is damaged or of another kind. {advice}") from error


def first_reason(error: Exception) -> str:
    """The first line of what an error says; of one that goes on with a list of keys also the first of these."""
    first, *more = str(error).splitlines() or [type(error).__name__]
    if not first.endswith(":") or not more:
        return first
    key, comma, _ = more[0].strip().rstrip(". ").partition('", ')
    return f"{first} {key}" + ('", ...' if comma else "")


def _is_want_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError)


# What stages exchange: arrays, tensors, masks.


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write a compressed ``.npz`` without pickles.

    At zlib's lowest level, in two fifths of the time of numpy's own (maps after a CRF) for files at most 7 % larger.
    """
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read what :func:`save_arrays` wrote; no pickle is ever loaded."""
    with reading(path), path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("it holds other things than arrays")
        return arrays


def load_tensors(path: Path, device: str | torch.device = "cpu", *, advice: str = ANEW) -> dict[str, Any]:
    """Read tensors, numbers and texts that torch saved; no other pickle is ever loaded."""
    import torch

    with reading(path, advice):
        return torch.load(path, map_location=device, weights_only=True)


def save_mask(path: Path, mask: np.ndarray, palette_index: Sequence[int]) -> None:
    """Write ``mask`` (H, W), values 0..K or 255, as a palette PNG in the VOC colours."""
    table = np.full(256, 255, dtype=np.uint8)
    table[: len(palette_index)] = palette_index
    picture = Image.fromarray(table[mask])
    picture.putpalette(voc_palette().ravel().tolist())
    with replacing(path) as file:
        picture.save(file, format="PNG")


def load_mask(path: Path, palette_index: Sequence[int]) -> np.ndarray:
    """Read what :func:`save_mask` wrote: (H, W) uint8 with 0..K or 255."""
    table = np.full(256, 255, dtype=np.uint8)
    table[list(palette_index)] = np.arange(len(palette_index), dtype=np.uint8)
    with reading(path), Image.open(path) as stored:
        return table[np.asarray(stored)]


# What a run folder holds beside the work of its stages.


def run_folders(places: Iterable[Path]) -> list[Path]:
    """The run directories among ``places``, and those in the folders among them that are none themselves.

    Raises:
        FileNotFoundError: one that neither is nor holds a run directory.
    """
    found = []
    for place in places:
        inside = (
            [place] if (place / "metrics.json").is_file() else sorted(f.parent for f in place.glob("*/metrics.json"))
        )
        if not inside:
            raise FileNotFoundError(f"{place}: expected a run directory with metrics.json, found none")
        found += inside
    return found


def read_metrics(folder: Path, advice: str = OF_ANOTHER_RUN) -> dict[str, Any]:
    """What the ``metrics.json`` of a run says.

    Raises:
        FileNotFoundError: ``folder`` is no run directory.
        ValueError: it is damaged, or not that of a run.
    """
    file = folder / "metrics.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: expected a run directory with metrics.json, found none")
    with reading(file, advice):
        found = json.loads(file.read_text())
        for key, kind in (("recipe", str), ("stages", dict), ("measurements", list)):
            if not isinstance(found, dict) or not isinstance(found.get(key), kind):
                raise ValueError(f"no {key} of a run in it")
        return found


def read_settings(folder: Path, advice: str = OF_ANOTHER_RUN) -> dict[str, Any]:
    """What the ``config.yaml`` of a run says; nothing where there is none.

    Raises:
        ValueError: it is damaged, or holds no settings.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        return {}
    with reading(file, advice):
        found = yaml.safe_load(file.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"no settings in it, but {found!r}")
        return found


def read_curves(folder: Path, advice: str = OF_ANOTHER_RUN) -> dict[str, list[dict[str, Any]]]:
    """Training -> points of its curve, from the ``curves/TRAINING.jsonl`` of a run.

    Raises:
        ValueError: one is damaged, or has no point.
    """
    curves = {}
    for file in sorted((folder / "curves").glob("*.jsonl")):
        with reading(file, advice):
            points = [json.loads(line) for line in file.read_text().splitlines()]
            if not points or not all(isinstance(point, dict) and {"step", "steps"} <= point.keys() for point in points):
                raise ValueError("no curve of a training in it")
            curves[file.stem] = points
    return curves
