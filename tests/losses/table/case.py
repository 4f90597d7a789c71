"""What a row of the table says of a loss, how its arguments are permuted, and inputs that several losses share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# What the images of a batch may lack. "typical" has everything.
SITUATIONS = ("typical", "no_label", "all_ignored", "batch_1", "smallest")

# Relative error of a result that is computed in float32 and rounded once to the dtype.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}

# Ranges of predictions; any that a row does not name is real.
REAL, POSITIVE, UNIT, COSINE = (-1e6, 1e6), (0.0, 1e6), (0.0, 1.0), (-1.0, 1.0)

# Leading axes of an argument, or of each tensor of a tuple: B images (or what the loss takes as independent samples), K
# classes, C background and classes, R pairs of an image and a class in the order of `labels.nonzero()`, "." any other.
# After "=", what integers stand for: image (-1 none), class (1..K; 0 and 255 are none), channel (0..K-1), box (the
# first column is the image).
Axes = str | tuple[str, ...]


@dataclass(frozen=True)
class LossCase:
    """One loss.

    Args:
        function: the functional form.
        module: the class.
        inputs: from a situation to the arguments, float64, on the CPU, the same at each call.
        axes: of each argument.
        predictions: how many leading arguments are differentiable predictions.
        options: keyword arguments of both forms, for small inputs.
        zero_in: situations in which there is nothing to learn, so that the loss is exactly 0.
        varies: further option sets for gradcheck, e.g. each reduction.
        sync: the loss takes part in a distributed run with ``sync=True``.
        constants: how many trailing arguments belong to no image, and are the same in all processes.
        data_dependent: why the loss can't be compiled to one graph, if so.
        ranges: lowest and highest value of predictions that are not any real number, by name.
        ignores_absent: names of the predictions whose entries of classes that are not in ``labels`` do not count. In
            all other predictions with classes, they do.
        scales: of which degree the loss is in which arguments: names, multiplied together by a positive number, to the
            power of it that comes out.
        shifts: names of predictions that may be shifted by any number common to all classes.
        mean_over: from the inputs to how many costs the mean is over, or that by the name of each term where they
            differ; by default all of ``reduction="none"``.
        ties_in: situations in which classes tie, so that rounding decides: float32 may differ from float64.
    """

    function: Callable[..., Any]
    module: type[nn.Module]
    inputs: Callable[[str], Sequence[Any]]
    axes: tuple[Axes, ...]
    predictions: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    zero_in: tuple[str, ...] = ("all_ignored",)
    varies: tuple[Mapping[str, Any], ...] = ()
    sync: bool = False
    constants: int = 0
    data_dependent: str = ""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    ignores_absent: str = ""
    scales: Mapping[str, int] = field(default_factory=dict)
    shifts: str = ""
    mean_over: Callable[..., int | dict[str, int]] | None = None
    ties_in: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    def named(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """The inputs by the names of the arguments."""
        return dict(zip(self.parameters, inputs, strict=False))

    def size(self, inputs: Sequence[Any], letter: str) -> int:
        """Length of the axis B or K, on which all inputs have to agree; 0 if there is none."""
        lengths = set()
        for value, axes in zip(inputs, self.axes, strict=True):
            if isinstance(value, Tensor) and isinstance(axes, str):
                for length, found in zip(value.shape, axes.partition("=")[0], strict=False):
                    lengths |= {length - (found == "C")} if found == letter or (letter, found) == ("K", "C") else set()
        assert len(lengths) <= 1, f"{self.name}: axis {letter} has the lengths {lengths}"
        return lengths.pop() if lengths else 0

    def permuted(self, inputs: Sequence[Any], images: Tensor, classes: Tensor) -> list[Any]:
        """The inputs with image ``images[i]`` in place i, and class ``classes[k]`` in place k."""
        labels, pairs = self.named(inputs).get("labels"), None
        if isinstance(labels, Tensor) and labels.ndim == 2:
            number = torch.full(labels.shape, -1)
            number[labels > 0] = torch.arange(int((labels > 0).sum()))
            pairs = number[images][:, classes] if labels.shape == (len(images), len(classes)) else None
        order = {"B": images, "K": classes, "C": torch.cat([classes.new_zeros(1), 1 + classes])}
        if pairs is not None:
            order["R"] = pairs[pairs >= 0]
        return [_permuted(value, axes, order) for value, axes in zip(inputs, self.axes, strict=True)]


def _permuted(value: Any, axes: Axes, order: Mapping[str, Tensor]) -> Any:
    if isinstance(axes, tuple):
        return type(value)(*(_permuted(part, each, order) for part, each in zip(value, axes, strict=True)))
    if not isinstance(value, Tensor):
        return value
    letters, _, meaning = axes.partition("=")
    for dim, letter in enumerate(letters):
        value = value.index_select(dim, order[letter]) if letter in order else value
    new_image, new_class = order["B"].argsort(), order["K"].argsort()
    if meaning == "image":
        return torch.where(value >= 0, new_image[value.clamp(min=0)], value)
    if meaning == "channel":
        return new_class[value]
    if meaning == "class":
        is_class = (value >= 1) & (value <= len(new_class))
        return torch.where(is_class, 1 + new_class[(value - 1).clamp(0, len(new_class) - 1)], value)
    if meaning == "box":
        return torch.cat([new_image[value[:, :1].long()].to(value), value[:, 1:]], 1)
    return value


def total(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The value to minimise: the result itself, or the first of its terms."""
    return result if isinstance(result, Tensor) else result[0]


def label_map(situation: str, height: int, width: int) -> Tensor:
    """Mask (B, H, W) with two classes, background and ignored pixels."""
    generator = torch.Generator().manual_seed(3)
    if situation == "smallest":
        height = width = 1
    mask = torch.randint(0, 4, (1 if situation == "batch_1" else 2, height, width), generator=generator)
    if situation == "no_label":
        return torch.where(mask == 3, 255, 0)
    if situation == "all_ignored":
        return torch.full_like(mask, 255)
    return torch.where(mask == 3, 255, mask)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image_labels(situation: str) -> Tensor:
    """(B, 3) tags of one or two classes, or of none."""
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.float64)
    labels = labels[:1] if situation in ("batch_1", "smallest") else labels
    return torch.zeros_like(labels) if situation in ("no_label", "all_ignored") else labels


def pixel_logits(situation: str, seed: int) -> Tensor:
    size = (1, 1) if situation == "smallest" else (5, 6)
    return random(len(image_labels(situation)), 3, *size, seed=seed)


def two_views(situation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Signed class maps of an image and of a reduced copy, and labels."""
    labels = image_labels(situation)
    sizes = ((1, 1), (1, 1)) if situation == "smallest" else ((6, 7), (4, 5))
    return *(random(*labels.shape, *size, seed=seed) for seed, size in enumerate(sizes, 1)), labels
