"""What every data set looks like to a recipe: names, photographs, image tags and, where there are any, masks.

H, W height and width in pixels of the photograph as it is seen (after its EXIF orientation); K foreground classes.
"""

from __future__ import annotations

import difflib
import json
import os
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

IGNORE = 255
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

# EXIF orientation -> what brings the stored pixels upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)

# What Pillow raises for files that are damaged (SyntaxError: PNG), or that unpack to more than 179 million pixels.
BROKEN = (OSError, SyntaxError, Image.DecompressionBombError)


class Annotations(Protocol):
    """What a data set knows beyond tags. Every method gives None where it knows nothing."""

    def mask(self, name: str) -> np.ndarray | None:
        """(H, W) uint8, 0 background, 1..K classes, 255 ignore."""

    def boxes(self, name: str) -> np.ndarray | None:
        """(n, 5) float32: class index 1..K, x1, y1, x2, y2 in half-open pixels."""

    def saliency(self, name: str) -> np.ndarray | None:
        """(H, W) float32 in [0, 1]."""

    def caption(self, name: str) -> str | None:
        """One sentence about the photograph."""

    def mask_size(self, name: str) -> tuple[int, int] | None:
        """(H, W) of the mask without decoding it."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Photographs with image tags, split into lists of names; made by `load_dataset`.

    A name is also the stem of every file that a run writes for the image, so it never holds a path separator.
    Nothing is decoded before it is asked for, and the object can be pickled, so a `DataLoader` worker may hold it.

    Attributes:
        name: The specification it was loaded from, such as "voc:/data/VOC2012".
        classes: The K foreground class names; class k of a mask is `classes[k - 1]`.
        train: Images to train on; each has at least one tag.
        seed: The part of `train` with hand-made masks, on which seeds and pseudo masks are measured; may be empty.
        val: Images to measure the segmentation on; may be empty.
        out_of_distribution: Images with none of the classes.
        palette_index: Length 1+K: the index that our index has in the data set's own masks and palette. The identity,
            unless `classes` picks some classes of VOC.
        files: Name -> photograph.
        tags: Name -> class indices 1..K that the image is tagged with.
        annotations: Masks, boxes, saliency maps and captions.
        notes: What the loader decided and a reader of the results should know, one sentence each.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[str, ...] = field(repr=False)
    seed: tuple[str, ...] = field(repr=False)
    val: tuple[str, ...] = field(repr=False)
    out_of_distribution: tuple[str, ...] = field(repr=False)
    palette_index: tuple[int, ...]
    files: Mapping[str, str] = field(repr=False)
    tags: Mapping[str, tuple[int, ...]] = field(repr=False)
    annotations: Annotations = field(repr=False)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {len(self.classes)} classes ({', '.join(self.classes)})",
            f"{len(self.train):,} train, {len(self.seed):,} seed, {len(self.val):,} val, "
            f"{len(self.out_of_distribution):,} out of distribution",
        ]
        return "\n".join([*lines, *self.notes])

    def path(self, name: str) -> str:
        """The photograph's file."""
        try:
            return self.files[name]
        except KeyError:
            raise KeyError(f"{self.name} has no image {name!r}{did_you_mean(name, self.files)}") from None

    def image(self, name: str) -> Image.Image:
        """The photograph, see `read_photo`."""
        return read_photo(self.path(name))

    def size(self, name: str) -> tuple[int, int]:
        """(H, W) of `image(name)`, read from the header only."""
        return _upright_size(self.path(name))

    def labels(self, name: str) -> np.ndarray:
        """(K,) float32 multi-hot image tags."""
        self.path(name)  # a wrong name fails with the suggestion
        multi_hot = np.zeros(len(self.classes), dtype=np.float32)
        multi_hot[[index - 1 for index in self.tags.get(name, ())]] = 1
        return multi_hot

    def all_labels(self, names: Sequence[str]) -> np.ndarray:
        """(n, K) float32 multi-hot image tags of n images."""
        return np.stack([self.labels(name) for name in names])

    def mask(self, name: str) -> np.ndarray | None:
        """(H, W) uint8 ground truth: 0 background, 1..K classes, 255 ignore; None if there is none."""
        height, width = self.size(name)
        mask = self.annotations.mask(name)
        if mask is not None and mask.shape != (height, width):
            raise ValueError(self._size_message(name, mask.shape))
        return mask

    def boxes(self, name: str) -> np.ndarray | None:
        """(n, 5) float32 in half-open pixels inside the image: class index 1..K, x1, y1, x2, y2; None if unknown."""
        height, width = self.size(name)
        boxes = self.annotations.boxes(name)
        if boxes is None:
            return None
        boxes[:, 1::2] = boxes[:, 1::2].clip(0, width)
        boxes[:, 2::2] = boxes[:, 2::2].clip(0, height)
        empty = (boxes[:, 3] <= boxes[:, 1]) | (boxes[:, 4] <= boxes[:, 2])
        if empty.any():
            found = boxes[empty][0, 1:].tolist()
            raise ValueError(f"boxes of {name}: a box has no area inside the {width} x {height} image: {found}")
        return boxes

    def saliency(self, name: str) -> np.ndarray | None:
        """(H, W) float32 foreground probability in [0, 1]; None if there is none."""
        self.path(name)
        saliency = self.annotations.saliency(name)
        if saliency is None:
            return None
        height, width = self.size(name)
        if saliency.shape != (height, width):
            found = f"{saliency.shape[1]} x {saliency.shape[0]}"
            raise ValueError(f"saliency of {name}: {found} pixels, its photograph is {width} x {height}")
        return saliency

    def caption(self, name: str) -> str | None:
        """One sentence about the photograph; None if there is none."""
        self.path(name)
        return self.annotations.caption(name)

    def check(self) -> int:
        """Open the header of every photograph and mask, look at the end of each file, compare the sizes.

        Pixels are decoded only where the end of a file is missing, so that a file cut short is found at the cost of
        reading headers.

        Returns:
            Number of photographs looked at.

        Raises:
            ValueError: Some are broken; the message lists the first five.
        """
        broken = []
        for name, path in self.files.items():
            try:
                size = _upright_size(path)
                _check_complete(path)
                mask_size = self.annotations.mask_size(name)
                if mask_size is not None and mask_size != size:
                    broken.append(self._size_message(name, mask_size))
            except (*BROKEN, ValueError) as error:
                broken.append(str(error) if path in str(error) else f"{path}: {error}")
        if broken:
            raise ValueError(f"{self.name}: {first_five(broken, 'broken image')}")
        return len(self.files)

    def _size_message(self, name: str, mask_size: tuple[int, ...]) -> str:
        height, width = self.size(name)
        message = f"mask of {name}: {mask_size[1]} x {mask_size[0]} pixels, its photograph is {width} x {height}"
        if mask_size == (width, height) != (height, width):
            message += " after its EXIF orientation; turn the mask, or drop the orientation from the photograph"
        return message


