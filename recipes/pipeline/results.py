"""Many runs on one page: each system beside the plain CAM, means over seeds, what it cost, whether that was fair.

All of it works on what a run leaves behind, its metrics.json and config.yaml, or on the record of it that
:func:`record_of` makes, which is small enough to keep. What was not run is said to be so.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from recipes.pipeline.files import read_curves, read_metrics, read_settings
from recipes.pipeline.plots import Spread, bars, scatter
from recipes.pipeline.tables import (
    Comparison,
    bracketed,
    duration,
    overlap_of,
    peak_mb,
    percent,
    processor_seconds,
    protocol_differences,
    total_seconds,
)

PLAIN = "cam"
FIRST = (PLAIN, "rw", "irn")  # in the tables, before the others by name
SEED, MASK, CRF, SEGMENTATION = ("seed", "seed"), ("mask", "seed"), ("mask+crf", "seed"), ("segmentation", "val")
COLUMNS = {
    SEED: "seed, train",
    ("seed", "val"): "seed, val",
    MASK: "mask",
    CRF: "mask + CRF",
    SEGMENTATION: "segmentation",
}
LISTS = {"seed": "train", "val": "val"}
NOT_RUN = "not run"
CONDITIONS = ("run", "recipe", "seed", "what", "split", "images", "threshold", "threshold_from")
FIGURES = ("miou", "precision", "recall", "difference", "seconds", "cpu_seconds", "peak_mb")
ALIKE = "Nothing that the runs have recorded of data, lists, protocol, backbone and budgets differs."
PICTURED = "mIoU of all systems"
PARTS = {"classify": "the classifier", "segment": "the segmentation network"}


def record_of(folder: Path) -> dict[str, Any]:
    """What a page needs of a run directory: metrics without curves, and those of its settings that must be alike."""
    metrics, config = read_metrics(folder), read_settings(folder)
    keys = ("recipe", "preset", "seed", "data", "classes", "stages", "measurements", "instances", "machine", "taken")
    record = {key: metrics[key] for key in keys if key in metrics}
    record["measurements"] = [{**m, "curve": []} for m in metrics["measurements"]]
    record["reused"] = Path(metrics["reused"]).name if "reused" in metrics else None
    record["supervision"] = supervision(config)
    # segmentation networks have an encoder instead, and are compared by their settings
    record["backbones"] = sorted({str(value) for key, value in _flat(config) if key.endswith(".backbone")})
    record["steps"] = trained_steps(folder)
    record["until"] = config.get("until")
    left_out = {"segment"} - set(metrics["stages"])  # of a run that was stopped before
    record["settings"] = {
        part: config[part] for part in (*PARTS, "max_steps") if part in config and part not in left_out
    }
    return record


def trained_steps(folder: Path) -> dict[str, int]:
    """Steps of each training that a run has finished or taken over, in the order in which they ended."""
    weights = sorted((folder / "checkpoints").glob("*.pt"), key=lambda file: file.stat().st_mtime)
    curves = read_curves(folder)
    return {file.stem: curves[file.stem][-1]["steps"] for file in weights if file.stem in curves}


def supervision(config: Mapping[str, Any]) -> str:
    """What a system is told besides the tags of the images, read off its settings."""
    told = ["tags"]
    if "boxes" in config:
        told.append("boxes" if config["boxes"] == "annotations" else "boxes made from masks")
    if wants_saliency(config):
        given = config["saliency"]
        told.append("saliency" if given is None else f"saliency of {re.sub('-s[0-9]+$', '', Path(given).name)}")
    if "outside" in config:
        told.append("images without objects")
    if "critic" in config:
        told.append("image-text pairs")
    if config.get("oracle_checkpoint_selection"):
        told.append("masks for the choice of the checkpoint")
    return ", ".join(told)


def wants_saliency(config: Mapping[str, Any]) -> bool:
    """Whether a recipe with these settings reads saliency maps (one that learns its own has a section of that name)."""
    given = config.get("saliency", "none")
    return (given is None or isinstance(given, str)) and given != "none" and config.get("variant", "eps") == "eps"


@dataclass(frozen=True)
class Grid:
    """A table: texts, the first column naming the row."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""

    def markdown(self, level: int = 2) -> list[str]:
        """As lines of Markdown under a heading."""
        lines = [f"{'#' * level} {self.title}\n"]
        lines += [self.note, ""] if self.note else []
        lines += [f"| {' | '.join(self.header)} |", "| --- |" + " --: |" * (len(self.header) - 1)]
        return [*lines, *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in self.rows), ""]


