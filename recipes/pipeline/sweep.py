"""Many recipes on one data set under one budget, each run in a process of its own, and the page of what came out.

A run is what ``python -m recipes run`` makes of its command, so a sweep adds nothing to it but the order: the plain CAM
of a seed first, whose classifier the others share, then whatever makes what a third one needs. What is on disk says
how far a sweep is; nothing else is kept. Two sweeps over the same folder share the work.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes.pipeline.data import ImageSet, load_dataset
from recipes.pipeline.files import ANEW, read_metrics, read_settings, try_lock, write_text
from recipes.pipeline.report import repeat_command
from recipes.pipeline.results import PLAIN, Results, markdown, page, record_of, table_csv, wants_saliency
from recipes.pipeline.run import defaults, differing_settings, settings
from recipes.pipeline.stages import check_until
from recipes.pipeline.tables import duration, processor_seconds, total_seconds

CUES = "c2am"  # learns saliency maps for those that need some, where the data set has none
LISTS = ("classes", "labels", "train_list", "val_list", "seed_list")
RECORDS = Path(__file__).parents[2] / "docs" / "data"
WAIT = 5.0  # seconds between looks at what another sweep is running


@dataclass(frozen=True)
class SweepConfig:
    """What is to be run: ``recipes`` with ``preset`` and each of ``seeds``, in folders under ``out``.

    ``options`` are flags that all runs get which know them. Finished runs of the same settings are not made again if
    they, or folders of them, are in ``count``. ``without`` are recipes that must not be among the runs, not even for
    the sake of others.
    """

    recipes: tuple[str, ...]
    preset: str
    seeds: tuple[int, ...]
    out: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    count: tuple[Path, ...] = ()
    without: tuple[str, ...] = ()


@dataclass(eq=False)
class Planned:
    """One run of a sweep.

    Attributes:
        name: RECIPE-sSEED.
        recipe: its recipe.
        folder: where it is or will be.
        settings: what its config.yaml says.
        unsaid: what a setting is that an older config.yaml lacks.
        share: the run of the plain CAM with the same seed; None for this one itself.
        needs: the run whose saliency maps it reads.
        state: finished, begun, new, or refused because the folder holds another run.
        note: why it is refused, or where it counts from.
    """

    name: str
    recipe: str
    folder: Path
    settings: dict[str, Any]
    unsaid: dict[str, Any]
    share: Planned | None = None
    needs: Planned | None = None
    state: str = "new"
    note: str = ""

    @property
    def command(self) -> str:
        """The command line of the run."""
        return repeat_command(self.settings)

    @property
    def finished(self) -> bool:
        """Whether the folder holds this run, finished, by now."""
        return self.state_in(self.folder)[0] == "finished"

    def state_in(self, folder: Path) -> tuple[str, str]:
        """(state, note) of what is in a folder: a run that went further than this one is finished too."""
        if not (folder / "config.yaml").is_file():
            return "new", ""
        try:
            found = read_settings(folder, ANEW)
            metrics = read_metrics(folder, ANEW) if (folder / "metrics.json").is_file() else {}
        except ValueError as error:
            return "refused", str(error)
        differing = differing_settings(found, self.settings, self.unsaid)
        if differing:
            told = "; ".join(differing)
            return "refused", f"{folder} holds a run with other settings ({told}); give another --out or remove it"
        as_far = found.get("until") in (None, self.settings.get("until"))
        return ("finished" if _ended(metrics) and as_far else "begun"), ""


def plan_sweep(config: SweepConfig, load: Callable[[str], ModuleType]) -> list[Planned]:
    """All runs in the order in which they are made.

    Args:
        config: what is asked for.
        load: name of a recipe to its module.

    Raises:
        FileNotFoundError: a folder to ``count`` that is not there.
        ValueError: no recipes or seeds, an unknown preset or stage, bad data, no images from outside for a recipe that
            needs some, or a recipe left out that the others need.
    """
    for place in config.count:
        if not place.is_dir():
            raise FileNotFoundError(f"count: there is no folder {place}")
    chosen = [name for name in config.recipes if name not in config.without]
    if not chosen or not config.seeds:
        raise ValueError(f"{'seeds' if chosen else 'names'}: expected at least one, got none")
    if PLAIN in config.without:
        raise ValueError(
            f"without: {PLAIN} can't be left out, the others take over its classifier and are compared with it"
        )
    modules = {name: _loaded(name, load, config) for name in (PLAIN, *chosen)}
    data = config.options.get("data", modules[PLAIN].PRESETS[config.preset].data)
    dataset = load_dataset(data, **{key: config.options.get(key) for key in LISTS})
    dataset.check()
    asked = {name: _settings(name, module, config) for name, module in modules.items()}
    missing = _missing(dataset, asked)
    for name, found in asked.items():
        if "outside" in found and found["outside"] is None and not dataset.out_of_distribution:
            raise ValueError(
                f"outside: {name} wants photographs that show none of the classes, and {dataset.name} has none: give "
                "--outside FOLDER, or leave it out"
            )
    if "saliency" in missing and CUES not in asked:
        if CUES in config.without:
            wanting = ", ".join(name for name, found in asked.items() if wants_saliency(found))
            raise ValueError(
                f"without: {dataset.name} has no saliency maps, and {CUES} learns those that {wanting} would read; "
                "leave out both or none"
            )
        modules[CUES] = _loaded(CUES, load, config)
        asked[CUES] = _settings(CUES, modules[CUES], config)
    elsewhere = [found for place in config.count for found in _settings_in(place)]
    first = [name for name in (PLAIN, CUES) if name in asked]
    plan = []
    for seed in dict.fromkeys(config.seeds):
        made: dict[str, Planned] = {}
        for name in (*first, *(name for name in asked if name not in first)):
            run = made[name] = _planned(name, modules[name], config, seed, made, missing)
            run.state, run.note = run.state_in(run.folder)
            if run.state == "new":
                _count(run, elsewhere)
        plan += made.values()
    return plan


def _loaded(name: str, load: Callable[[str], ModuleType], config: SweepConfig) -> ModuleType:
    """A recipe that has the preset and the stage that are asked for."""
    module = load(name)
    if config.preset not in module.PRESETS:
        raise ValueError(f"preset: {name} has {', '.join(module.PRESETS)}, but no {config.preset!r}")
    check_until(config.options.get("until"), name, module)
    return module


def _settings(name: str, module: ModuleType, config: SweepConfig, **changes: Any) -> dict[str, Any]:
    """The settings of a run, with those options and changes that its recipe knows."""
    known = {entry.name for entry in dataclasses.fields(module.Config)}
    given = {key: value for key, value in {**config.options, **changes}.items() if key in known}
    made = dataclasses.replace(module.PRESETS[config.preset], preset=config.preset, **given)
    return {"recipe": name, **settings(made)}


def _missing(dataset: ImageSet, asked: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Of saliency and boxes, what a recipe wants and the data set does not have for each training image."""
    missing = set()
    if any(map(wants_saliency, asked.values())) and any(dataset.saliency(name) is None for name in dataset.train):
        missing.add("saliency")
    if any("boxes" in found for found in asked.values()) and any(dataset.boxes(n) is None for n in dataset.train):
        missing.add("boxes")
    return missing


