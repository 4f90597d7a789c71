"""Masks of any photographs by a trained segmentation network, and pictures of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from recipes.pipeline.data.image_set import PHOTO_SUFFIXES, first_five, read_photo
from recipes.pipeline.files import replacing, save_mask
from recipes.pipeline.pictures import class_colours, mask_overlay
from recipes.pipeline.pretrained import Pretrained
from recipes.pipeline.views import image_tensor, scaled_size
from wsss_modules import dense_crf, unary_from_scores


class Prediction(NamedTuple):
    """What was written for a photograph, and the share of its pixels that each class found in it covers."""

    photo: Path
    mask: Path
    overlay: Path
    shares: dict[str, float]


def find_photos(paths: Sequence[Path]) -> dict[str, Path]:
    """The photographs among ``paths`` and directly in the folders among them, by the name of their masks.

    Raises:
        FileNotFoundError: a path that is not there, or a folder without photographs.
        ValueError: two photographs whose masks would have one name, or a file of another kind.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"photos: there is no {path}")
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PHOTO_SUFFIXES)
            if not inside:
                raise FileNotFoundError(f"photos: no photograph ({', '.join(PHOTO_SUFFIXES)}) in {path}")
        for photo in inside:
            if photo.suffix.lower() not in PHOTO_SUFFIXES:
                raise ValueError(f"photos: expected {', '.join(PHOTO_SUFFIXES)}, got {photo}")
            other = found.setdefault(photo.stem, photo)
            if other != photo:
                raise ValueError(f"photos: {other} and {photo} would both be {photo.stem}.png; predict them apart")
    return found


def predict(
    trained: Pretrained,
    photos: dict[str, Path],
    out: Path,
    *,
    crf: bool | None = None,
    long_side: int | None = None,
    device: str | torch.device = "cpu",
    complain: Callable[[str], None],
) -> Iterator[Prediction]:
    """Write ``NAME.png``, the mask, and ``NAME_overlay.jpg`` for each photograph, one after the other.

    Args:
        trained: the network.
        photos: by name, see :func:`find_photos`.
        out: folder that is written to; never over one of the photographs.
        crf: refine by a dense CRF; as the network was tested by default.
        long_side: photographs with a longer side are seen at this one, their masks are of their own size; None: all are
            seen as they are.
        device: where the network runs.
        complain: told of each photograph that can't be read; it is left out.

    Raises:
        ValueError: a ``long_side`` below 1, or a mask or an overlay that would take the place of a photograph; nothing
            has been written by then.
    """
    if long_side is not None and long_side < 1:
        raise ValueError(f"long_side: expected at least 1 pixel, got {long_side}")
    _check_apart(photos, out)
    network = trained.network.to(device, memory_format=torch.channels_last)
    refine = trained.config.crf if crf is None else crf
    colours = class_colours(len(trained.classes))
    for name, photo in photos.items():
        try:
            picture = read_photo(photo)
        except ValueError as error:
            complain(str(error))
            continue
        image = _at_most(image_tensor(picture).to(device), long_side)
        with torch.no_grad():
            scores = network.probabilities(image, trained.config.test_scales)
            if refine:
                scores = dense_crf(image[None], unary_from_scores(scores[None]), network.crf_settings)[0]
            mask = _best_at(scores, (picture.height, picture.width)).cpu().numpy()
        files = _targets(out, name)
        save_mask(files[0], mask, trained.palette_index)
        with replacing(files[1]) as file:
            Image.fromarray(mask_overlay(np.asarray(picture), mask, colours)).save(file, format="JPEG", quality=90)
        share = np.bincount(mask.ravel(), minlength=1 + len(trained.classes)) / mask.size
        yield Prediction(photo, *files, {c: s for c, s in zip(trained.classes, share[1:], strict=True) if s > 0})


def _at_most(image: Tensor, long_side: int | None) -> Tensor:
    """The image (3, H, W) uint8, made smaller if it has a longer side."""
    size = tuple(image.shape[-2:])
    if long_side is None or max(size) <= long_side:
        return image
    return TF.resize(image, list(scaled_size(*size, long_side / max(size))), InterpolationMode.BICUBIC)


def _best_at(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Index (H, W) uint8 of the largest of the scores (C, h, w) at another size, enlarged one by one."""
    if tuple(scores.shape[-2:]) == size:
        return scores.argmax(0).byte()
    best, index = scores.new_full(size, -torch.inf), torch.zeros(size, dtype=torch.uint8, device=scores.device)
    for k, one in enumerate(scores):
        enlarged = F.interpolate(one[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        index[enlarged > best] = k
        best = torch.maximum(best, enlarged)
    return index


def _targets(out: Path, name: str) -> tuple[Path, Path]:
    return out / f"{name}.png", out / f"{name}_overlay.jpg"


def _check_apart(photos: dict[str, Path], out: Path) -> None:
    files = {_identity(photo) for photo in photos.values() if photo.exists()}
    targets = [target for name in photos for target in _targets(out, name) if target.exists()]
    lost = [str(target) for target in targets if _identity(target) in files]
    if lost:
        raise ValueError(
            f"out: masks or overlays would overwrite {first_five(lost, 'photograph')}; give another folder"
        )


def _identity(path: Path) -> tuple[int, int]:
    # the same for all names of a file, as of Path.samefile
    status = path.stat()
    return status.st_dev, status.st_ino
