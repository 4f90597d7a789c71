"""MS COCO: `coco:PATH`.

    train2017/, val2017/ (or train2014/, val2014/, or either below images/)    photographs
    annotations/instances_train2017.json, instances_val2017.json               objects

The class indices 1..80 follow the category ids in ascending order. Masks are painted from the instances, larger ones
first, so that a small object lies on top of the large one it overlaps; crowd regions that no instance covers are 255.
A crowd counts as an image tag but has no box. Train images without a tag are the out-of-distribution images. All train
images have hand-made masks, so all of them are seed images unless `seed_list` names some.

The annotation file is read once and kept as an index in the cache folder (see cache.py), since it takes gigabytes of
memory to parse.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from recipes.pipeline.data.cache import cached
from recipes.pipeline.data.image_set import (
    IGNORE,
    ImageSet,
    choose_classes,
    choose_seed,
    first_five,
    read_list,
    restrict,
    split_tagged,
)
from recipes.pipeline.data.voc import outside_images


@dataclass(frozen=True, eq=False)
class CocoAnnotations:
    """Masks and boxes from COCO's instances.

    Attributes:
        lines: Name -> index file and byte at which the image's record starts.
        table: (1 + number of categories,) uint8, category number -> our index, 0 for a class that is left out.
    """

    lines: Mapping[str, tuple[str, int]]
    table: np.ndarray

    def mask(self, name: str) -> np.ndarray | None:
        """See `Annotations`."""
        record = self._record(name)
        if record is None:
            return None
        height, width = record["size"]
        mask = np.zeros((height, width), dtype=np.uint8)
        objects = sorted(record["objects"], key=lambda item: (not item["crowd"], -item["area"]))
        for item in objects:
            index = int(self.table[item["category"]])
            shape = decode_segmentation(item["segmentation"], (height, width))
            mask[shape] = (IGNORE if index else 0) if item["crowd"] else index
        return mask

    def mask_size(self, name: str) -> tuple[int, int] | None:
        """See `Annotations`."""
        record = self._record(name)
        return None if record is None else tuple(record["size"])

    def boxes(self, name: str) -> np.ndarray | None:
        """See `Annotations`. COCO gives x, y, width and height."""
        record = self._record(name)
        if record is None:
            return None
        rows = []
        for item in record["objects"]:
            index = int(self.table[item["category"]])
            x, y, width, height = item["box"]
            if index and not item["crowd"] and width > 0 and height > 0:
                rows.append([index, x, y, x + width, y + height])
        return np.array(rows, dtype=np.float32).reshape(-1, 5)

    def saliency(self, name: str) -> np.ndarray | None:
        """See `Annotations`."""
        return None

    def caption(self, name: str) -> str | None:
        """See `Annotations`."""
        return None

    def _record(self, name: str) -> dict[str, Any] | None:
        if name not in self.lines:
            return None
        path, start = self.lines[name]
        with open(path, "rb") as file:
            file.seek(start)
            return json.loads(file.readline())


def load_coco(
    root: str | Path,
    *,
    name: str = "",
    classes: str | Sequence[str] | None = None,
    train_list: str | Path | None = None,
    val_list: str | Path | None = None,
    seed_list: str | Path | None = None,
    out_of_distribution: str | Path | None = None,
) -> ImageSet:
    """Load COCO; the arguments are those of `load_dataset`. Lists are files of image names (stems), one a line.

    Raises:
        ValueError: A folder, a file or an image that is needed is not there.
    """
    root = Path(root).expanduser().absolute()
    year = _year(root)
    parts = {split: _index(root / "annotations" / f"instances_{split}{year}.json") for split in ("train", "val")}
    categories = parts["train"]["categories"]
    if parts["val"]["categories"] != categories:
        raise ValueError(f"data: the instance files of {root} list different categories")
    chosen, keep = choose_classes(classes, categories)
    files: dict[str, str] = {}
    lines: dict[str, tuple[str, int]] = {}
    found: dict[str, list[int]] = {}
    for split, part in parts.items():
        folder = _photo_folder(root, f"{split}{year}")
        for image, (file_name, start, indices) in part["images"].items():
            files[image] = str(folder / file_name)
            lines[image] = (part["records"], start)
            found[image] = indices
    train = _choose(parts["train"]["images"], train_list, "train_list")
    val = _choose(parts["val"]["images"], val_list, "val_list")
    missing = [files[image] for image in (*train[:50], *val[:50]) if not Path(files[image]).is_file()]
    if missing:
        raise ValueError(f"data: annotated, but not there: {first_five(missing, 'photograph')}")
    tags = restrict(found, keep)
    train, without = split_tagged(train, tags)
    if not train:
        raise ValueError(f"data: no train image is tagged with any of {', '.join(chosen)}")
    outside = {} if out_of_distribution is None else outside_images(Path(out_of_distribution), required=True)
    table = np.zeros(len(categories) + 1, dtype=np.uint8)
    table[list(keep)] = np.arange(1, len(keep) + 1)
    notes = [f"Images left out of train, having no tag of these classes: {len(without):,}."] if without else []
    seed = train
    if seed_list is not None:
        seed = choose_seed(train, read_list(Path(seed_list).expanduser()), notes)
    return ImageSet(
        name=name or f"coco:{root}",
        classes=chosen,
        train=train,
        seed=seed,
        val=val,
        out_of_distribution=tuple(outside) or without,
        palette_index=(0, *keep),
        files={**{image: files[image] for image in (*train, *without, *val)}, **outside},
        tags=tags,
        annotations=CocoAnnotations(lines, table),
        notes=tuple(notes),
    )


def decode_segmentation(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool mask of one COCO `segmentation`: polygons, or run lengths as a list or as COCO's string."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        return decode_runs(_unpack(counts) if isinstance(counts, str) else counts, tuple(segmentation["size"]))
    mask = np.zeros(size, dtype=bool)
    for polygon in segmentation:
        if len(polygon) >= 6:
            mask |= _fill(np.asarray(polygon, dtype=np.float64).reshape(-1, 2), size)
    return mask


def decode_runs(counts: Sequence[int], size: tuple[int, ...]) -> np.ndarray:
    """(H, W) bool mask from run lengths of 0, 1, 0, ... down the columns."""
    values = np.arange(len(counts)) % 2 == 1
    flat = np.repeat(values, counts)
    height, width = size
    if flat.size != height * width:
        raise ValueError(f"segmentation: runs of {flat.size} pixels for an image of {width} x {height}")
    return flat.reshape(width, height).T


def _unpack(text: str) -> list[int]:
    # COCO's string: base-32 digits from chr(48) on, lowest first, bit 5 says that more follow, bit 4 of the last is the
    # sign; from the fourth on, a count is stored as its difference to the one before the last
    counts: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def _fill(polygon: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    # Pillow takes integer coordinates for pixel centres and paints the outline too; four times as large, with COCO's
    # corner-based coordinates moved by half a pixel, the outline is thin enough to vote by majority
    scale = 4
    height, width = size
    left, top = np.floor(polygon.min(0)).astype(int).clip(0)
    right, bottom = np.minimum(np.ceil(polygon.max(0)).astype(int) + 1, (width, height))
    mask = np.zeros(size, dtype=bool)
    if right <= left or bottom <= top:
        return mask
    canvas = Image.new("1", ((right - left) * scale, (bottom - top) * scale))
    points = (polygon - (left, top)) * scale - 0.5
    ImageDraw.Draw(canvas).polygon([(x, y) for x, y in points], fill=1)
    cells = np.asarray(canvas).reshape(bottom - top, scale, right - left, scale)
    mask[top:bottom, left:right] = cells.sum((1, 3)) > scale * scale // 2
    return mask


def _year(root: Path) -> str:
    if not root.is_dir():
        raise ValueError(f"data: no folder {root}")
    for year in ("2017", "2014"):
        if (root / "annotations" / f"instances_train{year}.json").is_file():
            return year
    there = sorted(path.name for path in (root / "annotations").glob("*.json")) or sorted(
        p.name for p in root.iterdir()
    )
    raise ValueError(
        f"data: looked for annotations/instances_train2017.json (or 2014) in {root}, "
        f"there is {', '.join(there[:10]) or 'nothing'}"
    )


def _photo_folder(root: Path, name: str) -> Path:
    for folder in (root / name, root / "images" / name):
        if folder.is_dir():
            return folder
    raise ValueError(f"data: looked for {name}/ and images/{name}/ in {root}")


def _choose(images: Mapping[str, Any], given: str | Path | None, argument: str) -> tuple[str, ...]:
    if given is None:
        return tuple(images)
    path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(f"{argument}: no file {path}")
    listed = read_list(path)
    unknown = [image for image in listed if image not in images]
    if unknown:
        raise ValueError(f"{argument}: {path}: {first_five(unknown, 'image')} not in the instance file")
    return listed


def _index(path: Path) -> dict[str, Any]:
    # {"categories": names, "images": {name: (file name, start of the record, tags)}, "records": file}
    if not path.is_file():
        raise ValueError(f"data: no file {path}")
    state = path.stat()
    key = hashlib.sha256(f"{path}|{state.st_size}|{state.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cached(f"coco-v1-{path.stem}-{key}", lambda draft: _write_index(path, draft))
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    return {**index, "records": str(folder / "records.jsonl")}


def _write_index(path: Path, draft: Path) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        categories = sorted(content["categories"], key=lambda item: item["id"])
        number = {item["id"]: position for position, item in enumerate(categories, start=1)}
        objects: dict[int, list[dict[str, Any]]] = {item["id"]: [] for item in content["images"]}
        for item in content["annotations"]:
            objects[item["image_id"]].append(
                {
                    "category": number[item["category_id"]],
                    "crowd": bool(item.get("iscrowd", 0)),
                    "area": item["area"],
                    "box": item["bbox"],
                    "segmentation": item["segmentation"],
                }
            )
        images = {}
        with (draft / "records.jsonl").open("wb") as file:
            for item in sorted(content["images"], key=lambda image: image["file_name"]):
                own = objects[item["id"]]
                tags = sorted({entry["category"] for entry in own})
                images[Path(item["file_name"]).stem] = (item["file_name"], file.tell(), tags)
                record = {"size": (item["height"], item["width"]), "objects": own}
                file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data: {path} is not a COCO instance file ({type(error).__name__}: {error})") from error
    index = {"categories": [item["name"] for item in categories], "images": images}
    (draft / "index.json").write_text(json.dumps(index), encoding="utf-8")
