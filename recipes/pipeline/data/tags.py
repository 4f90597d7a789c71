"""Image tags from a file: CSV, JSON or NPZ.

CSV, with a header whose first cell is "name" (or image, file, filename, id):

    name,tags                 one cell of tags, separated by ";" or "|" if the file has any, else by spaces
    photos/a.jpg,cat dog

    name,tag,tag              one tag a cell, as many cells as needed; a tag may hold spaces
    photos/a.jpg,cat,traffic light

    name,cat,dog,sheep        a table of 0 and 1 under the class names; also 1.0, true, 0.0, false, or nothing for 0
    photos/a.jpg,1,1,0

JSON: {"a": ["cat", "dog"], ...}, or {"classes": ["background", "cat", ...], "labels": {"a": [1, 2], ...}} with indices
into `classes`; an entry may also be a dict of such lists by where they come from, of which "xml" is read, else "tags",
else "things", else "mask".

NPZ: arrays "names" (n,) and "labels" (n, K) multi-hot, and optionally "classes" (K,).

In every form the classes are in the order of the file's own table (`classes`, columns of a 0/1 table); where it has
none, they are the sorted tag names.
"""

from __future__ import annotations

import csv
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.pipeline.data.image_set import check_unique, did_you_mean, first_five, read_json

_NAME_HEADERS = ("name", "image", "file", "filename", "id")
_BITS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False, "": False}
_JSON = '{"a": ["cat", ...]} or {"classes": [...], "labels": {...}}'
_SOURCES = ("xml", "tags", "things", "mask")


@dataclass(frozen=True)
class Tags:
    """Image tags of a file.

    Attributes:
        classes: Class names.
        of: Name as written in the file -> 1-based indices into `classes`.
    """

    classes: tuple[str, ...]
    of: Mapping[str, tuple[int, ...]]


