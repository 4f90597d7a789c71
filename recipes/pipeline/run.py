"""A run: its options, its devices, its folder on disk, its stages.

A stage either trains (its checkpoint under ``checkpoints/`` marks it done) or writes one file an image (the files mark
it done). Every file is written under a temporary name and renamed, so that a run killed at any point and started again
with the same command goes on where it was and ends with the same result.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from recipes.pipeline.checks import check_settings
from recipes.pipeline.costs import Meter, keep_freed_memory
from recipes.pipeline.data import ImageSet, load_dataset
from recipes.pipeline.evaluation import Measurement
from recipes.pipeline.files import ANEW, FolderInUse, read_metrics, read_settings, replacing, try_lock
from recipes.pipeline.views import image_tensor


@dataclass(frozen=True)
class RunConfig:
    """Options that every recipe has."""

    data: str = "demo"
    """Images and tags: demo, voc:PATH, coco:PATH or folder:PATH."""
    labels: str | None = None
    """File of image tags (csv, json or npz); needed by folder:PATH."""
    classes: str | None = None
    """Comma-separated class names to keep; the others count as background."""
    train_list: str | None = None
    """List of training images (a file, or a name under ImageSets/Segmentation)."""
    seed_list: str | None = None
    """List of training images whose masks measure seeds and pseudo masks."""
    val_list: str | None = None
    """List of validation images."""
    out: Path | None = None
    """Run folder; default runs/RECIPE-PRESET-sSEED."""
    preset: str = "demo"
    """Which settings this configuration started from."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    accelerator: str = "auto"
    """auto, cpu or cuda."""
    devices: int = 1
    """Devices per machine; more than one trains with DDP."""
    nodes: int = 1
    """Machines."""
    precision: str = "32-true"
    """Lightning Fabric precision: 32-true, 16-mixed or bf16-mixed."""
    workers: int = 2
    """Loader processes (on Linux), and images worked on at once where one does not fill the cores."""
    max_steps: int | None = None
    """Take so many steps, or images, in every stage, with random weights: proves a preset at its real shapes."""
    reuse: Path | None = None
    """Finished run whose classifier (and CAMs, where they are the plain ones) is taken over if its settings agree."""
    share: Path | None = None
    """Like reuse, but what does not agree is made anew instead of being refused."""
    until: str | None = None
    """Stop after this stage (classify, cams, masks, ...); the same command without it goes on from there."""


IDENTITY_FIELDS_LEFT_OUT = ("out", "workers", "devices", "nodes", "accelerator", "reuse", "share", "until")
CHECKPOINT_SECONDS = 30.0  # between checkpoints of a training, and records of what a stage has cost
ORIGIN = ("data", "labels", "classes", "train_list", "seed", "precision", "max_steps")  # of a classifier


class StoppedEarly(Exception):
    """The stage after which ``run`` was to stop is done."""

    def __init__(self, run: Run) -> None:
        super().__init__(f"stopped after {run.config.until} as asked")
        self.run = run


