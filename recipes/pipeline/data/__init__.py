"""Data sets as recipes see them: `load_dataset` finds one, `ImageSet` hands out its images, tags and masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from recipes.pipeline.data.coco import load_coco
from recipes.pipeline.data.demo import demo_folder
from recipes.pipeline.data.folder import load_folder
from recipes.pipeline.data.image_set import IGNORE, ImageSet, check_apart
from recipes.pipeline.data.voc import load_voc

__all__ = ["IGNORE", "ImageSet", "load_dataset"]


class _Lists(TypedDict):
    train_list: str | Path | None
    val_list: str | Path | None
    seed_list: str | Path | None


def load_dataset(
    spec: str,
    *,
    classes: str | Sequence[str] | None = None,
    labels: str | Path | None = None,
    train_list: str | Path | None = None,
    val_list: str | Path | None = None,
    seed_list: str | Path | None = None,
    masks: str | Path | None = None,
    out_of_distribution: str | Path | None = None,
) -> ImageSet:
    """Load a data set.

    Args:
        spec: "demo" (built in; "demo:tiny" has 16 + 8 images, "demo:100+20" as many as it says), "voc:PATH",
            "coco:PATH" or "folder:PATH". What is looked for in PATH: see the tops of voc.py, coco.py and folder.py.
        classes: Classes to keep, "cat,dog" or a sequence, in this order; all others count as background.
        labels: Tags file (tags.py says which forms it may have). Needed by "folder:"; takes the place of the object
            annotations in "voc:".
        train_list: Images to train on: a file, or the name of a list of the data set.
        val_list: Images to measure the segmentation on.
        seed_list: Images of train whose masks are trusted, on which seeds and pseudo masks are measured.
        masks: Folder of masks of a "folder:", if they are not in PATH/masks.
        out_of_distribution: Folder of photographs with none of the classes.

    Raises:
        ValueError: Something is missing or malformed; nothing has been written by then.
    """
    kind, _, path = spec.partition(":")
    lists = _Lists(train_list=train_list, val_list=val_list, seed_list=seed_list)
    if kind == "demo":
        folder = demo_folder(path)
        dataset = load_voc(
            folder, name=spec, classes=classes, labels=labels, out_of_distribution=out_of_distribution, **lists
        )
    elif kind == "voc" and path:
        dataset = load_voc(
            path, name=spec, classes=classes, labels=labels, out_of_distribution=out_of_distribution, **lists
        )
    elif kind == "folder" and path:
        dataset = load_folder(
            path,
            name=spec,
            classes=classes,
            labels=labels,
            masks=masks,
            out_of_distribution=out_of_distribution,
            **lists,
        )
    elif kind == "coco" and path:
        if labels is not None:
            raise ValueError("labels: coco: reads its tags from the instance files; use folder: for tags of your own")
        dataset = load_coco(path, name=spec, classes=classes, out_of_distribution=out_of_distribution, **lists)
    else:
        hint = f"; did you mean folder:{spec}?" if Path(spec).expanduser().exists() else ""
        raise ValueError(f"data: expected demo, voc:PATH, coco:PATH or folder:PATH, got {spec!r}{hint}")
    if out_of_distribution is not None:
        outside = {name: dataset.files[name] for name in dataset.out_of_distribution}
        check_apart(outside, dataset, "out_of_distribution")
    return dataset