@dataclass(frozen=True, eq=False)
class FileAnnotations:
    """Annotations in files as VOC has them: mask PNGs, object XMLs, saliency PNGs.

    Attributes:
        masks: Name -> mask file.
        table: (256,) int16, value in a mask file -> our index (255 ignore), -1 for a value that must not occur.
        xmls: Name -> object annotations.
        class_index: Class name in an XML -> our index, 0 for a class that is left out.
        saliencies: Name -> saliency map file.
        captions: Name -> sentence.
    """

    masks: Mapping[str, str]
    table: np.ndarray
    xmls: Mapping[str, str] = field(default_factory=dict)
    class_index: Mapping[str, int] = field(default_factory=dict)
    saliencies: Mapping[str, str] = field(default_factory=dict)
    captions: Mapping[str, str] = field(default_factory=dict)

    def mask(self, name: str) -> np.ndarray | None:
        """See `Annotations`."""
        if name not in self.masks:
            return None
        path = self.masks[name]
        stored = read_mask(path)
        mask = self.table[stored]
        if (mask < 0).any():
            wrong = np.unique(stored[mask < 0])[:5].tolist()
            allowed = f"0..{int(np.flatnonzero(self.table[:IGNORE] >= 0).max())} or {IGNORE}"
            raise ValueError(f"{path}: expected values {allowed}, found {', '.join(map(str, wrong))}")
        return mask.astype(np.uint8)

    def mask_size(self, name: str) -> tuple[int, int] | None:
        """See `Annotations`."""
        if name not in self.masks:
            return None
        with Image.open(self.masks[name]) as stored:
            return stored.height, stored.width

    def boxes(self, name: str) -> np.ndarray | None:
        """See `Annotations`. VOC counts pixels from 1 and includes the last one; here 0-based and half-open."""
        if name not in self.xmls:
            return None
        rows = []
        for class_name, (x1, y1, x2, y2) in read_objects(self.xmls[name]):
            index = self.class_index.get(class_name, 0)
            if index:
                rows.append([index, x1 - 1, y1 - 1, x2, y2])
        return np.array(rows, dtype=np.float32).reshape(-1, 5)

    def saliency(self, name: str) -> np.ndarray | None:
        """See `Annotations`."""
        if name not in self.saliencies:
            return None
        path = self.saliencies[name]
        try:
            with Image.open(path) as stored:
                return np.asarray(stored.convert("L"), dtype=np.float32) / 255
        except BROKEN as error:
            raise ValueError(f"{path}: cannot be read as a saliency map ({error}); is the file complete?") from error

    def caption(self, name: str) -> str | None:
        """See `Annotations`."""
        return self.captions.get(name)