class Results:
    """Runs by system.

    Args:
        runs: name -> record or metrics.json.
        systems: recipes that have a row even without a run; by default those that there are runs of.
        failed: name of a run that ended in an error -> what it said.
    """

    def __init__(
        self,
        runs: Mapping[str, Mapping[str, Any]],
        systems: Sequence[str] = (),
        failed: Mapping[str, str] | None = None,
    ) -> None:
        self.comparison = Comparison(runs)
        self.failed = dict(failed or {})
        known = {*systems, *(str(metrics["recipe"]) for metrics in runs.values())}
        self.systems = sorted(known, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
        self.runs = dict(sorted(runs.items(), key=self._order))

    def _order(self, run: tuple[str, Mapping[str, Any]]) -> tuple[int, int, str]:
        name, metrics = run
        return self.systems.index(metrics["recipe"]), metrics.get("seed", 0), name

    def of(self, system: str) -> dict[str, Mapping[str, Any]]:
        """The runs of a system."""
        return {name: metrics for name, metrics in self.runs.items() if metrics["recipe"] == system}

    def spread(self, system: str, column: tuple[str, str], of: str = "miou") -> Spread | None:
        """Mean and deviation over the runs of a system; None where none has measured it."""
        return _spread([self.comparison.value(name, column, of) for name in self.of(system)])

    def class_spread(self, system: str, column: tuple[str, str], name: str) -> Spread | None:
        """The same of the IoU of one class."""
        measured = [self.comparison.get(run, column) for run in self.of(system)]
        return _spread([m.iou.get(name, math.nan) for m in measured if m is not None])

    def difference(self, system: str, column: tuple[str, str]) -> float:
        """Mean difference of the runs to the plain CAM they are compared with; nan without one."""
        known = [self.comparison.difference(name, column) for name in self.of(system)]
        known = [value for value in known if not math.isnan(value)]
        return statistics.fmean(known) if known else math.nan

    # The tables.

    def overview(self) -> list[Grid]:
        """Every system in a row: mIoU and its difference to the plain CAM; precision and recall; what it took."""
        columns = [SEED, MASK, CRF, SEGMENTATION]
        titles = [COLUMNS[column] for column in columns]
        miou, rates, costs = [], [], []
        for system in self.systems:
            runs = list(self.of(system).values())
            if not runs:
                miou.append((system, NOT_RUN, *["-"] * len(columns)))
                continue
            found = list(dict.fromkeys(str(run.get("seed", "-")) for run in runs))
            seeds = ", ".join(found) + (f" ({len(runs)} runs)" if len(runs) > len(found) else "")
            cells = [told(self.spread(system, c)) + bracketed(self.difference(system, c)) for c in columns]
            miou.append((system, seeds, *cells))
            pairs = [[self.spread(system, c, of) for of in ("mean_precision", "mean_recall")] for c in columns]
            rates.append((system, *(f"{told(p)} / {told(r)}" if p and r else "-" for p, r in pairs)))
            costs.append((system, *_costs(runs)))
        several = any(len(self.of(system)) > 1 for system in self.systems)
        note = "mIoU in percent" + ", mean ± standard deviation over the runs where there are several" * several
        note += f"; in brackets the difference to the run of `{PLAIN}` with the same classifier or the same seed. "
        note += "Each system has its own fixed threshold. A dash was not measured."
        return [
            Grid("All systems", ("system", "seeds", *titles), miou, note),
            Grid(
                "Precision and recall",
                ("system", *titles),
                rates,
                "Percent, means over the classes, background included, and over the runs that kept them. "
                "A class that was never predicted has no precision.",
            ),
            Grid(
                "What they took",
                ("system", "supervision", "steps of training", "time", "processor", "memory"),
                costs,
                "Means over the runs, the largest memory of any. What a run took over from another counts in it too.",
            ),
        ]

    def each_run(self) -> Grid:
        """Every run in a row, with the oracle thresholds."""
        rows = []
        for name, run in self.runs.items():
            cells = []
            for column in COLUMNS:
                fixed, oracle = self.comparison.get(name, column), self.comparison.get(name, column, oracle=True)
                found = f" ({percent(oracle.miou)} at {oracle.threshold:g})" if oracle is not None else ""
                cells.append("-" if fixed is None else percent(fixed.miou) + found)
            rows.append((name, *cells, *_costs([run])[-3:]))
        note = "In brackets the best threshold, found with the ground truth of the same split: an upper bound."
        return Grid("Every run", ("run", *COLUMNS.values(), "time", "processor", "memory"), rows, note)

    def rest(self) -> Grid | None:
        """What is measured by single systems: networks and maps besides those of all, instances; None without any."""
        rows = []
        for system in self.systems:
            runs = self.of(system)
            others = [m for name in runs for m in self.comparison.measured[name] if (m.what, m.split) not in COLUMNS]
            images = {(m.what, m.split): f"{m.images} {LISTS.get(m.split, m.split)}" for m in others if not m.oracle}
            rows += [
                (system, what, "mIoU", images[what, split], told(self.spread(system, (what, split))))
                for what, split in images
            ]
            found = [run["instances"] for run in runs.values() if "instances" in run]
            for key in dict.fromkeys(key for instances in found for key in instances):
                known = [instances[key] for instances in found if key in instances]
                spread = _spread([instances["mean"] for instances in known])
                rows.append(
                    (system, "instances", f"AP at {overlap_of(key)}", f"{known[0]['images']} val", told(spread))
                )
        note = "Percent, at fixed thresholds, means over the runs."
        return Grid("What else was measured", ("system", "what", "figure", "images", "%"), rows, note) if rows else None

    def classes(self) -> Iterator[Grid]:
        """IoU per class of everything measured, a table each."""
        for column, title in COLUMNS.items():
            found = [m for name in self.runs if (m := self.comparison.get(name, column)) is not None]
            if not found:
                continue
            names = list(dict.fromkeys(name for m in found for name in m.iou))
            rows = []
            for system in self.systems:
                mean = self.spread(system, column)
                if mean is not None:
                    each = [self.class_spread(system, column, name) for name in names]
                    rows.append((system, *(percent(s.mean) if s else "-" for s in (mean, *each))))
            title = f"IoU per class: {title.partition(',')[0]}, {found[0].images} {LISTS[column[1]]} images"
            yield Grid(title, ("system", "mIoU", *names), rows)

    def stages(self) -> Grid:
        """Seconds of every stage."""
        rows = []
        for name, run in self.runs.items():
            told = ", ".join(f"{stage} {costs['seconds']:.0f}" for stage, costs in run.get("stages", {}).items())
            rows.append((name, told))
        return Grid("Seconds per stage, by the clock", ("run", "stages"), rows)

    def details(self) -> Iterator[Grid]:
        """The tables that come last."""
        rest = self.rest()
        yield from (rest,) if rest else ()
        yield from self.classes()
        yield self.stages()

    # What is to be said of them.

    def notes(self) -> list[str]:
        """What a reader of the tables must know of single runs."""
        taken = [
            f"{name} takes what it has in common with {run['reused']} from there; it counts in both times."
            for name, run in self.runs.items()
            if run.get("reused")
        ]
        return [*taken, *(f"{name} failed: {message}" for name, message in sorted(self.failed.items()))]

    def unfair(self) -> list[str]:
        """Where the runs are not comparable: data, protocol, backbone, or the budget of a part they have in common."""
        return [*protocol_differences(self.runs), *self._other_settings()]

    def _other_settings(self) -> Iterator[str]:
        for key in ("preset", "backbones"):
            yield from _minority(key, {name: run.get(key) for name, run in self.runs.items() if run.get(key)})
        cut = {name: run["settings"].get("max_steps") for name, run in self.runs.items() if "settings" in run}
        yield from _minority("max_steps", cut)
        for part, title in PARTS.items():
            found = {name: run["settings"][part] for name, run in self.runs.items() if part in run.get("settings", {})}
            plain = next((values for name, values in found.items() if self.runs[name]["recipe"] == PLAIN), None)
            for name, values in found.items() if plain is not None else ():
                differing = {key: value for key, value in _flat(values) if dict(_flat(plain)).get(key) != value}
                if differing:
                    told = ", ".join(f"{key} {value}" for key, value in differing.items())
                    yield f"{title} of {name} is not that of {PLAIN}: {told}"

    # Pictures.

    def plots(self) -> dict[str, str]:
        """File name -> SVG: mIoU of every system as bars, and seeds against masks; none where nothing was measured."""
        drawn: dict[str, dict[str, Spread]] = {}
        for system in self.systems:
            mask = self.spread(system, CRF) or self.spread(system, MASK)
            found = {"seed": self.spread(system, SEED), "mask": mask, "segmentation": self.spread(system, SEGMENTATION)}
            drawn[system] = {name: spread for name, spread in found.items() if spread is not None}
        drawn = {system: found for system, found in drawn.items() if found}
        best = sorted(drawn, key=lambda system: -drawn[system].get("mask", Spread(-1.0)).mean)
        points = {
            system: (found["seed"].mean, found["mask"].mean)
            for system, found in drawn.items()
            if {"seed", "mask"} <= found.keys()
        }
        plots = {}
        if drawn:
            plots["miou.svg"] = bars({system: drawn[system] for system in best}, PLAIN)
        if points:
            plots["seed_mask.svg"] = scatter(points, PLAIN, "mIoU of the seeds, %", "mIoU of the masks (+ CRF), %")
        return plots


# The forms: Markdown, one HTML file, CSV.


def markdown(results: Results, pictures: Sequence[str] = (), level: int = 2, remarks: str = "") -> list[str]:
    """The whole page as lines, without a title.

    Args:
        results: the runs.
        pictures: addresses of the plots, as seen from the page.
        level: of the headings.
        remarks: what is to be said of the rows, in Markdown, below the table of all systems.
    """
    heading = "#" * level
    miou, *others = results.overview()
    lines = miou.markdown(level)
    lines += [line for picture in pictures for line in (f"![{PICTURED}]({picture})", "")]
    lines += [f"{heading} Remarks\n", remarks] if remarks else []
    for grid in others:
        lines += grid.markdown(level)
    unfair = results.unfair()
    lines += [f"{heading} What is not alike\n"]
    lines += [f"- {sentence}." for sentence in unfair] or [ALIKE]
    lines += ["", *results.each_run().markdown(level)]
    lines += [*(f"- {note}" for note in results.notes()), ""] if results.notes() else []
    for grid in results.details():
        lines += grid.markdown(level)
    machines = [run["machine"] for run in results.runs.values() if run.get("machine")]
    if machines:
        lines += [
            f"{heading} Conditions\n",
            ", ".join(f"{key} {value}" for key, value in machines[0].items()) + ".",
            "",
        ]
    commands = [str(run["command"]) for run in results.runs.values() if run.get("command")]
    return [*lines, *(["```bash", *commands, "```", ""] if commands else [])]


def page(results: Results, title: str) -> str:
    """The tables and plots as one page that asks the network for nothing; columns sort at a click."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("results.html.j2").render(
        title=title,
        overview=results.overview(),
        plots=[Markup(svg) for svg in results.plots().values()],  # drawn here; matplotlib escapes their texts
        unfair=[f"{sentence}." for sentence in results.unfair()] or [ALIKE],
        notes=results.notes(),
        details=[results.each_run(), *results.details()],
        commands=[str(run["command"]) for run in results.runs.values() if run.get("command")],
    )


def table_csv(results: Results) -> str:
    """One line for each measurement at a fixed threshold or without one, for a spreadsheet or a data frame."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*CONDITIONS, *FIGURES])
    for name, run in results.runs.items():
        stages = run.get("stages", {})
        costs = [total_seconds(stages), processor_seconds(stages), peak_mb(stages)]
        for m in results.comparison.measured[name]:
            apart = math.nan if m.oracle else results.comparison.difference(name, (m.what, m.split))
            figures = [m.miou, m.mean_precision, m.mean_recall, apart]
            row = [name, run.get("recipe"), run.get("seed"), m.what, m.split, m.images, m.threshold, m.threshold_from]
            writer.writerow([*row, *("" if math.isnan(x) else round(x, 4) for x in figures), *costs])
    return buffer.getvalue()


def told(spread: Spread | None) -> str:
    """54.4 or 54.4 ± 0.3; a dash for None."""
    if spread is None:
        return "-"
    return percent(spread.mean) + ("" if math.isnan(spread.std) else f" ± {spread.std:.1f}")


def _spread(values: Sequence[float]) -> Spread | None:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else math.nan)


def _costs(runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Supervision, steps, time, processor time and memory of the runs of a system."""
    told = ", ".join(dict.fromkeys(run["supervision"] for run in runs if run.get("supervision"))) or "-"
    steps = next((run["steps"] for run in runs if run.get("steps")), {})
    trained = ", ".join(f"{part} {count}" for part, count in steps.items()) or "-"
    stages = [run.get("stages", {}) for run in runs]
    busy = [processor_seconds(found) for found in stages]
    known = [seconds for seconds in busy if seconds is not None]
    return (
        told,
        trained,
        duration(statistics.fmean(map(total_seconds, stages))),
        duration(statistics.fmean(known)) if known and len(known) == len(busy) else "-",
        f"{max(map(peak_mb, stages)) / 1000:.1f} GB",
    )


def _minority(key: str, values: Mapping[str, Any]) -> Iterator[str]:
    """A sentence that groups runs by a value, if there are several values."""
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(", ".join(map(str, value)) if isinstance(value, list) else str(value), []).append(name)
    if len(groups) > 1:
        usual = max(groups, key=lambda value: len(groups[value]))
        others = "; ".join(f"{value}: {', '.join(names)}" for value, names in groups.items() if value != usual)
        yield f"{key} of most: {usual}; {others}"


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