def _planned(
    name: str, module: ModuleType, config: SweepConfig, seed: int, made: Mapping[str, Planned], missing: set[str]
) -> Planned:
    changes: dict[str, Any] = {"seed": seed, "out": config.out / f"{name}-s{seed}"}
    plain, needs = made.get(PLAIN), None
    if plain is not None:
        changes["share"] = plain.folder
    if "boxes" in missing:
        changes["boxes"] = "components_of_masks"
    if "saliency" in missing and wants_saliency(_settings(name, module, config)):
        needs = made[CUES]
        changes["saliency"] = str(needs.folder)
    found = _settings(name, module, config, **changes)
    unsaid = defaults(module.PRESETS[config.preset])
    return Planned(f"{name}-s{seed}", name, changes["out"], found, unsaid, plain, needs)


def _settings_in(place: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folders of runs in ``place``, or itself, with their settings, but for those that can't be read."""
    own = place / "config.yaml"
    for file in [own] if own.is_file() else sorted(place.glob("*/config.yaml")):
        with suppress(ValueError):
            yield file.parent, read_settings(file.parent)


def _count(run: Planned, elsewhere: Sequence[tuple[Path, Mapping[str, Any]]]) -> None:
    """Let a finished run of the same settings, of those at hand with their settings, stand for ``run``."""
    for folder, found in elsewhere:
        alike = (found.get("recipe"), found.get("seed")) == (run.recipe, run.settings.get("seed"))
        if alike and run.state_in(folder)[0] == "finished":
            run.folder, run.state, run.note = folder, "finished", f"in {folder}"
            return


def _ended(metrics: Mapping[str, Any]) -> bool:
    """Whether a run has come to its end; those of before this was recorded wrote their machine there."""
    return bool(metrics.get("finished", "machine" in metrics))


# Before: what it will take.


def plan_table(config: SweepConfig, plan: Sequence[Planned]) -> Table:
    """The runs in order with what they took before: of the processor, and by the clock."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold", show_footer=True)
    known = _known_costs(config)
    costs = {run.name: known.get(run.recipe) for run in plan if run.state in ("new", "begun")}
    refused = sum(run.state == "refused" for run in plan)
    sums = [sum(cost[i] for cost in costs.values() if cost is not None) for i in (0, 1)]
    unknown = sum(cost is None for cost in costs.values())
    table.add_column("", justify="right")
    table.add_column("run", footer=f"{len(costs)} of {len(plan)} to make" + f", {refused} refused" * bool(refused))
    table.add_column("state")
    for title, total in zip(("processor", "by the clock"), sums, strict=True):
        table.add_column(title, justify="right", footer=duration(total))
    table.add_column("", footer=f"{unknown} not made before, not in the sum" if unknown else "as runs took before")
    for place, run in enumerate(plan, 1):
        cost = costs.get(run.name)
        told = ("-", "-") if cost is None else tuple(map(duration, cost))
        note = run.note or (f"saliency of {run.needs.name}" if run.needs else "")
        colour = {"finished": "green", "refused": "red"}.get(run.state, "default")
        table.add_row(str(place), run.name, f"[{colour}]{run.state}[/]", *told, f"[dim]{escape(note)}[/]")
    return table


def _known_costs(config: SweepConfig) -> dict[str, tuple[float, float]]:
    """Recipe -> median seconds (processor, clock) of the finished runs with this preset, without what they took over.

    Looked for in the sweep itself, in the folders that count and in the records of the documentation. Of a sweep that
    stops after a stage, up to that; of one that does not, only runs that did not either.
    """
    until = config.options.get("until")
    found: dict[str, list[tuple[float, float]]] = {}
    for metrics in _known_runs(config):
        preset = metrics.get("preset") or metrics.get("command", "").partition("--preset ")[2].partition(" ")[0]
        stages = list(metrics["stages"])
        if preset != config.preset or not _ended(metrics) or until not in (metrics.get("until"), *stages):
            continue
        if until in stages:
            del stages[stages.index(until) + 1 :]
        taken = metrics.get("taken") or (["classify"] if metrics.get("reused") else [])
        own = {stage: metrics["stages"][stage] for stage in stages if stage not in taken}
        clock = total_seconds(own)
        found.setdefault(metrics["recipe"], []).append((processor_seconds(own) or clock, clock))
    return {
        recipe: (statistics.median(cpu for cpu, _ in costs), statistics.median(clock for _, clock in costs))
        for recipe, costs in found.items()
    }


def _known_runs(config: SweepConfig) -> Iterator[dict[str, Any]]:
    """Records, and what can be read of the runs at hand, with the stage after which each was to stop, if any."""
    for file in RECORDS.glob("*/*.json"):
        record = json.loads(file.read_text())
        *_, last = record["stages"]
        # of before they said so, those that had not come to the segmentation, with which all recipes end
        yield {"until": None if "segment" in record["stages"] else last, **record}
    for place in (config.out, *config.count):
        for folder, found in _settings_in(place):
            with suppress(ValueError, FileNotFoundError):
                yield {**read_metrics(folder), "until": found.get("until")}


# The runs.


def run_sweep(
    config: SweepConfig,
    plan: Sequence[Planned],
    console: Console,
    launch: Callable[[Sequence[str], Path], int] | None = None,
) -> dict[str, str]:
    """Make the runs that are not finished, and write the page after each.

    Args:
        config: what was asked for.
        plan: what :func:`plan_sweep` gives.
        console: told what is run, and what failed.
        launch: (words of the command, log) -> exit status; by default a process whose output goes to the log.

    Returns:
        Name of each run that failed -> why; their logs say more.
    """
    launch = launch or run_logged
    config.out.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    waiting, passed_over = deque(run for run in plan if run.state != "finished"), 0
    while waiting:
        run = waiting.popleft()
        needs = [other for other in (run.share, run.needs) if other is not None]
        with _alone(config.out / f"{run.name}.lock") as alone:
            mine = alone and not any(other in waiting for other in needs)
            if mine and not run.finished:
                place = f"{len(plan) - len(waiting)}/{len(plan)}"
                log = f"{time.strftime('%H:%M')}  {config.out / run.name}.log"
                console.print(f"[bold]{place}  {run.name}[/]  [dim]{escape(log)}[/]", highlight=False, soft_wrap=True)
                why = _make(config, run, launch)
                if why:
                    failed[run.name] = why
                    console.print(f"  [red]failed:[/] {escape(why)}", highlight=False, soft_wrap=True)
        if not mine:  # another sweep is at it, or at what it needs
            waiting.append(run)
            passed_over += 1
            if passed_over >= len(waiting):
                time.sleep(WAIT)
                passed_over = 0
            continue
        passed_over = 0
        write_page(config, plan, failed)
    for name, why in write_page(config, plan, failed).items():
        failed[name] = why
        console.print(f"[red]{name} is not in the results:[/] {escape(why)}", highlight=False, soft_wrap=True)
    console.print(f"results: {escape(str(config.out / 'results.html'))}", soft_wrap=True, highlight=False)
    return failed


def _make(config: SweepConfig, run: Planned, launch: Callable[[Sequence[str], Path], int]) -> str:
    """Make one run; returns why it failed."""
    run.state, run.note = run.state_in(run.folder)
    if run.state == "refused":
        return run.note
    if run.needs is not None and not run.needs.finished:
        return f"it reads the saliency maps of {run.needs.name}, which is not finished"
    if run.share is not None and not run.share.finished:
        run.settings["share"] = None
    log = config.out / f"{run.name}.log"
    before = log.stat().st_size if log.exists() else 0
    status = launch([sys.executable, *shlex.split(run.command)[1:]], log)
    if status == 0 and run.finished:
        return ""
    text = log.read_bytes()[before:].decode(errors="replace") if log.exists() else ""
    return _last_words(text, status)


def _last_words(text: str, status: int) -> str:
    """What a log says of a failure: the message of bad input, or the last line, which is that of a traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines
    words = told[-1] if told else ""
    if status < 0:
        name = signal.Signals(-status).name
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}{f'; last: {words}' if words else ''}"
    return words or f"exit status {status}"


