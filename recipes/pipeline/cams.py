"""Class activation maps of a trained classifier, over scales and mirror images, one ``cam/IMAGE.npz`` an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.pipeline.files import load_arrays, save_arrays
from recipes.pipeline.models import Trunk
from recipes.pipeline.run import Run
from recipes.pipeline.views import views
from wsss_modules import PresentCAM, merge_flip, multi_scale_cam


@dataclass(frozen=True)
class CamConfig:
    """How CAMs are read off the classifier."""

    output_stride: int = 16
    """Pixels per cell of the last map; finer than in training costs only time."""
    long_side: int | None = None
    """Longer side of the image at scale 1 in pixels; the image's own by default."""
    scales: tuple[float, ...] = (1.0, 0.5, 1.5, 2.0)
    """Sizes whose CAMs are added, each with its mirror image."""


class CamModel(Protocol):
    """What gives CAMs: images (B, 3, H, W) to an output with ``cam`` (B, K, h, w), through a backbone ``trunk``."""

    trunk: Trunk

    def __call__(self, images: Tensor) -> Any: ...

    def to(self, *args: Any, **kwargs: Any) -> Any: ...


class Cam(NamedTuple):
    """CAMs of the k present classes of one image, in [0, 1] with maximum 1."""

    keys: np.ndarray
    """(k,) class indices 1..K."""
    cam: np.ndarray
    """(k, H, W) float32 at the size of the image."""
    coarse: np.ndarray
    """(k, ceil(H / 4), ceil(W / 4)) float32."""

    def tensors(self, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """The maps (1, k, H, W) and their classes (k,)."""
        return torch.from_numpy(self.cam)[None].to(device), torch.from_numpy(self.keys).to(device)


class Maps(NamedTuple):
    """``cam`` (B, K, h, w): the output of a network that is read for its maps alone."""

    cam: Tensor


def write_cams(
    run: Run,
    model: CamModel,
    names: Sequence[str],
    config: CamConfig,
    folder: str = "cam",
    *,
    signed: bool | Literal["sum"] = False,
    stretch: bool = False,
    whole_cells: bool = False,
) -> None:
    """Write the CAMs of the tagged classes of each image as IRN does: summed over views, divided by their maximum.

    ``signed``: the model's maps may be negative; ReLU comes after the up-sampling of each view (OC-CSE, AEFT), or with
    "sum" after that, bicubic, of all views (L2G).
    ``stretch``: maps go from 0 to 1 (MCTformer, PPC). ``whole_cells``: views have whole cells, for models that leave
    out what is left over at the border, such as a ViT; their maps cover the image.
    """
    model.trunk = model.trunk.with_output_stride(config.output_stride)
    model.to(run.fabric.device, memory_format=torch.channels_last).eval()
    options = {"signed": signed, "stretch": stretch, "whole_cells": whole_cells}

    def work(name: str) -> None:
        merged = cams_of(run, model, name, config, **options)
        save_cam(run, name, merged.keys, merged.high_res, merged.cam, folder)

    run.for_each(names, lambda name: run.path(folder, f"{name}.npz"), work)


@torch.no_grad()
def cams_of(
    run: Run,
    model: CamModel,
    name: str,
    config: CamConfig,
    *,
    signed: bool | Literal["sum"] = False,
    stretch: bool = False,
    whole_cells: bool = False,
) -> PresentCAM:
    """The CAMs of one image by a model in eval mode on the run's device; options as in :func:`write_cams`."""
    device = run.fabric.device
    image = run.image(name)
    labels = torch.from_numpy(run.dataset.labels(name)).to(device)
    maps, flipped = [], []
    multiple = config.output_stride if whole_cells else 1
    for both in views(image, model.trunk, config.scales, long_side=config.long_side, multiple=multiple):
        plain, mirrored = model(both).cam
        maps += [plain[None], mirrored[None]] if signed else [merge_flip(plain, mirrored)[None]]
        flipped += [False, True] if signed else [False]
    return multi_scale_cam(
        maps,
        labels[None],
        tuple(image.shape[-2:]),
        mirrored=flipped,
        stride=4,
        round_to=1 if whole_cells else 16,
        relu=signed,
        interpolation="bicubic" if signed == "sum" else "bilinear",
        eps=1e-8 if stretch else 1e-5,
        subtract_min=stretch,
    )


def write_maps(
    run: Run, names: Sequence[str], maps_of: Callable[[str], Mapping[str, Tensor]], folder: str = "cam"
) -> None:
    """Write ``FOLDER/IMAGE.npz`` for each image, where ``maps_of(name)`` gives the arguments of :func:`save_cam`."""

    @torch.no_grad()
    def work(name: str) -> None:
        save_cam(run, name, folder=folder, **maps_of(name))

    run.for_each(names, lambda name: run.path(folder, f"{name}.npz"), work)


def save_cam(
    run: Run, name: str, keys: Tensor, cam: Tensor, coarse: Tensor | None = None, folder: str = "cam", **more: Tensor
) -> None:
    """Write the maps of one image, see :class:`Cam`, in half precision, and ``more`` beside them as it is.

    Where maps come at full size only, those at a quarter of it are made from them.
    """
    coarse = _quarter(cam) if coarse is None else coarse
    arrays = {"keys": keys, "cam": cam.half(), "coarse": coarse.half(), **more}
    save_arrays(run.path(folder, f"{name}.npz"), **{key: value.cpu().numpy() for key, value in arrays.items()})


def share_of_classes(scores: Tensor) -> Tensor:
    """Scores (1 + k, H, W) of background and classes to (k, H, W): each class against the background, in [0, 1].

    The class of the highest of all scores is that of the highest share, where that exceeds one half.
    """
    background, classes = scores[:1], scores[1:]
    return classes / (background + classes).clamp(min=torch.finfo(scores.dtype).tiny)


def _quarter(cam: Tensor) -> Tensor:
    size = [-(-side // 4) for side in cam.shape[-2:]]
    if len(cam) == 0:  # no tag; interpolate refuses it
        return cam.new_zeros(0, *size)
    return F.interpolate(cam[None], size, mode="bilinear", align_corners=False)[0]


def read_cam(run: Run, name: str, folder: str = "cam") -> Cam:
    """What :func:`write_cams` wrote."""
    stored = load_arrays(run.path(folder, f"{name}.npz"))
    return Cam(stored["keys"], stored["cam"].astype(np.float32), stored["coarse"].astype(np.float32))