def read_tags(path: str | Path, classes: Sequence[str] | None = None) -> Tags:
    """Read a tags file.

    Args:
        path: .csv, .json or .npz, as the head of this file says.
        classes: Class names of the data set. An unknown tag is then an error, and columns without names are taken to be
            in this order. None: the file says which classes there are.

    Raises:
        ValueError: The file is missing, empty, of another kind, or names a class or an image wrongly.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*") if p.suffix in (".csv", ".json", ".npz"))
        raise ValueError(f"labels: no file {path}{did_you_mean(path.name, beside)}")
    if path.suffix == ".csv":
        return _read_csv(path, classes)
    if path.suffix == ".json":
        return _read_json(path, classes)
    if path.suffix == ".npz":
        return _read_npz(path, classes)
    if path.suffix == ".npy":
        raise ValueError(
            f"labels: {path} is a pickle, which can run code when it is loaded. If you trust it, convert it once: "
            "d = np.load('x.npy', allow_pickle=True).item(); "
            "np.savez('x.npz', names=list(d), labels=np.stack(list(d.values())).astype('uint8'))"
        )
    raise ValueError(f"labels: expected a .csv, .json or .npz file, got {path}")


def _read_csv(path: Path, classes: Sequence[str] | None) -> Tags:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except UnicodeDecodeError as error:
        raise ValueError(f"labels: {path} is not UTF-8 text ({error})") from error
    rows = [row for row in rows if any(row)]
    if not rows:
        raise ValueError(f"labels: {path} is empty; expected a header name,tags and one line an image")
    header, rows = rows[0], rows[1:]
    if header[0].lower() not in _NAME_HEADERS or len(header) < 2:
        raise ValueError(
            f"labels: {path} must begin with a header: name,tags for lists of tags, or name,cat,dog for a 0/1 table; "
            f"its first line is {','.join(header)!r}"
        )
    if not rows:
        raise ValueError(f"labels: {path} has a header and no image")
    check_unique([row[0] for row in rows], f"labels: {path}")
    cells = [cell for row in rows for cell in row[1:]]
    if all(cell.lower() in _BITS for cell in cells) and any(cells):
        ragged = [row[0] for row in rows if len(row) != len(header)]
        if ragged:
            raise ValueError(f"labels: {path}: {first_five(ragged, 'row')} without {len(header)} cells")
        if not all(header):
            raise ValueError(f"labels: {path}: a column of the table has no name: {','.join(header)!r}")
        named = {
            row[0]: [c for c, cell in zip(header[1:], row[1:], strict=True) if _BITS[cell.lower()]] for row in rows
        }
        return _index(path, named, header[1:] if classes is None else classes)
    if any(cells) and len(set(header[1:])) > 1 and all(_is_number(cell) for cell in cells if cell):
        wrong = next(cell for cell in cells if cell and cell.lower() not in _BITS)
        raise ValueError(f"labels: {path}: expected 0 or 1 in each cell of a table, got {wrong!r}")
    if any(len([cell for cell in row if cell]) > 2 for row in (header, *rows)):  # one tag a cell
        named = {row[0]: [cell for cell in row[1:] if cell] for row in rows}
    else:
        separator = r"[;|]" if any(mark in cell for cell in cells for mark in ";|") else r"[\s,]+"
        named = {row[0]: [tag for cell in row[1:] for tag in re.split(separator, cell)] for row in rows}
    return _index(path, named, classes)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_json(path: Path, classes: Sequence[str] | None) -> Tags:
    content = read_json(path, "labels", _JSON)
    own = _own_classes(content, path)
    labels = content["labels"] if own is not None else content
    expected = f"labels: {path}: expected {_JSON}"
    if not isinstance(labels, dict) or not labels:
        raise ValueError(f"{expected}, with at least one image")
    offset = 0 if own is not None and content["classes"][0] != "background" else 1
    named: dict[str, list[str]] = {}
    for name, entry in labels.items():
        if isinstance(entry, dict):
            entry = next((entry[source] for source in _SOURCES if source in entry), None)
        if not isinstance(entry, list):
            raise ValueError(f"{expected}; the entry of {name!r} is not a list")
        named[name] = [_json_tag(path, name, tag, own, offset) for tag in entry]
    return _index(path, named, own if classes is None else classes)


def json_classes(path: Path) -> tuple[str, ...] | None:
    """Foreground class names of a JSON tags file; None if it has none."""
    return _own_classes(read_json(path, "labels", _JSON), path)


def _own_classes(content: Mapping[str, Any], path: Path) -> tuple[str, ...] | None:
    classes = content.get("classes")
    if not isinstance(classes, list) or "labels" not in content:
        return None
    own = tuple(name for position, name in enumerate(classes) if position or name != "background")
    if not own or not all(isinstance(name, str) for name in own):
        raise ValueError(f'labels: {path}: expected the names of the classes as "classes", got {classes}')
    return own


def _json_tag(path: Path, name: str, tag: object, own: tuple[str, ...] | None, offset: int) -> str:
    if isinstance(tag, str):
        return tag
    if own is not None and isinstance(tag, int) and offset <= tag < len(own) + offset:
        return own[tag - offset]
    raise ValueError(f"labels: {path}: tag {tag!r} of {name!r} is not a class name or an index into `classes`")


def _read_npz(path: Path, classes: Sequence[str] | None) -> Tags:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            content = {key: arrays[key] for key in arrays.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"labels: {path} cannot be read as plain arrays ({error})") from error
    if not {"names", "labels"} <= content.keys():
        raise ValueError(f'labels: {path}: expected arrays "names" and "labels", found {sorted(content)}')
    names, labels = [str(name) for name in content["names"]], content["labels"]
    own = tuple(str(name) for name in content["classes"]) if "classes" in content else classes
    if own is None:
        raise ValueError(f'labels: {path}: no array "classes" to name the columns')
    if labels.shape != (len(names), len(own)):
        raise ValueError(f"labels: {path}: expected labels of shape {(len(names), len(own))}, got {labels.shape}")
    check_unique(names, f"labels: {path}")
    present: dict[str, list[str]] = {name: [] for name in names}
    for row, column in zip(*np.nonzero(labels > 0), strict=True):
        present[names[row]].append(own[column])
    return _index(path, present, own if classes is None else classes)


def _index(path: Path, named: Mapping[str, Sequence[str]], classes: Sequence[str] | None) -> Tags:
    named = {name: [tag.strip() for tag in tags if tag.strip()] for name, tags in named.items()}
    used = sorted({tag for tags in named.values() for tag in tags})
    if not used:
        raise ValueError(f"labels: {path}: no image has a tag")
    known = tuple(used) if classes is None else tuple(classes)
    check_unique(known, f"labels: {path}: classes")
    unknown = [tag for tag in used if tag not in known]
    if unknown:
        examples = [f"{tag!r} of {next(n for n, tags in named.items() if tag in tags)}" for tag in unknown]
        raise ValueError(f"labels: {path}: {first_five(examples, 'unknown tag')}{did_you_mean(unknown[0], known)}")
    number = {name: index for index, name in enumerate(known, start=1)}
    return Tags(known, {name: tuple(sorted({number[tag] for tag in tags})) for name, tags in named.items()})