def read_objects(path: str) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Objects of a VOC XML, `difficult` ones included: class name and xmin, ymin, xmax, ymax as written."""
    try:
        root = ElementTree.parse(path).getroot()
        objects = []
        for item in root.findall("object"):
            x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax"))
            objects.append((item.findtext("name", "").strip(), (x1, y1, x2, y2)))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path}: not a VOC annotation ({error})") from error
    return objects


def read_photo(path: str | Path) -> Image.Image:
    """A photograph as 8-bit RGB, upright: its EXIF orientation is applied."""
    try:
        with Image.open(path) as stored:
            turn = _UPRIGHT.get(_orientation(stored))
            if stored.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
                image = Image.fromarray((np.asarray(stored).clip(0, 65535) / 257).round().astype(np.uint8)).convert(
                    "RGB"
                )
            else:  # Pillow warns about palettes with transparency unless they pass through RGBA
                image = (stored.convert("RGBA") if "transparency" in stored.info else stored).convert("RGB")
    except BROKEN as error:
        raise ValueError(f"{path}: cannot be read as a photograph ({error}); is the file complete?") from error
    return image if turn is None else image.transpose(turn)


def voc_palette(colors: int = 256) -> np.ndarray:
    """(colors, 3) uint8 colours of the VOC masks: the bits of the index dealt out to red, green and blue."""
    index = np.arange(colors)
    palette = np.zeros((colors, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def read_mask(path: str) -> np.ndarray:
    """(H, W) uint8 indices of a mask file: palette or greyscale values as they are, VOC colours converted to indices.

    Raises:
        ValueError: The file cannot be read, or is a colour image with colours that the VOC palette has not.
    """
    try:
        with Image.open(path) as stored:
            mode = stored.mode
            if mode in ("P", "L"):
                return np.array(stored)
            values = np.array(stored.convert("RGB") if mode in ("RGB", "RGBA") else stored)
    except BROKEN as error:
        raise ValueError(f"{path}: cannot be read as a mask ({error})") from error
    if mode == "1" or (mode.startswith("I") and values.min() >= 0 and values.max() <= 255):
        return values.astype(np.uint8)
    if mode not in ("RGB", "RGBA"):
        raise ValueError(f"{path}: expected a PNG of class indices (palette or 8-bit grey), got mode {mode}")
    codes = values.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)  # (H, W)
    palette = voc_palette().astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
    order = np.argsort(palette)
    position = np.searchsorted(palette, codes, sorter=order).clip(max=255)
    index = order[position]
    if (palette[index] != codes).any():
        wrong = values[palette[index] != codes][0].tolist()
        raise ValueError(
            f"{path}: a colour image with the colour {tuple(wrong)}, which is not in the VOC palette; "
            "save masks as class indices (palette or 8-bit grey PNG)"
        )
    return index.astype(np.uint8)


def listing(folder: Path, suffixes: Sequence[str]) -> dict[str, str]:
    """Stem -> file of one folder, without sub-folders; upper- and lower-case suffixes; empty if there is no folder.

    Raises:
        ValueError: two files of one stem, which might be two photographs.
    """
    if not folder.is_dir():
        return {}
    found: dict[str, str] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda item: item.name):
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() in suffixes and not stem.startswith("."):
                if stem in found:
                    both = f"{os.path.basename(found[stem])} and {entry.name}"
                    raise ValueError(f"{folder}: expected one file a name, got {both}")
                found[stem] = entry.path
    return found


def read_list(path: Path) -> tuple[str, ...]:
    """Image names of a list, one a line; of a line with several columns or a path, the first one's stem.

    So both "2007_000032" and "/JPEGImages/2007_000032.jpg /SegmentationClass/2007_000032.png" name 2007_000032.
    """
    names = []
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if not line.strip():
            continue
        name = line.split()[0].replace("\\", "/").rsplit("/", 1)[-1]
        stem, suffix = os.path.splitext(name)
        names.append(stem if suffix.lower() in PHOTO_SUFFIXES else name)
    if not names:
        raise ValueError(f"{path}: an empty list, expected one image name a line")
    check_unique(names, str(path))
    return tuple(names)


def read_json(path: Path, argument: str, expected: str) -> dict[str, Any]:
    """What a JSON file holds, which has to be an object.

    Args:
        path: The file.
        argument: What gave the file, for the messages.
        expected: What it should hold, for the messages.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        check_unique([key for key, _ in pairs], f"{argument}: {path}")
        return dict(pairs)

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{argument}: {path} is not JSON ({error}); expected {expected}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{argument}: {path}: expected {expected}, got a {type(content).__name__}")
    return content


