"""Out-of-distribution images: photographs that show none of the classes, from the data set or from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from recipes.pipeline.data.image_set import PHOTO_SUFFIXES, check_apart, first_five
from recipes.pipeline.data.voc import outside_images
from recipes.pipeline.files import load_arrays, replacing, save_arrays
from recipes.pipeline.models import Classifier, Trunk
from recipes.pipeline.run import Run
from recipes.pipeline.training import TaggedCrops
from recipes.pipeline.views import image_tensor, scaled_size, view

PREFIX = "ood__"  # of the names that outside_images gives, so that none is that of a training image


def find_outside(folder: str | None, listed: str | None, option: str = "outside") -> dict[str, str]:
    """Look for the photographs of a folder.

    Args:
        folder: holds them, or has a JPEGImages that does.
        listed: file that names those to use, one a line, with or without suffix; what follows a tab is a remark.
        option: what gave the folder, for the messages.

    Returns:
        Name -> photograph; empty without a folder.

    Raises:
        ValueError: no such folder, list or photograph, or a list without a folder.
    """
    if folder is None:
        if listed is not None:
            raise ValueError("outside_list: expected together with outside, the folder that the list is of")
        return {}
    path = Path(folder).expanduser().absolute()
    found = outside_images(path, required=False)
    if not found:
        raise ValueError(f"{option}: no photographs in {path}")
    if listed is None:
        return found
    file = Path(listed).expanduser()
    if not file.is_file():
        raise ValueError(f"outside_list: no file {file}")
    lines = [line.partition("\t")[0].strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    names = [PREFIX + (Path(line).stem if line.lower().endswith(PHOTO_SUFFIXES) else line) for line in lines if line]
    if not names:
        raise ValueError(f"outside_list: {file} is empty")
    missing = [name.removeprefix(PREFIX) for name in names if name not in found]
    if missing:
        raise ValueError(f"outside_list: {first_five(missing, 'image', f'of {file} not in {path}')}")
    return {name: found[name] for name in names}


def add_outside(run: Run, found: dict[str, str]) -> tuple[str, ...]:
    """Make the photographs of `find_outside` the out-of-distribution images of the run, by default its data set's own.

    Returns:
        Their names; the first ``max_steps`` of them in a run cut short.

    Raises:
        ValueError: there is none, some are broken, or are images of train or val.
    """
    if found:
        check_apart(found, run.dataset, "outside")
        replace(run.dataset, files=found).check()
        files = {**run.dataset.files, **found}
        run.dataset = replace(run.dataset, files=files, out_of_distribution=tuple(found))
    names = run.dataset.out_of_distribution
    if not names:
        raise ValueError(
            f"outside: {run.dataset.name} has no out-of-distribution images; give a folder of photographs without any "
            f"{', '.join(run.dataset.classes[:5])}{'...' * (len(run.dataset.classes) > 5)} (and another --out)"
        )
    return names if run.config.max_steps is None else names[: run.config.max_steps]


class CropsWithOutside(Dataset):
    """The items of ``crops``, each with ``outside`` (3, crop, crop): a random one of these images, augmented alike."""

    def __init__(self, crops: TaggedCrops, outside: Sequence[str]) -> None:
        self.crops, self.outside = crops, outside

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.crops[index]
        name = self.outside[int(torch.randint(len(self.outside), ()))]
        image = self.crops.transform(tv_tensors.Image(self.crops.dataset.image(name)))
        return {**item, "outside": image.as_subclass(Tensor)}


def pooled_features(
    run: Run, trunk: Trunk, names: Sequence[str], long_side: int | None = None, folder: str = "features"
) -> Tensor:
    """(N, D) means of the last map of ``trunk`` over whole images, which are kept in ``folder/IMAGE.npz``.

    Args:
        run: gives the images.
        trunk: put in eval mode.
        names: the N images.
        long_side: longer side of the images in pixels; their own by default.
        folder: of the run; for other weights of ``trunk`` another one.
    """
    trunk.to(run.fabric.device, memory_format=torch.channels_last).eval()

    @torch.no_grad()
    def work(name: str) -> None:
        image = image_tensor(run.dataset.image(name)).to(run.fabric.device)
        height, width = image.shape[-2:]
        size = (height, width) if long_side is None else scaled_size(height, width, long_side / max(height, width))
        pooled = trunk(view(image, size, trunk.mean, trunk.std, flip=False)).final.mean((2, 3))[0]
        save_arrays(run.path(folder, f"{name}.npz"), features=pooled.cpu().numpy())

    def read(name: str) -> np.ndarray:
        return load_arrays(run.path(folder, f"{name}.npz"))["features"]

    run.for_each(names, lambda name: run.path(folder, f"{name}.npz"), work)
    return torch.from_numpy(np.stack([read(name) for name in names]))


def rank_outside(run: Run, classifier: Classifier, names: Sequence[str], long_side: int | None = None) -> None:
    """Write ``outside.txt``: candidates that the classifier takes for a class (above 0.5), the surest first."""
    features = pooled_features(run, classifier.trunk, names, long_side)
    weight = classifier.head.classifier.weight.detach().cpu().flatten(1)
    surest, index = F.linear(features, weight).sigmoid().max(1)
    order = [i for i in surest.argsort(descending=True, stable=True).tolist() if surest[i] > 0.5]
    lines = [f"{names[i].removeprefix(PREFIX)}\t{surest[i]:.3f}\t{run.dataset.classes[int(index[i])]}\n" for i in order]
    if run.fabric.global_rank == 0:
        with replacing(run.path("outside.txt"), "w") as file:
            file.writelines(lines)
    said = f"{len(lines)} of {len(names)} candidates are taken for a class"
    if lines:
        advice = f"strike out of {run.path('outside.txt')} those that show one, then train with --outside-list"
        run.console.print(f"  {said}; {advice}", highlight=False)
    else:
        run.console.print(f"  [yellow]{said}: there is nothing to learn from them; try others[/]", highlight=False)
