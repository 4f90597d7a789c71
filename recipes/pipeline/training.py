"""The training loop of all stages, the poly schedule, and the crops it feeds on."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from recipes.pipeline.data import IGNORE, ImageSet
from recipes.pipeline.files import load_tensors, reading, replacing
from recipes.pipeline.run import CHECKPOINT_SECONDS, Run
from recipes.pipeline.views import scaled_size


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage trains."""

    epochs: int
    """Passes over the training images."""
    batch_size: int
    """Images a step, over all devices."""
    lr: float
    """Learning rate of the pretrained layers."""
    head_lr: float
    """Learning rate of the new layers."""
    weight_decay: float = 1e-4
    """Weight decay."""
    momentum: float = 0.9
    """SGD momentum. PSA and IRN in effect use their weight decay here, see the recipes."""
    power: float = 0.9
    """Exponent of the poly schedule."""


@dataclass(frozen=True)
class AdamSchedule:
    """How long and how fast a stage trains with AdamW, the way of transformers."""

    epochs: int
    """Passes over the training images."""
    batch_size: int
    """Images a step, over all devices."""
    lr: float
    """Learning rate of the pretrained layers."""
    head_lr: float
    """Learning rate of the new layers."""
    weight_decay: float = 0.05
    """Weight decay of matrices; biases, norms, tokens and positions have none."""
    warmup: float = 0.1
    """Share of the steps in which the rates rise from almost 0."""
    start: float | None = None
    """Share of the rates at the first step; default: one step's worth."""
    floor: float = 0.0
    """Share of the rates that is left at the end."""
    decay: Literal["cosine", "poly"] = "cosine"
    """Shape of the fall after the warm-up."""
    power: float = 1.0
    """Exponent of poly."""


class Moment(NamedTuple):
    """Where a training stands, all counted from 0."""

    step: int
    steps: int
    epoch: int
    epochs: int
    per_epoch: int

    @property
    def in_epoch(self) -> float:
        """Share of the epoch that is over when this step is, in (0, 1]."""
        return (self.step % self.per_epoch + 1) / self.per_epoch

    @property
    def last(self) -> bool:
        """Whether no step follows."""
        return self.step == self.steps - 1


def poly_sgd(
    groups: Sequence[dict[str, Any]],
    steps: int,
    *,
    momentum: float,
    power: float = 0.9,
    warmup: int = 0,
    warmup_start: float = 0.1,
) -> tuple[torch.optim.SGD, LambdaLR]:
    """SGD whose learning rates follow lr * (1 - t / T)^power, set before step t; from T on they stay where they are.

    With a warm-up of W steps they first rise along a line from ``warmup_start`` times lr, and t and T count from W.

    Args:
        groups: parameter groups with their own ``lr`` and ``weight_decay``.
        steps: T, or W + T.
        momentum: the released PSA and IRN code pass the weight decay in momentum's place, so that their momentum is
            5e-4 and 1e-4; their own ``momentum`` argument is only ``power``.
        power: exponent.
        warmup: W, at most ``steps``.
        warmup_start: factor of the first step of the warm-up.
    """
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=momentum)

    def factor(t: int) -> float:
        t = min(t, steps - 1)
        if t < warmup:
            return warmup_start + (1 - warmup_start) * t / warmup
        return (1 - (t - warmup) / (steps - warmup)) ** power

    return optimizer, LambdaLR(optimizer, factor)


