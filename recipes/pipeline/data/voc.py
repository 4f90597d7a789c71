"""PASCAL VOC 2012, and any folder laid out like it.

    JPEGImages/NAME.jpg                       photographs
    Annotations/NAME.xml                      objects: the default source of tags and boxes
    ImageSets/Segmentation/{train,val}.txt    lists; also train_aug.txt, train_official.txt
    SegmentationClass/NAME.png                hand-made masks, palette or grey indices, 255 ignore
    SegmentationClassAug/NAME.png             masks of the augmented set (SBD)
    Saliency/NAME.png, OutOfDistribution/NAME.jpg, captions.json    optional, as in the built-in demo set
    image_labels.json                         tags instead of XMLs, optional
    classes.txt                               foreground class names in mask order, where they are not VOC's twenty

What is read from where:

- train: `train_list`; else train_aug.txt; else every mask of SegmentationClassAug that is not in val; else train.txt.
  Images without a tag of the chosen classes leave it and become out-of-distribution images.
- seed: the images of train that have hand-made masks: `seed_list`; else train_official.txt; else train.txt.
- tags: `labels`; else image_labels.json; else the XMLs; else, with a warning, the masks. Objects marked `difficult` are
  tags and boxes like any other (so are they in the label files of PSA and IRN); parts (head, hand, foot) are not.
- masks: SegmentationClass, else SegmentationClassAug.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from recipes.pipeline.data.image_set import (
    PHOTO_SUFFIXES,
    FileAnnotations,
    ImageSet,
    choose_classes,
    choose_seed,
    did_you_mean,
    first_five,
    index_table,
    listing,
    read_json,
    read_list,
    read_mask,
    read_objects,
    restrict,
    split_tagged,
    warn_of_both,
)
from recipes.pipeline.data.tags import json_classes, read_tags

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


def load_voc(
    root: str | Path,
    *,
    name: str = "",
    classes: str | Sequence[str] | None = None,
    labels: str | Path | None = None,
    train_list: str | Path | None = None,
    val_list: str | Path | None = None,
    seed_list: str | Path | None = None,
    out_of_distribution: str | Path | None = None,
) -> ImageSet:
    """Load a VOC folder; the arguments are those of `load_dataset`, the layout is described at the top of this file.

    Raises:
        ValueError: Something that was asked for is not there; the message says what was looked for and what is there.
    """
    root = Path(root).expanduser().absolute()
    name = name or f"voc:{root}"
    _check_layout(root)
    notes: list[str] = []
    photos = listing(root / "JPEGImages", PHOTO_SUFFIXES)
    if not photos:
        raise ValueError(f"data: no photographs in {root / 'JPEGImages'}")
    by_hand = listing(root / "SegmentationClass", (".png",))
    augmented = listing(root / "SegmentationClassAug", (".png",))
    masks = {**augmented, **by_hand}

    val = _named_list(root, val_list, ("val",), "val_list")
    train = _train_names(root, train_list, val, augmented)
    for listed, what in ((train, "train"), (val, "val")):
        missing = [image for image in listed if image not in photos]
        if missing:
            raise ValueError(f"data: {root / 'JPEGImages'} lacks {first_five(missing, 'image', f'of the {what} list')}")
    warn_of_both(name, train, val, stacklevel=3)

    all_classes = _all_classes(root)
    names, keep = choose_classes(classes, all_classes)
    table = index_table(len(all_classes), range(1, len(all_classes) + 1))
    found = _find_tags(root, name, (train, val), all_classes, labels, FileAnnotations(masks, table), notes)
    tags = restrict(found, keep)
    train, untagged = split_tagged(train, tags)
    if not train:
        raise ValueError(f"data: no image of the train list is tagged with any of {', '.join(names)}")
    outside = _outside(root, out_of_distribution)
    if untagged:
        role = "" if outside else " They are the out-of-distribution images."
        notes.append(f"Images left out of train, having no tag of these classes: {len(untagged):,}.{role}")

    if val and not any(image in masks for image in val):
        notes.append("The val images have no masks: the segmentation is not measured.")
    else:
        _check_masks(val, masks, "val", root)
    annotations = FileAnnotations(
        masks=masks,
        table=index_table(len(all_classes), keep),
        xmls=listing(root / "Annotations", (".xml",)),
        class_index={c: position for position, c in enumerate(names, start=1)},
        saliencies=listing(root / "Saliency", (".png",)),
        captions=_captions(root),
    )
    images = dict.fromkeys((*train, *val, *untagged))
    return ImageSet(
        name=name,
        classes=names,
        train=train,
        seed=_seed_names(root, seed_list, train, by_hand, notes),
        val=val,
        out_of_distribution=tuple(outside) or untagged,
        palette_index=(0, *keep),
        files={**{image: photos[image] for image in images}, **outside},
        tags=tags,
        annotations=annotations,
        notes=tuple(notes),
    )


def _check_layout(root: Path) -> None:
    if not root.is_dir():
        raise ValueError(f"data: no folder {root}")
    if (root / "JPEGImages").is_dir():
        return
    here = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
    below = [path.parent for path in (*root.glob("*/JPEGImages"), *root.glob("*/*/JPEGImages"))]
    hint = f"; did you mean voc:{below[0]}?" if below else ""
    raise ValueError(f"data: looked for JPEGImages/ in {root}, there is {', '.join(here[:10]) or 'nothing'}{hint}")


def _all_classes(root: Path) -> tuple[str, ...]:
    if (root / "classes.txt").is_file():
        lines = (root / "classes.txt").read_text(encoding="utf-8").splitlines()
        return tuple(line.strip() for line in lines if line.strip())
    if (root / "image_labels.json").is_file():
        own = json_classes(root / "image_labels.json")
        if own is not None:
            return own
    return VOC_CLASSES


def _named_list(
    root: Path, given: str | Path | None, stems: Iterable[str], argument: str, *, required: bool = True
) -> tuple[str, ...]:
    # a list is a path, or a name under ImageSets/Segmentation with or without .txt
    folder = root / "ImageSets" / "Segmentation"
    tried = [folder / f"{stem}.txt" for stem in stems]
    if given is not None:
        tried = [Path(given).expanduser(), folder / given, folder / f"{given}.txt"]
    for path in tried:
        if path.is_file():
            return read_list(path)
    if not required:
        return ()
    there = sorted(path.name for path in folder.glob("*.txt"))
    hint = did_you_mean(str(given), [os.path.splitext(item)[0] for item in there]) if given is not None else ""
    raise ValueError(
        f"{argument}: looked for {', '.join(map(str, tried))}; {folder} has {', '.join(there) or 'no lists'}{hint}"
    )


def _train_names(
    root: Path, train_list: str | Path | None, val: tuple[str, ...], augmented: Mapping[str, str]
) -> tuple[str, ...]:
    if train_list is not None:
        return _named_list(root, train_list, (), "train_list")
    listed = _named_list(root, None, ("train_aug", "trainaug"), "train_list", required=False)
    if listed:
        return listed
    held_out = set(val)
    return tuple(sorted(set(augmented) - held_out)) or _named_list(root, None, ("train",), "train_list")


def _seed_names(
    root: Path, seed_list: str | Path | None, train: tuple[str, ...], by_hand: Mapping[str, str], notes: list[str]
) -> tuple[str, ...]:
    listed = _named_list(root, seed_list, ("train_official", "train"), "seed_list", required=seed_list is not None)
    if seed_list is not None:
        seed = choose_seed(train, listed, notes)
    else:
        in_list = set(listed)
        seed = tuple(image for image in train if image in in_list)
        if not any(image in by_hand for image in seed):
            notes.append("No hand-made masks of train images: seeds and pseudo masks are not measured.")
            return ()
    _check_masks(seed, by_hand, "seed", root)
    return seed


def _check_masks(names: Iterable[str], masks: Mapping[str, str], what: str, root: Path) -> None:
    missing = [image for image in names if image not in masks]
    if missing:
        raise ValueError(
            f"data: {root / 'SegmentationClass'} lacks {first_five(missing, 'mask', f'of the {what} list')}"
        )


def _find_tags(
    root: Path,
    name: str,
    lists: tuple[tuple[str, ...], tuple[str, ...]],
    classes: tuple[str, ...],
    labels: str | Path | None,
    masks: FileAnnotations,
    notes: list[str],
) -> dict[str, tuple[int, ...]]:
    train, val = lists
    images = tuple(dict.fromkeys((*train, *val)))
    xmls = listing(root / "Annotations", (".xml",))
    if labels is None and (root / "image_labels.json").is_file():
        labels = root / "image_labels.json"
    found: dict[str, tuple[int, ...]] = {}
    if labels is not None:
        in_file = read_tags(labels, classes).of
        found = {image: in_file[image] for image in images if image in in_file}
        _check_tagged(train, found, f"labels: {labels} has no row for")
    elif xmls:
        found = {image: _xml_tags(xmls[image], classes) for image in images if image in xmls}
        _check_tagged(train, found, f"data: {root / 'Annotations'} lacks the XML of")
    elif all(image in masks.masks for image in train):
        warnings.warn(
            f"{name}: no tags file and no Annotations/: the image tags are read off the ground-truth masks",
            stacklevel=4,
        )
        notes.append("The image tags were read off the ground-truth masks.")
    else:
        raise ValueError(
            f"data: no source of image tags in {root}: looked for `labels`, image_labels.json, Annotations/"
        )
    rest = [image for image in images if image not in found]
    if found and rest:
        notes.append(f"Images of val whose tags were read off their masks, if they have any: {len(rest):,}.")
    for image in rest:
        mask = masks.masks.get(image)
        values = np.unique(read_mask(mask)).tolist() if mask is not None else []
        found[image] = tuple(value for value in values if 0 < value <= len(classes))
    return found


def _check_tagged(train: tuple[str, ...], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    missing = [image for image in train if image not in found]
    if missing:
        raise ValueError(f"{where} {first_five(missing, 'image', 'of the train list')}")


def _xml_tags(path: str, classes: tuple[str, ...]) -> tuple[int, ...]:
    tags = set()
    for class_name, _ in read_objects(path):
        if class_name not in classes:
            raise ValueError(f"{path}: unknown class {class_name!r}{did_you_mean(class_name, classes)}")
        tags.add(classes.index(class_name) + 1)
    return tuple(sorted(tags))


def _outside(root: Path, given: str | Path | None) -> dict[str, str]:
    folder = root / "OutOfDistribution" if given is None else Path(given).expanduser().absolute()
    return outside_images(folder, required=given is not None)


def outside_images(folder: Path, *, required: bool) -> dict[str, str]:
    """Out-of-distribution photographs of a folder, or of its JPEGImages, under names "ood__STEM"."""
    if (folder / "JPEGImages").is_dir():
        folder = folder / "JPEGImages"
    found = {f"ood__{stem}": path for stem, path in listing(folder, PHOTO_SUFFIXES).items()}
    if required and not found:
        raise ValueError(f"out_of_distribution: no photographs in {folder}")
    return found


def _captions(root: Path) -> dict[str, str]:
    path = root / "captions.json"
    if not path.is_file():
        return {}
    expected = '{"NAME": "a sentence", ...}'
    captions = read_json(path, "data", expected)
    wrong = [name for name, caption in captions.items() if not isinstance(caption, str)]
    if wrong:
        raise ValueError(f"data: {path}: expected {expected}, got {captions[wrong[0]]!r} for {wrong[0]!r}")
    return captions
