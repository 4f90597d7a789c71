"""Boxes as supervision: those that a data set comes with, or, if asked for by name, boxes around the parts of masks.

A row is the class index 1..K, then x1, y1, x2, y2 in half-open pixels, as `ImageSet.boxes` has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from recipes.pipeline.data.image_set import IGNORE, ImageSet, first_five
from wsss_modules import connected_components

if TYPE_CHECKING:
    from recipes.pipeline.run import Run

BoxOrigin = Literal["annotations", "components_of_masks"]
SUPERVISION = {
    "annotations": "image tags and the bounding boxes of the data set",
    "components_of_masks": "image tags and boxes around the connected components of masks: box supervision from masks",
}
MIN_SHARE = 0.001  # a component below a thousandth of the image is a crumb that another object's edge cut off


@dataclass(frozen=True)
class Boxes:
    """The boxes of a list of images, all read.

    Attributes:
        origin: Where they come from.
        of: Name -> (n, 5) float32: class index 1..K, x1, y1, x2, y2; n may be 0.
    """

    origin: BoxOrigin
    of: Mapping[str, np.ndarray]

    @property
    def most(self) -> int:
        """The largest number of boxes in an image, at least 1."""
        return max([len(boxes) for boxes in self.of.values()], default=1) or 1

    @property
    def supervision(self) -> str:
        """What a run with these boxes was given."""
        return SUPERVISION[self.origin]

    def noted_in(self, dataset: ImageSet) -> ImageSet:
        """The data set with a note of this supervision, which the report shows."""
        return replace(dataset, notes=(*dataset.notes, f"Supervision: {self.supervision}."))

    def tensors(self, name: str) -> tuple[Tensor, Tensor]:
        """Corners (n, 4) float32 and classes (n,) int64 of an image."""
        rows = torch.from_numpy(np.array(self.of[name], dtype=np.float32))
        return rows[:, 1:], rows[:, 0].long()


def read_boxes(
    dataset: ImageSet, names: Sequence[str], origin: BoxOrigin = "annotations", optional: Sequence[str] = ()
) -> Boxes:
    """Read the boxes of images: VOC's XML files, COCO's instances, the demo set's, or from masks.

    Args:
        dataset: The images.
        names: Those whose boxes are needed.
        origin: "annotations" of the data set; or "components_of_masks": the smallest boxes around the 4-connected
            components of each class in the ground truth. Such boxes are made from masks; results with them must say so
            (`Boxes.supervision`).
        optional: Further images, whose boxes are taken where there are any.

    Raises:
        ValueError: Images without boxes, or boxes without an area (the message lists the first five), or an unknown
            ``origin``.
    """
    if origin not in SUPERVISION:
        raise ValueError(f"boxes: expected {' or '.join(SUPERVISION)}, got {origin!r}")
    found, missing, broken = {}, [], []
    for name in (*names, *optional):
        try:
            boxes = dataset.boxes(name) if origin == "annotations" else boxes_of_mask(dataset.mask(name))
        except ValueError as error:
            broken.append(str(error))
            continue
        if boxes is None:
            missing.append(name)
        else:
            found[name] = boxes
    if broken:
        raise ValueError(f"boxes: {first_five(broken, 'image')} cannot be used")
    missing = [name for name in missing if name in set(names)]
    if missing and origin == "annotations":
        raise ValueError(
            f"boxes: {dataset.name} comes without boxes for {first_five(missing, 'image')}; give VOC XML files in "
            "Annotations/ or COCO's instances, or have boxes made from masks with --boxes components_of_masks"
        )
    if missing:
        raise ValueError(f"boxes: {dataset.name} has no mask to make boxes from for {first_five(missing, 'image')}")
    if not any(len(boxes) for boxes in found.values()):
        raise ValueError(f"boxes: no image of {dataset.name} has a box of its classes")
    return Boxes(origin, found)


def boxes_for(run: Run, origin: BoxOrigin) -> Boxes:
    """The boxes of a run's training images, and of val images that have some; its report says where they are from."""
    boxes = read_boxes(run.dataset, run.train, origin, optional=run.val)
    run.dataset = boxes.noted_in(run.dataset)
    run.record(supervision=boxes.supervision)
    return boxes


def boxes_of_mask(mask: np.ndarray | None) -> np.ndarray | None:
    """(n, 5) boxes around the components of each class of a mask (H, W); None without a mask.

    Crumbs below `MIN_SHARE` of the image are left out where the class has a larger component.
    """
    if mask is None:
        return None
    rows = []
    for index in np.unique(mask[(mask > 0) & (mask != IGNORE)]).tolist():
        numbered = connected_components(torch.from_numpy(mask == index)).numpy()
        sizes = np.bincount(numbered.ravel())[1:]
        least = min(MIN_SHARE * mask.size, sizes.max())
        for number in np.flatnonzero(sizes >= least) + 1:
            y, x = np.nonzero(numbered == number)
            rows.append([index, x.min(), y.min(), x.max() + 1, y.max() + 1])
    return np.array(rows, dtype=np.float32).reshape(-1, 5)


class BoxedCrops(Dataset):
    """What a box-supervised network trains on.

    Items: ``image`` (3, h, w); ``boxes`` (M, 5) class, x1, y1, x2, y2 as they lie in the crop, rows of class 0 being
    empty, M the most of any image; ``inside`` (1, h, w) 1 where the photograph is, 0 where it was padded.

    Args:
        dataset: The images.
        names: Those to train on.
        boxes: Their boxes.
        transform: Of images, masks and boxes alike, with ``mask_fill=0`` if it pads; see `crop_transform`.
        min_side: Boxes of which less is left in either direction are dropped, in pixels.
    """

    def __init__(
        self, dataset: ImageSet, names: Sequence[str], boxes: Boxes, transform: v2.Transform, min_side: float = 4.0
    ) -> None:
        self.dataset, self.names, self.boxes = dataset, names, boxes
        self.transform, self.min_side, self.most = transform, min_side, boxes.most

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        name = self.names[index]
        image = tv_tensors.Image(self.dataset.image(name))
        size = (image.shape[-2], image.shape[-1])
        corners, classes = self.boxes.tensors(name)
        inside = tv_tensors.Mask(torch.ones(1, *size, dtype=torch.uint8))
        framed = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size)
        image, inside, framed = self.transform(image, inside, framed)
        corners = framed.as_subclass(Tensor)
        left = ((corners[:, 2:] - corners[:, :2]) >= self.min_side).all(1)
        rows = torch.zeros(self.most, 5)
        rows[: int(left.sum())] = torch.cat([classes[left, None].float(), corners[left]], 1)
        return {
            "image": image.as_subclass(Tensor),
            "boxes": rows,
            "inside": inside.as_subclass(Tensor).float(),
            "index": torch.tensor(index),
        }


def flat_boxes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (B, M, 5) of `BoxedCrops` as boxes (n, 5) with the image index first, and their classes (n,)."""
    image, place = (rows[:, :, 0] > 0).nonzero(as_tuple=True)
    chosen = rows[image, place]
    return torch.cat([image[:, None].to(rows), chosen[:, 1:]], 1), chosen[:, 0].long()