def warmup_adamw(
    groups: Sequence[dict[str, Any]], steps: int, schedule: AdamSchedule
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW whose rates rise linearly, then fall; set before step t, from the last step on they stay where they are."""
    warmup = round(schedule.warmup * steps)

    def factor(t: int) -> float:
        if t < warmup and schedule.start is None:
            return (t + 1) / (warmup + 1)
        if t < warmup:
            return schedule.start + (1 - schedule.start) * t / warmup
        done = min(t, steps - 1) / steps  # counted from the first step, as timm and SegFormer do
        falling = (1 + math.cos(math.pi * done)) / 2 if schedule.decay == "cosine" else (1 - done) ** schedule.power
        return schedule.floor + (1 - schedule.floor) * falling

    optimizer = torch.optim.AdamW(groups, lr=0.1, eps=1e-8)
    return optimizer, LambdaLR(optimizer, factor)


def two_speed_groups(
    model: nn.Module,
    heads: Sequence[nn.Module | nn.Parameter],
    schedule: Schedule | AdamSchedule,
    *,
    double_biases: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups: pretrained layers at ``lr``, what is in ``heads`` at ``head_lr``; frozen ones left out.

    With ``double_biases`` (PSA), biases learn twice as fast and without weight decay. With an :class:`AdamSchedule`,
    only matrices have weight decay.
    """
    if isinstance(schedule, AdamSchedule):
        return _adam_groups(model, heads, schedule)
    new = _parameters_of(heads)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_bias = double_biases and name.endswith("bias")
            groups.setdefault((id(parameter) in new, is_bias), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": (schedule.head_lr if is_new else schedule.lr) * (2 if is_bias else 1),
            "weight_decay": 0.0 if is_bias else schedule.weight_decay,
        }
        for (is_new, is_bias), parameters in groups.items()
    ]


def _parameters_of(heads: Sequence[nn.Module | nn.Parameter]) -> set[int]:
    parts = ([head] if isinstance(head, nn.Parameter) else head.parameters() for head in heads)
    return {id(parameter) for part in parts for parameter in part}


def _adam_groups(
    model: nn.Module, heads: Sequence[nn.Module | nn.Parameter], schedule: AdamSchedule
) -> list[dict[str, Any]]:
    new = _parameters_of(heads)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(("prefix", "pos_embed"))
            groups.setdefault((id(parameter) in new, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": schedule.head_lr if is_new else schedule.lr,
            "weight_decay": schedule.weight_decay if decays else 0.0,
        }
        for (is_new, decays), parameters in groups.items()
    ]