def choose_classes(wanted: str | Sequence[str] | None, known: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and 1-based indices in `known` of the classes to keep: all, or those of "cat,dog" in the order written."""
    if wanted is None:
        return tuple(known), tuple(range(1, len(known) + 1))
    names = tuple(part.strip() for part in (wanted.split(",") if isinstance(wanted, str) else wanted))
    names = tuple(name for name in names if name)
    if not names:
        raise ValueError(f"classes: expected at least one name, got {wanted!r}")
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise ValueError(f"classes: no class {name!r}{hint}")
    check_unique(names, "classes")
    return names, tuple(known.index(name) + 1 for name in names)


def index_table(classes: int, keep: Sequence[int]) -> np.ndarray:
    """(256,) int16 table for `FileAnnotations`: kept classes to 1.., the other known ones to 0, the rest to -1."""
    table = np.full(256, -1, dtype=np.int16)
    table[: classes + 1] = 0
    table[list(keep)] = np.arange(1, len(keep) + 1)
    table[IGNORE] = IGNORE
    return table


def warn_of_both(name: str, train: Iterable[str], val: Iterable[str], *, stacklevel: int) -> None:
    """Warn about images of the data set `name` that are in train and in val."""
    both = set(train) & set(val)
    if both:
        message = f"{name}: {first_five(sorted(both), 'image')} both in train and in val"
        warnings.warn(message, stacklevel=stacklevel + 1)


def check_apart(outside: Mapping[str, str], dataset: ImageSet, argument: str) -> None:
    """Raise ValueError if an image that is to show none of the classes is one to train or to measure on.

    Args:
        outside: Name -> photograph.
        dataset: Its own out-of-distribution images may be among them.
        argument: What gave the photographs, for the message.
    """
    inside = {os.path.realpath(dataset.files[name]) for name in (*dataset.train, *dataset.val)}
    shared = [path for path in outside.values() if os.path.realpath(path) in inside]
    if shared:
        raise ValueError(
            f"{argument}: expected photographs without any of the classes, got "
            f"{first_five(shared, 'image', f'of train or val of {dataset.name}')}"
        )


def choose_seed(
    train: Sequence[str], listed: Sequence[str], notes: list[str], masks: Container[str] | None = None
) -> tuple[str, ...]:
    """The images of `train` that a `seed_list` names and that have a mask; `notes` are told of the others.

    Args:
        train: The images to train on.
        listed: Those of the list.
        notes: Added to.
        masks: The images that have one; None: all.
    """
    in_list, in_train = set(listed), set(train)
    named = tuple(image for image in train if image in in_list)
    seed = tuple(image for image in named if masks is None or image in masks)
    strays = len(in_list - in_train)
    if strays:
        notes.append(f"Images of seed_list that are not in train: {strays:,}.")
    if len(seed) < len(named):
        notes.append(f"Images of seed_list that have no mask: {len(named) - len(seed):,}.")
    if not seed:
        notes.append("No image of seed_list is left: seeds and pseudo masks are not measured.")
    return seed


def restrict(tags: Mapping[str, Iterable[int]], keep: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Tags in a data set's own indices -> sorted tags in ours; classes that are not kept are left out."""
    ours = {index: position for position, index in enumerate(keep, start=1)}
    return {name: tuple(sorted({ours[i] for i in indices if i in ours})) for name, indices in tags.items()}


def split_tagged(names: Sequence[str], tags: Mapping[str, tuple[int, ...]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names with at least one tag, and names with none."""
    return tuple(name for name in names if tags[name]), tuple(name for name in names if not tags[name])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A suggestion to append to an error message, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def first_five(items: Sequence[str], what: str, rest: str = "") -> str:
    """A count and the first five of a list, for an error message."""
    plural = "" if len(items) == 1 else "s"
    more = f" and {len(items) - 5:,} more" if len(items) > 5 else ""
    return f"{len(items):,} {what}{plural}{' ' * bool(rest)}{rest}: {', '.join(items[:5])}{more}"


def check_unique(names: Sequence[str], where: str) -> None:
    """Raise ValueError if a name occurs twice."""
    seen: set[str] = set()
    twice = [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
    if twice:
        raise ValueError(f"{where}: {first_five(twice, 'name')} given more than once")


def _orientation(stored: Image.Image) -> int:
    # Pillow decodes a whole PNG to look for an EXIF chunk behind the pixels; cameras do not write such files
    if stored.format == "PNG" and "exif" not in stored.info:
        return 1
    return stored.getexif().get(0x0112, 1)


def _upright_size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as stored:
            width, height = stored.size
            return (width, height) if _orientation(stored) in _SIDEWAYS else (height, width)
    except BROKEN as error:
        raise ValueError(f"{path}: cannot be read as a photograph ({error})") from error


def _check_complete(path: str) -> None:
    ends = {".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".png": b"IEND"}
    end = ends.get(os.path.splitext(path)[1].lower())
    if end is not None:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 4096))
            if end in file.read():
                return
    with Image.open(path) as stored:
        stored.load()