def run_logged(words: Sequence[str], log: Path) -> int:
    """Run a command with its output appended to ``log``; it ends with this process. Returns the exit status."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with log.open("ab") as out:
        # The lock of the run is open in the process too: it is held until that ends, even if this one is killed.
        before = signal.signal(signal.SIGTERM, stop)
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, close_fds=False
        )
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                process.kill()
                process.wait()
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _alone(file: Path) -> Iterator[bool]:
    """Whether no other process holds ``file``; if so it is held while the block runs."""
    lock = try_lock(file, with_children=True)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)


# After: the page.


def write_page(config: SweepConfig, plan: Sequence[Planned], failed: Mapping[str, str]) -> dict[str, str]:
    """Write results.md, results.html, results.csv and the plots of all runs that are finished.

    Returns:
        Name of each of them that has a file which can't be read -> which one; the page says so too.
    """
    runs, damaged = {}, {}
    for run in plan:
        if run.finished:
            try:
                runs[run.name] = {**record_of(run.folder), "command": run.command}
            except ValueError as error:
                damaged[run.name] = str(error)
    systems = list(dict.fromkeys(run.recipe for run in plan))
    results = Results(runs, systems, {**failed, **damaged})
    data = next(iter(runs.values()))["data"] if runs else config.options.get("data", "demo")
    title = f"{len(systems)} systems on {data}, preset {config.preset}"
    plots = results.plots()
    for name, svg in plots.items():
        write_text(config.out / name, svg)
    write_text(config.out / "results.md", "\n".join([f"# {title}\n", *markdown(results, list(plots))]))
    write_text(config.out / "results.html", page(results, title))
    write_text(config.out / "results.csv", table_csv(results))
    return damaged