def fit(
    run: Run,
    stage: str,
    model: nn.Module,
    dataset: Dataset[dict[str, Tensor]],
    loss_of: Callable[[nn.Module, dict[str, Tensor], Moment], Any],
    groups: Sequence[dict[str, Any]],
    schedule: Schedule | AdamSchedule,
    *,
    warmup: float = 0.0,
    clip: float | None = None,
    choose: Callable[[Moment], float | None] | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> nn.Module:
    """Train ``model`` and leave its weights in ``checkpoints/STAGE.pt``; load them if they are there.

    The order of the images, their augmentation and the dropout of step t depend only on the seed, the stage and t, so
    a run that is killed goes on from its last checkpoint exactly as it would have.

    Args:
        run: the run.
        stage: name of the checkpoint and of the curve.
        model: anything; moved to the device.
        dataset: items are dictionaries of tensors; its ``__getitem__`` may draw from torch's global generator.
        loss_of: ``loss_of(model, batch, at)`` gives a scalar, or a NamedTuple whose first field is the total; ``at`` is
            the :class:`Moment`, for what changes in the course of a training.
        groups: parameter groups.
        schedule: epochs, batch size and what the optimiser takes: SGD, or AdamW with an :class:`AdamSchedule`.
        warmup: share of the steps in which the rate of SGD first rises.
        clip: longest gradient of all parameters together.
        choose: called after each step; a number scores the model as it is. The weights with the highest score are those
            that are left, in place of the last ones.
        checkpoint_seconds: time between checkpoints.
    """
    final, partial = run.path("checkpoints", f"{stage}.pt"), run.path("checkpoints", f"{stage}.partial.pt")
    device, fabric = run.fabric.device, run.fabric
    model.to(device, memory_format=torch.channels_last)  # a third less time on a CPU, and what tensor cores want
    if final.exists():
        _restore(final, model, load_tensors(final, device))
        if fabric.global_rank == 0:
            partial.unlink(missing_ok=True)  # of a run killed just before it would have done so
        return model.eval()

    per_epoch = max(1, len(dataset) // schedule.batch_size)
    steps = schedule.epochs * per_epoch
    steps = steps if run.config.max_steps is None else min(steps, run.config.max_steps)
    if isinstance(schedule, AdamSchedule):
        optimizer, scheduler = warmup_adamw(groups, steps, schedule)
    else:
        optimizer, scheduler = poly_sgd(
            groups, steps, momentum=schedule.momentum, power=schedule.power, warmup=int(warmup * steps)
        )
    done, curve, best, scaling = 0, [], {}, None
    if partial.exists():
        state = load_tensors(partial, device)
        _restore(partial, model, state, optimizer=optimizer, scheduler=scheduler)
        done, curve, best = state["step"], state["curve"], state.get("best", {})
        scaling = state.get("precision")
    _restart_scaling(run, scaling)
    fabric.barrier()

    wrapped, optimizer = fabric.setup(model, optimizer)
    wrapped.train()
    batches = _batches(run, stage, dataset, schedule.batch_size, range(done, steps))
    saved_at = time.monotonic()
    with run.progress() as progress:
        bar = progress.add_task(stage, total=steps, completed=done)
        for step, batch in zip(range(done, steps), batches, strict=True):
            torch.manual_seed(run.derived_seed(stage, "step", step, fabric.global_rank))
            at = Moment(step, steps, step // per_epoch, schedule.epochs, per_epoch)
            output = loss_of(
                wrapped, fabric.to_device({key: _channels_last(value) for key, value in batch.items()}), at
            )
            total = output if isinstance(output, Tensor) else output[0]
            optimizer.zero_grad(set_to_none=True)
            fabric.backward(total)
            if clip is not None:
                fabric.clip_gradients(wrapped, optimizer, max_norm=clip, error_if_nonfinite=False)
            optimizer.step()
            if step % 10 == 0 or step == steps - 1:
                curve.append(
                    {"stage": stage, "step": step, "steps": steps, "lr": scheduler.get_last_lr()[0], **_terms(output)}
                )
                if not torch.isfinite(total):
                    raise FloatingPointError(
                        f"{stage}: the loss is {total.item()} at step {step}; lower the learning rate"
                    )
                progress.update(bar, description=f"{stage}  loss {curve[-1]['loss']:.3f}")
            _advance(scheduler)
            if choose is not None and (score := choose(at)) is not None:
                if not best or score > best["score"]:
                    best = {"score": score, "step": step, "model": copy.deepcopy(model.state_dict())}
                wrapped.train()
            progress.update(bar, completed=step + 1)
            if fabric.global_rank == 0 and step + 1 < steps and time.monotonic() - saved_at > checkpoint_seconds:
                _save(
                    partial,
                    model,
                    optimizer=optimizer.state_dict(),
                    scheduler=scheduler.state_dict(),
                    precision=fabric.strategy.precision.state_dict(),
                    step=step + 1,
                    curve=curve,
                    best=best,
                )
                saved_at = time.monotonic()
                run.keep_costs()
    if best:
        model.load_state_dict(best["model"])
        run.record(chosen={stage: {"step": best["step"], "score": best["score"]}})
    if fabric.global_rank == 0:
        with replacing(run.path("curves", f"{stage}.jsonl"), "w") as file:
            file.writelines(json.dumps(point) + "\n" for point in curve)
        _save(final, model)
        partial.unlink(missing_ok=True)
    fabric.barrier()
    return model.eval()


def _restart_scaling(run: Run, state: dict[str, Any] | None) -> None:
    """Scale the loss (``16-mixed``) as in ``state``, or anew, whatever the trainings before came to."""
    precision = run.fabric.strategy.precision
    if precision.state_dict():
        precision.load_state_dict(state or torch.amp.GradScaler(run.fabric.device.type).state_dict())


def _advance(scheduler: LambdaLR) -> None:
    """Go on in the schedule, also where ``16-mixed`` has left a step out since its gradients were too large."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        scheduler.step()


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _save(path: Path, model: nn.Module, **state: Any) -> None:
    """Write the weights and ``state``; never weights that are not finite, from which nobody could go on."""
    tensors = model.state_dict().items()
    broken = [name for name, value in tensors if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise FloatingPointError(
            f"{path.name}: not written, {len(broken)} weights are not finite, e.g. {broken[0]}; lower the learning rate"
        )
    with replacing(path) as file:
        torch.save({"model": model.state_dict(), **state}, file)


def _restore(path: Path, model: nn.Module, state: Mapping[str, Any], **others: Any) -> None:
    with reading(path):
        model.load_state_dict(state["model"])
        for name, other in others.items():
            other.load_state_dict(state[name])


def _terms(output: Any) -> dict[str, float]:
    named = (
        {"loss": output}
        if isinstance(output, Tensor)
        else {"loss": output[0], **dict(zip(output._fields[1:], output[1:], strict=True))}
    )
    return {name: value.detach().item() for name, value in named.items()}


class _Seeded(Dataset):
    """Item (index, seed) of a dataset, drawn with torch's generator set to ``seed``."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        index, seed = key
        if get_worker_info() is not None:
            torch.manual_seed(seed)
            return self.dataset[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.dataset[index]


def _batches(run: Run, stage: str, dataset: Dataset, batch_size: int, steps: range) -> Iterator[dict[str, Tensor]]:
    world, rank = run.fabric.world_size, run.fabric.global_rank
    if batch_size % world:
        raise ValueError(f"batch_size: expected a multiple of the {world} processes, got {batch_size}")
    if len(dataset) == 0:
        raise ValueError(f"{stage}: there is no image to train on")
    per_epoch = max(1, len(dataset) // batch_size)

    def keys() -> Iterator[list[tuple[int, int]]]:
        order, epoch = [], -1
        for step in steps:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                generator = torch.Generator().manual_seed(run.derived_seed(stage, "order", epoch))
                order = torch.randperm(len(dataset), generator=generator).tolist()
                order = (order * -(-batch_size // len(order)))[: max(len(order), batch_size)]
            first = (step % per_epoch) * batch_size
            chosen = order[first : first + batch_size]
            keyed = [(index, run.derived_seed(stage, "item", step, place)) for place, index in enumerate(chosen)]
            yield keyed[rank::world]

    # other ways to start a process than a fork, the default from Python 3.14, pickle the data set, functions and all;
    # outside of Linux a fork is not safe
    workers = run.config.workers if len(steps) > 1 and sys.platform.startswith("linux") else 0
    pinned = run.fabric.device.type == "cuda"
    loader = DataLoader(
        _Seeded(dataset),
        batch_sampler=list(keys()),
        num_workers=workers,
        pin_memory=pinned,
        multiprocessing_context="fork" if workers else None,
    )
    return _told_of_dead_loaders(loader, stage)


def _told_of_dead_loaders(loader: DataLoader, stage: str) -> Iterator[dict[str, Tensor]]:
    try:
        yield from loader
    except (RuntimeError, ConnectionError, EOFError) as error:
        said = str(error)  # what a data set raises comes back as its own error, "Caught ... in DataLoader worker"
        in_transfer = not isinstance(error, RuntimeError) and not said.startswith("Caught")
        if not in_transfer and not said.startswith("DataLoader worker"):
            raise
        death = _death_of_a_loader() if in_transfer else None
        raise ChildProcessError(
            f"{stage}: a loader process died ({death or error}); is there memory left? "
            "The same command goes on from the last checkpoint, with --workers 0 without such processes"
        ) from error


def _death_of_a_loader() -> RuntimeError | None:
    """What torch raises, wherever the program is by then, when it hears of the death that has broken a transfer."""
    try:
        time.sleep(1)
    except RuntimeError as told:
        return told
    return None


class RandomLongSide(v2.Transform):
    """Resize so that the longer side is uniform in ``low..high`` pixels (images bicubic, masks nearest)."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = TF.get_size(flat_inputs[0])
        target = int(torch.randint(self.low, self.high + 1, ()).item())
        return {"size": scaled_size(height, width, target / max(height, width))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return _resize(inpt, params["size"])


class RandomScale(v2.Transform):
    """Resize by a factor uniform in ``low..high`` (images bicubic, masks nearest)."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        factor = self.low + (self.high - self.low) * torch.rand(()).item()
        return {"size": scaled_size(*TF.get_size(flat_inputs[0]), factor)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return _resize(inpt, params["size"])


def _resize(inpt: Any, size: tuple[int, int]) -> Any:
    mode = v2.InterpolationMode.NEAREST if isinstance(inpt, tv_tensors.Mask) else v2.InterpolationMode.BICUBIC
    return TF.resize(inpt, list(size), interpolation=mode, antialias=True)


def crop_transform(
    resize: v2.Transform,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    jitter: bool = False,
    mask_fill: int = IGNORE,
) -> v2.Compose:
    """Resize, mirror, (jitter,) normalise and crop.

    Where the crop is larger, the normalised image is padded with 0 and the mask with ``mask_fill``.
    """
    return v2.Compose(
        [
            resize,
            v2.RandomHorizontalFlip(),
            *([v2.ColorJitter(0.3, 0.3, 0.3, 0.1)] if jitter else []),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(list(mean), list(std)),
            v2.RandomCrop(crop, pad_if_needed=True, fill={tv_tensors.Image: 0.0, tv_tensors.Mask: mask_fill}),
        ]
    )


class TaggedCrops(Dataset):
    """What a classifier trains on: ``image`` (3, crop, crop), ``labels`` (K,), ``index`` (), the place in ``names``."""

    def __init__(self, dataset: ImageSet, names: Sequence[str], transform: v2.Transform) -> None:
        self.dataset, self.names, self.transform = dataset, names, transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        name = self.names[index]
        image = self.transform(tv_tensors.Image(self.dataset.image(name)))
        labels = torch.from_numpy(self.dataset.labels(name))
        return {"image": image.as_subclass(Tensor), "labels": labels, "index": torch.tensor(index)}


class FramedCrops(TaggedCrops):
    """`TaggedCrops` that know their padding: ``inside`` (1, crop, crop) uint8 is 0 there, ``region`` (4,) the rest.

    The region is x1, y1, x2, y2 in pixels. ``transform`` should be that of `crop_transform` with ``mask_fill=0``.
    """

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = tv_tensors.Image(self.dataset.image(self.names[index]))
        image, inside = self.transform(image, tv_tensors.Mask(torch.ones_like(image[:1])))
        inside = inside.as_subclass(Tensor)
        (top, bottom), (left, right) = (inside[0].any(axis).nonzero()[[0, -1], 0] for axis in (1, 0))
        return {
            "image": image.as_subclass(Tensor),
            "labels": torch.from_numpy(self.dataset.labels(self.names[index])),
            "index": torch.tensor(index),
            "inside": inside,
            "region": torch.stack([left, top, right + 1, bottom + 1]),
        }


class MaskedCrops(Dataset):
    """``image`` (3, crop, crop) and ``mask`` (crop, crop) int64, with the masks of ``mask_of(name)`` (H, W) uint8."""

    def __init__(
        self, dataset: ImageSet, names: Sequence[str], mask_of: Callable[[str], Any], transform: v2.Transform
    ) -> None:
        self.dataset, self.names, self.mask_of, self.transform = dataset, names, mask_of, transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        name = self.names[index]
        mask = tv_tensors.Mask(torch.from_numpy(self.mask_of(name))[None])
        image, mask = self.transform(tv_tensors.Image(self.dataset.image(name)), mask)
        return {"image": image.as_subclass(Tensor), "mask": mask[0].as_subclass(Tensor).long()}