class Run:
    """What the stages of one run share: ``config``, ``dataset``, ``fabric``, ``folder``, ``console``."""

    def __init__(self, recipe: str, config: RunConfig, fabric: Fabric, dataset: ImageSet, folder: Path) -> None:
        self.recipe, self.config, self.fabric, self.dataset, self.folder = recipe, config, fabric, dataset, folder
        self.console = Console(quiet=fabric.global_rank > 0)
        self.stages_begun: list[str] = []
        self._stage: tuple[str, Meter] | None = None

    # Which images a stage works on: all, or the first max_steps of them.

    @property
    def train(self) -> tuple[str, ...]:
        return self._cut(self.dataset.train)

    @property
    def seeds(self) -> tuple[str, ...]:
        """Training images with trusted masks, on which seeds and pseudo masks are measured."""
        train = set(self.train)
        return tuple(name for name in self.dataset.seed if name in train)

    @property
    def val(self) -> tuple[str, ...]:
        return self._cut(self.dataset.val)

    def image(self, name: str) -> Tensor:
        """A photograph (3, H, W) uint8, on the device."""
        return image_tensor(self.dataset.image(name)).to(self.fabric.device)

    def weights(self, wanted: str) -> str:
        """What a network starts from: random weights in a run cut short, which only proves its shapes."""
        return wanted if self.config.max_steps is None else "random"

    def _cut(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return names if self.config.max_steps is None else names[: self.config.max_steps]

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    # Metrics: one JSON file, read and replaced whole by the first process only.

    @property
    def metrics(self) -> dict[str, Any]:
        if self.path("metrics.json").exists():
            return read_metrics(self.folder, ANEW)
        config = self.config
        return {
            "recipe": self.recipe,
            "preset": config.preset,
            "seed": config.seed,
            "data": config.data,
            "classes": list(self.dataset.classes),
            "stages": {},
            "measurements": [],
        }

    def record(self, **entries: Any) -> None:
        """Merge ``entries`` into metrics.json; dictionaries are merged key by key."""
        if self.fabric.global_rank > 0:
            return
        metrics = self.metrics
        for key, value in entries.items():
            metrics[key] = {**metrics.get(key, {}), **value} if isinstance(value, dict) else value
        with replacing(self.path("metrics.json"), "w") as file:
            json.dump(metrics, file, indent=1)

    def measured(self, *measurements: Measurement) -> None:
        """Add measurements to metrics.json, in place of earlier ones of the same thing."""

        def subject(entry: dict[str, Any]) -> tuple[Any, ...]:
            return entry["what"], entry["split"], entry["threshold_from"]

        new = [measurement.to_dict() for measurement in measurements]
        replaced = {subject(entry) for entry in new}
        kept = [entry for entry in self.metrics["measurements"] if subject(entry) not in replaced]
        self.record(measurements=kept + new)
        for m in measurements:
            at = f" at threshold {m.threshold:g} ({m.threshold_from.split(':')[0]})" if m.threshold is not None else ""
            self.console.print(
                f"  {m.what} on {m.split}, {m.images} images{at}: [bold]{m.miou:.1f}[/] mIoU", highlight=False
            )

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Announce a stage; record its seconds over all attempts, by the clock and by the processor, and peak memory.

        Seconds of the processor are those of this process and its loaders; on a machine that is shared, they and not
        the clock tell what a stage costs. Memory is that of this process. Long stages record them on the way
        (:meth:`keep_costs`), so that a killed attempt counts too.

        Weights that the stage draws depend on its name and the seed, not on whether the stages before ran or were
        found done.

        Raises:
            StoppedEarly: after the stage that ``--until`` names.
        """
        self.stages_begun.append(name)
        self.console.rule(f"[bold]{len(self.stages_begun)}  {title}", align="left")
        torch.manual_seed(self.derived_seed(name))
        with Meter(on_gpu=self.fabric.device.type == "cuda") as meter:
            self._stage = (name, meter)
            try:
                yield
            finally:
                self.keep_costs()
                self._stage = None
        self.fabric.barrier()
        if name == self.config.until:
            raise StoppedEarly(self)

    def keep_costs(self, every: float = 0.0) -> None:
        """Record what the stage has cost until now, unless that was done less than ``every`` seconds ago."""
        if self._stage is not None and self._stage[1].elapsed() >= every:
            name, meter = self._stage
            self.record(stages={name: meter.added_to(self.metrics["stages"].get(name, {}))})

    def for_each(self, names: Sequence[str], output: Callable[[str], Path], work: Callable[[str], None]) -> None:
        """Call ``work`` for every image whose ``output`` file is not there yet.

        Images are shared out over the processes and, on a CPU, over ``workers`` threads with one torch thread each;
        on a GPU one thread keeps the device busy while another reads.
        """
        todo = [name for name in names if not output(name).exists()]
        for folder in {output(name).parent for name in names}:
            folder.mkdir(parents=True, exist_ok=True)
        self.fabric.barrier()  # nobody starts to write before all have seen what is missing
        mine = todo[self.fabric.global_rank :: self.fabric.world_size]
        threads = max(1, self.config.workers)
        cores = torch.get_num_threads()
        torch.set_num_threads(max(1, cores // threads))
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(max(1, cores // threads),))
        try:
            with self.progress() as progress:
                bar = progress.add_task("images", total=len(names), completed=len(names) - len(todo))
                for _ in pool.map(work, mine):
                    progress.advance(bar, self.fabric.world_size)
                    self.keep_costs(every=CHECKPOINT_SECONDS)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, only what is under way is finished
            torch.set_num_threads(cores)
        self.fabric.barrier()

    def derived_seed(self, *parts: object) -> int:
        """A seed for one purpose, from the seed of the run."""
        return zlib.crc32("/".join(map(str, (self.config.seed, *parts))).encode())

    def progress(self) -> Progress:
        return Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=self.fabric.global_rank > 0,
        )


def start(recipe: str, config: RunConfig, takes: Sequence[str] = ("classify", "cams")) -> Run:
    """Check all inputs, start the processes, make or reopen the run folder.

    Args:
        recipe: name of the recipe.
        config: its settings.
        takes: stages that ``--reuse`` takes over: the classifier, and the CAMs where they are the plain classifier's.

    Raises:
        ValueError: settings that can't be (see :func:`check_settings`), a run folder made with other ones or that
            another process is writing, or bad data (see :func:`load_dataset`).
    """
    check_settings(config)
    if config.accelerator in ("cuda", "gpu") and not torch.cuda.is_available():
        raise ValueError(
            f"accelerator: expected a machine with CUDA for {config.accelerator!r}, but there is none here"
        )
    dataset = load_dataset(
        config.data,
        classes=config.classes.split(",") if config.classes else None,
        labels=config.labels,
        train_list=config.train_list,
        val_list=config.val_list,
        seed_list=config.seed_list,
    )
    dataset.check()
    fabric = Fabric(
        accelerator=config.accelerator, devices=config.devices, num_nodes=config.nodes, precision=config.precision
    )
    mixed = fabric.strategy.precision
    if isinstance(mixed, MixedPrecision):
        fabric.strategy.precision = _Autocast(mixed.precision, mixed.device, mixed.scaler)
    fabric.launch()
    if fabric.device.type == "cpu":
        keep_freed_memory()
    folder = config.out or Path("runs") / f"{recipe}-{config.preset}-s{config.seed}"
    learnt_from = _learnt_from(dataset)
    run = Run(recipe, config, fabric, dataset, folder)
    if fabric.global_rank == 0:
        _keep_others_out(run)
        _open_folder(folder, recipe, config, learnt_from)
    fabric.barrier()
    run.record(plain=list(takes), learnt_from=learnt_from)
    if fabric.global_rank == 0:
        if config.reuse is not None:
            _take_over(run, config.reuse, takes)
        elif config.share is not None:
            _share(run, config.share, takes)
    fabric.barrier()
    return run


class _Autocast(MixedPrecision):
    """Mixed precision in which what goes into a network stays as it is: half a number is too little for a box.

    Lightning would round its corners to whole pixels beyond 1,024 and with bfloat16 to 4 pixels beyond 512.
    """

    def convert_input(self, data: Any) -> Any:
        return data


def settings(config: Any) -> dict[str, Any]:
    """A configuration as plain values for YAML."""
    plain = dataclasses.asdict(config)
    return json.loads(json.dumps(plain, default=str))


def defaults(config: Any, whole: Any = None) -> dict[str, Any]:
    """As :func:`settings`, but what each is where nothing is said.

    A run that was begun before there was a setting had its default: a new one leaves things as they were. What has no
    default of its own, such as the epochs of a schedule, is that of ``whole``, from which the parts of a configuration
    start.
    """
    found: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
        elif entry.default is not dataclasses.MISSING:
            default = entry.default
        else:
            default = getattr(whole, entry.name, dataclasses.MISSING)
        if dataclasses.is_dataclass(value):
            found[entry.name] = defaults(value, default if type(default) is type(value) else None)
        elif default is not dataclasses.MISSING:
            found[entry.name] = default
    return json.loads(json.dumps(found, default=str))


def _completed(found: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """``found`` with those entries of ``by`` that it lacks, at any depth."""
    both = {**by, **found}
    for key, value in by.items():
        if isinstance(value, Mapping) and isinstance(both[key], Mapping):
            both[key] = _completed(both[key], value)
    return both


def _learnt_from(dataset: ImageSet) -> dict[str, int]:
    """What tells one set of training images and tags from another, whatever the lists and files are called."""
    told = "\n".join([str(dataset.classes), *(f"{name}: {dataset.tags[name]}" for name in dataset.train)])
    return {"images": len(dataset.train), "checksum": zlib.crc32(told.encode())}


def _other_images(found: Mapping[str, Any], wanted: Mapping[str, int]) -> list[str]:
    """A few words if a metrics.json is of a run on other training images; earlier ones don't tell."""
    there = found.get("learnt_from", wanted)
    if there == wanted:
        return []
    return [f"training images and their tags: {there['images']:,} there, {wanted['images']:,} others now"]


_locked: dict[Path, list[int]] = {}
"""The folders that runs of this process write: the descriptor of their lock, and how many runs there are."""


def _keep_others_out(run: Run) -> None:
    """Let no other process write the run's folder while the run lives.

    The processes that load images don't hold the lock with us: the run of a killed process can go on at once.
    """
    folder = run.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if folder not in _locked:
        try:
            lock = try_lock(folder / ".lock", with_children=False)
        except OSError:  # another user's, say
            return
        if lock is None:
            raise FolderInUse(f"out: another process is writing {run.folder}; wait for it, or give another --out")
        _locked[folder] = [lock, 0]
    _locked[folder][1] += 1
    weakref.finalize(run, _let_others_in, folder)


def _let_others_in(folder: Path) -> None:
    _locked[folder][1] -= 1
    if _locked[folder][1] == 0:
        os.close(_locked.pop(folder)[0])


def _open_folder(folder: Path, recipe: str, config: RunConfig, learnt_from: Mapping[str, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    wanted, kept = {"recipe": recipe, **settings(config)}, folder / "metrics.json"
    begun = read_settings(folder, ANEW) if (folder / "config.yaml").exists() else None
    metrics = read_metrics(folder, ANEW) if kept.exists() else None
    if begun is not None:
        differing = differing_settings(begun, wanted, defaults(config)) + _other_images(metrics or {}, learnt_from)
        if differing:
            told = "; ".join(differing)
            raise ValueError(f"out: {folder} holds a run with other settings ({told}); give another --out or remove it")
        for file in folder.rglob("*.part-*-*"):
            if re.fullmatch(r".+\.part-\d+-\d+", file.name):  # of `replacing`, in an attempt that was killed
                file.unlink()
    if metrics is not None:  # before --until changes: a kill in between must not leave a run that seems whole
        with replacing(kept, "w") as out:
            json.dump({**metrics, "finished": False}, out, indent=1)
    with replacing(folder / "config.yaml", "w") as out:
        yaml.safe_dump(wanted, out, sort_keys=False)


def differing_settings(
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    unsaid: Mapping[str, Any],
    keys: Iterable[str] | None = None,
) -> list[str]:
    """Where two ``config.yaml`` differ, a few words a setting; by default in what makes them those of two runs.

    ``unsaid`` are the :func:`defaults` of settings that ``found`` lacks.
    """
    found = _completed(found, unsaid)
    if keys is None:
        keys = sorted((wanted.keys() | found.keys()) - set(IDENTITY_FIELDS_LEFT_OUT))
    return [told for key in keys for told in _differing_leaves(key, found.get(key), wanted.get(key))]


def _differing_leaves(key: str, there: Any, now: Any) -> Iterator[str]:
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys((*there, *now)):
            yield from _differing_leaves(f"{key}.{name}", there.get(name), now.get(name))
    elif there != now:
        yield f"{key}: {there!r} there, {now!r} now"


def _take_over(run: Run, source: Path, takes: Sequence[str]) -> None:
    """Link what the stages ``takes`` left in ``source`` into ``run`` if it was made with the same settings."""
    if not takes:
        raise ValueError(f"reuse: {run.recipe} trains no plain classifier, so there is nothing to take over")
    told = _differing(run, source, takes)
    if told:
        raise ValueError(f"reuse: the classifier of {source} was made with other settings ({'; '.join(told)})")
    missing = _missing(run, source, takes)
    if missing:
        raise ValueError(f"reuse: {source} is not finished, {len(missing)} files are missing, e.g. {missing[0]}")
    if _has_its_own_classifier(run, source):
        told = "has trained a classifier of its own; leave the flag out or give another --out"
        raise ValueError(f"reuse: {run.folder} {told}")
    _link_stages(run, source, takes)


def _share(run: Run, source: Path, takes: Sequence[str]) -> None:
    """Link the first of the stages ``takes`` that are finished and whose settings agree; say what is made anew."""
    taken: list[str] = []
    told = ["this run has trained a classifier of its own"] if takes and _has_its_own_classifier(run, source) else []
    for stage in takes:
        told = told or _differing(run, source, (stage,))
        if told or _missing(run, source, (stage,)):
            why = "; ".join(told) or "it is not finished"
            note = f"  {stage} is made anew, not that of {source}: {why}"
            run.console.print(escape(note), highlight=False, soft_wrap=True)
            break
        taken.append(stage)
    if taken:
        _link_stages(run, source, taken)


def _files_of(run: Run, source: Path, stage: str) -> list[Path]:
    """What ``run`` needs of a stage of ``source``."""
    if stage == "classify":
        return [source / "checkpoints" / "classify.pt"]
    return [source / "cam" / f"{name}.npz" for name in run.train]


def _missing(run: Run, source: Path, takes: Sequence[str]) -> list[str]:
    return [str(file) for stage in takes for file in _files_of(run, source, stage) if not file.exists()]


def _link_stages(run: Run, source: Path, takes: Sequence[str]) -> None:
    files = [file for stage in takes for file in _files_of(run, source, stage)]
    if "cams" in takes:
        files += (source / "cam").rglob("*.npz")
    curve = source / "curves" / "classify.jsonl"
    for file in [*files, *([curve] if curve.exists() else [])]:
        target = run.folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            _link(file, target)
    stages = read_metrics(source)["stages"]
    run.record(stages={name: stages[name] for name in takes if name in stages}, reused=str(source), taken=list(takes))


def _has_its_own_classifier(run: Run, source: Path) -> bool:
    """Whether ``run`` has trained one, in whole or in part: CAMs of two classifiers must not lie side by side."""
    own, other = run.folder / "checkpoints" / "classify.pt", source / "checkpoints" / "classify.pt"
    if own.exists():
        same = other.exists() and (own.samefile(other) or own.read_bytes() == other.read_bytes())
        return not same
    return own.with_suffix(".partial.pt").exists()


def _link(file: Path, target: Path) -> None:
    """A second name for ``file``, or on another disk a copy."""
    try:
        os.link(file, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP):
            raise
        with replacing(target) as copy:
            copy.write(file.read_bytes())


def _differing(run: Run, source: Path, takes: Sequence[str]) -> list[str]:
    """Why the stages ``takes`` of ``source`` are not those that ``run`` would make."""
    if not (source / "config.yaml").exists():
        flag = "share" if run.config.reuse is None else "reuse"
        raise ValueError(f"{flag}: expected a run folder with config.yaml, got {source}")
    found = read_settings(source)
    metrics = read_metrics(source) if (source / "metrics.json").exists() else {}
    told = differing_settings(found, settings(run.config), defaults(run.config), (*ORIGIN, *takes))
    plain = metrics.get("plain", takes if found.get("recipe") == "cam" else ())  # earlier runs don't tell
    told += [f"{stage}: {found.get('recipe')} makes its own" for stage in takes if stage not in plain]
    return told + _other_images(metrics, _learnt_from(run.dataset))
