"""A folder of photographs with a tags file: `folder:PATH` and `labels`.

PATH is searched with all its sub-folders for jpg, jpeg, png, webp and bmp files (upper case too; hidden files and
folders are skipped). The tags file names each photograph by its path below PATH, with or without the suffix, or by
its bare file name where only one photograph has it. Class names come from the tags file, in the order that tags.py
describes, unless `classes` gives them.

Masks are not needed. Where there are some, in PATH/masks or in `masks`, under the photographs' paths with the suffix
.png, the photographs of train that have one are the seed images, and those of val that have one are measured. They
hold class indices (0 background, 1..K in the order of the classes in the tags file, 255 ignore).

The name of an image is its path below PATH without suffix; "/" is written "__", and any character that is not a letter,
a digit, ".", "-" or "_" is written "_": "beach 2024/IMG (3).JPG" is beach_2024__IMG__3_. Two photographs that would
get the same name are an error (so on every file system: letter case is not enough to tell two names apart).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from recipes.pipeline.data.image_set import (
    PHOTO_SUFFIXES,
    FileAnnotations,
    ImageSet,
    check_unique,
    choose_classes,
    choose_seed,
    did_you_mean,
    first_five,
    index_table,
    restrict,
    split_tagged,
    warn_of_both,
)
from recipes.pipeline.data.tags import Tags, read_tags
from recipes.pipeline.data.voc import outside_images


def load_folder(
    root: str | Path,
    *,
    name: str = "",
    classes: str | Sequence[str] | None = None,
    labels: str | Path | None = None,
    masks: str | Path | None = None,
    train_list: str | Path | None = None,
    val_list: str | Path | None = None,
    seed_list: str | Path | None = None,
    out_of_distribution: str | Path | None = None,
) -> ImageSet:
    """Load a folder of photographs; the arguments are those of `load_dataset`.

    Without `val_list` there is no val; without `train_list` all photographs outside val are trained on. Lists name
    photographs as the tags file does, one a line.

    Raises:
        ValueError: Tags and photographs do not belong together; the message lists the first five offenders.
    """
    root = Path(root).expanduser().absolute()
    name = name or f"folder:{root}"
    if not root.is_dir():
        raise ValueError(f"data: no folder {root}")
    if labels is None:
        beside = sorted(str(path) for folder in (root, root.parent) for path in folder.glob("*.csv"))
        hint = f", such as {beside[0]}" if beside else ""
        raise ValueError(f"labels: folder:{root} needs a tags file{hint}")
    mask_root = root / "masks" if masks is None else Path(masks).expanduser().absolute()
    if masks is not None and not mask_root.is_dir():
        raise ValueError(f"masks: no folder {mask_root}")
    photos = _find(root, PHOTO_SUFFIXES, skip=mask_root)
    if not photos:
        raise ValueError(f"data: no photographs ({', '.join(PHOTO_SUFFIXES)}) in {root}")
    names = {path: safe_name(path) for path in photos}
    _check_names(names)
    resolve = _Resolver(photos)

    table = read_tags(labels)
    found, rows = _match(table, resolve, names, Path(labels))
    untagged = [path for path in photos if names[path] not in found]
    problems = []
    if rows:
        problems.append(f"{first_five(rows, 'row')} without a photograph in {root}")
    if untagged:
        problems.append(f"{first_five(untagged, 'photograph')} without a row")
    if problems:
        raise ValueError(f"labels: {labels}: {'; '.join(problems)}")
    chosen, keep = choose_classes(classes, table.classes)
    tags = restrict(found, keep)

    mask_files = {}
    for path in _find(mask_root, (".png",)):
        photo = resolve(path)
        if photo is None:
            raise ValueError(f"masks: {mask_root / path} belongs to no photograph in {root}")
        mask_files[names[photo]] = str(mask_root / path)
    everything = tuple(names.values())
    val = () if val_list is None else _read_names(val_list, resolve, names, "val_list")
    held_out = set(val)
    if train_list is None:
        train = tuple(image for image in everything if image not in held_out)
    else:
        train = _read_names(train_list, resolve, names, "train_list")
        warn_of_both(name, train, val, stacklevel=3)
    train, without = split_tagged(train, tags)
    if not train:
        raise ValueError(f"data: no photograph to train on is tagged with any of {', '.join(chosen)}")
    seed = tuple(image for image in train if image in mask_files)
    listed = () if seed_list is None else _read_names(seed_list, resolve, names, "seed_list")
    notes = []
    if without:
        notes.append(f"Photographs left out of train, having no tag of these classes: {len(without):,}.")
    if not mask_files:
        notes.append("There are no masks: nothing is measured.")
    elif seed_list is not None:
        seed = choose_seed(train, listed, notes, mask_files)
    outside = {} if out_of_distribution is None else outside_images(Path(out_of_distribution), required=True)
    return ImageSet(
        name=name,
        classes=chosen,
        train=train,
        seed=seed,
        val=val,
        out_of_distribution=tuple(outside) or without,
        palette_index=(0, *keep) if mask_files else tuple(range(len(chosen) + 1)),
        files={**{image: str(root / path) for path, image in names.items()}, **outside},
        tags=tags,
        annotations=FileAnnotations(mask_files, index_table(len(table.classes), keep)),
        notes=tuple(notes),
    )


def safe_name(path: str) -> str:
    """Name of the photograph at a path below the folder, as the head of this file says.

    Example:
        >>> safe_name("beach 2024/IMG (3).JPG")
        'beach_2024__IMG__3_'
    """
    stem = os.path.splitext(path)[0].replace("/", "__")
    return re.sub(r"[^\w.-]", "_", stem)


class _Resolver:
    """Finds the photograph that a tags file, a list or a mask means."""

    def __init__(self, photos: Iterable[str]) -> None:
        self._by: dict[str, list[str]] = {}
        for path in photos:
            stem = os.path.splitext(path)[0]
            for key in dict.fromkeys((path, stem, os.path.basename(path), os.path.basename(stem), safe_name(path))):
                self._by.setdefault(_composed(key), []).append(path)

    def __call__(self, written: str) -> str | None:
        """Path below the folder, or None if no photograph or more than one is meant."""
        written = _composed(written.replace("\\", "/").removeprefix("./"))
        for key in (written, os.path.splitext(written)[0] if written.lower().endswith((".png",)) else written):
            candidates = [(path, _composed(path)) for path in self._by.get(key, ())]
            exact = [path for path, whole in candidates if key in (whole, os.path.splitext(whole)[0])]
            found = exact or self._by.get(key, [])
            if len(found) == 1:
                return found[0]
        return None


def _composed(name: str) -> str:
    """One spelling of letters with marks, of which file systems keep several."""
    return unicodedata.normalize("NFC", name)


def _find(root: Path, suffixes: Sequence[str], skip: Path | None = None) -> list[str]:
    # paths below root with "/", sorted
    found = []
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(d for d in inner if not d.startswith(".") and Path(folder, d) != skip)
        for file in files:
            if os.path.splitext(file)[1].lower() in suffixes and not file.startswith("."):
                found.append(Path(folder, file).relative_to(root).as_posix())
    return sorted(found)


def _check_names(names: Mapping[str, str]) -> None:
    owners: dict[str, list[str]] = {}
    for path, image in names.items():
        owners.setdefault(image.casefold(), []).append(path)
    clashes = [" and ".join(paths) for paths in owners.values() if len(paths) > 1]
    if clashes:
        raise ValueError(f"data: photographs with the same name for a run's files: {first_five(clashes, 'clash')}")


def _match(
    table: Tags, resolve: _Resolver, names: Mapping[str, str], labels: Path
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    # tags by image name, and the rows that mean no photograph
    found: dict[str, tuple[int, ...]] = {}
    strays, matched = [], []
    for written, indices in table.of.items():
        photo = resolve(written)
        if photo is None:
            strays.append(written)
        else:
            matched.append(photo)
            found[names[photo]] = indices
    check_unique(matched, f"labels: {labels}")
    return found, strays


def _read_names(given: str | Path, resolve: _Resolver, names: Mapping[str, str], argument: str) -> tuple[str, ...]:
    path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(f"{argument}: no file {path}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    lines = [line for line in lines if line]
    photos = [resolve(line) for line in lines]
    strays = [line for line, photo in zip(lines, photos, strict=True) if photo is None]
    if strays:
        raise ValueError(
            f"{argument}: {path}: {first_five(strays, 'line')} without a photograph{did_you_mean(strays[0], names)}"
        )
    listed = [names[photo] for photo in photos if photo is not None]
    check_unique(listed, f"{argument}: {path}")
    return tuple(listed)
