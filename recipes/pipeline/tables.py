"""What a terminal is told: tables of measurements, of classes, of runs side by side; numbers and times for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes.pipeline.evaluation import Measurement

WHATS = ("seed", "mask", "mask+crf", "segmentation", "segmentation+crf")


def measurements(metrics: Mapping[str, Any]) -> list[Measurement]:
    """The measurements of a ``metrics.json``."""
    return [Measurement.from_dict(values) for values in metrics.get("measurements", [])]


def print_summary(metrics: Mapping[str, Any], folder: Path, console: Console) -> None:
    """The table a run ends with: every measurement with its conditions, the cost, and where the report is."""
    measured = measurements(metrics)
    console.print()
    console.print(measurement_table(measured) if measured else "Nothing was measured: there is no ground truth here.")
    stages = metrics.get("stages", {})
    if stages:
        console.print(f"{duration(total_seconds(stages))} in all, at most {peak_mb(stages):,.0f} MB", highlight=False)
    report = folder / "report.html"
    place = f"report: {report}" if report.exists() else f"results: {folder}"
    console.print(escape(place), soft_wrap=True, highlight=False)


def measurement_table(measured: Iterable[Measurement]) -> Table:
    """One row a measurement, with what makes it comparable."""
    table = _table()
    for title in ("measured", "split", "images", "threshold", "mIoU"):
        table.add_column(title, justify="right" if title in ("images", "mIoU") else "left")
    for m in measured:
        unsure = f" [yellow]({percent(m.unsure)} % undecided, counted as wrong)[/]" if m.unsure else ""
        miou = f"[{'dim' if m.oracle else 'bold'}]{percent(m.miou)}[/]"
        table.add_row(escape(m.what) + unsure, escape(m.split), f"{m.images:,}", threshold_note(m) or "-", miou)
    return table


def class_table(measured: Sequence[Measurement]) -> Table:
    """IoU, precision and recall of every class, a column a measurement."""
    table = _table()
    table.add_column("IoU [dim]precision recall[/]")
    for m in measured:
        table.add_column(f"{escape(m.what)} [dim]on {escape(m.split)}[/]", justify="right")
    for name in dict.fromkeys(name for m in measured for name in m.iou):
        rows = [
            (m.iou.get(name, math.nan), m.precision.get(name, math.nan), m.recall.get(name, math.nan)) for m in measured
        ]
        cells = [f"{percent(iou)} [dim]{percent(p):>5} {percent(r):>5}[/]" for iou, p, r in rows]
        table.add_row(escape(name), *cells)
    return table


def comparison_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Runs (name to metrics) in rows; everything measured, time and peak memory in columns.

    Behind a mIoU stands its difference to that of the plain CAM (see :class:`Comparison`), below it the means of
    precision and recall. An oracle stands in its own words below the figure at the fixed threshold, the one that
    counts.
    """
    comparison = Comparison(runs)
    columns = comparison.columns
    table = _table()
    table.add_column("run")
    for what, split in columns:
        table.add_column(f"{escape(what)}\n[dim]on {escape(split)}[/]", justify="right")
    for title in ("time", "processor", "peak memory"):
        table.add_column(title, justify="right")

    figures = {(name, column): comparison.value(name, column) for name in runs for column in columns}
    tops = {c: max((figures[n, c] for n in runs if figures[n, c] >= 0), default=math.nan) for c in columns}
    for name, metrics in runs.items():
        cells = [escape(name)]
        for column in columns:
            miou, fixed = figures[name, column], comparison.get(name, column)
            text = f"[bold]{percent(miou)}[/]" if len(runs) > 1 and miou == tops[column] else percent(miou)
            lines = [text + bracketed(comparison.difference(name, column))]
            if fixed is not None:
                lines.append(f"[dim]P {percent(fixed.mean_precision)} R {percent(fixed.mean_recall)}[/]")
            oracle = comparison.get(name, column, oracle=True)
            if oracle is not None:
                lines.append(f"[dim]oracle {percent(oracle.miou)}[/]")
            cells.append("\n".join(lines))
        stages = metrics.get("stages", {})
        busy = processor_seconds(stages)
        cells += [duration(total_seconds(stages)), "-" if busy is None else duration(busy)]
        table.add_row(*cells, f"{peak_mb(stages):,.0f} MB")
    return table


class Comparison:
    """The measurements of several runs, and how far each is from the plain CAM.

    A run is compared with that of ``cam`` whose classifier it took over, or else with one of the same seed; where that
    one has not measured the same thing, with another of the same seed.

    Args:
        runs: name or folder -> what is in its metrics.json.
    """

    def __init__(self, runs: Mapping[str, Mapping[str, Any]]) -> None:
        self.runs = runs
        self.measured = {name: measurements(metrics) for name, metrics in runs.items()}

    @property
    def columns(self) -> list[tuple[str, str]]:
        """(what, split) of everything measured, in the order of the stages."""
        return sorted({(m.what, m.split) for measured in self.measured.values() for m in measured}, key=_order)

    def get(self, name: str, column: tuple[str, str], oracle: bool = False) -> Measurement | None:
        """A measurement of one run."""
        found = (m for m in self.measured[name] if ((m.what, m.split), m.oracle) == (column, oracle))
        return next(found, None)

    def value(self, name: str, column: tuple[str, str], of: str = "miou") -> float:
        """``miou``, ``mean_precision`` or ``mean_recall`` at the fixed threshold; nan where it was not measured."""
        found = self.get(name, column)
        return math.nan if found is None else float(getattr(found, of))

    def plain(self, name: str, column: tuple[str, str]) -> str | None:
        """The run of ``cam`` that ``name`` is compared with; None for one of ``cam``, or where there is none."""
        own = self.runs[name]
        if own.get("recipe") == "cam":
            return None
        found = [
            other
            for other, metrics in self.runs.items()
            if (metrics.get("recipe"), metrics.get("seed")) == ("cam", own.get("seed")) and self.get(other, column)
        ]
        return min(
            found, key=lambda other: (not _took(own, other), not _took(self.runs[other], name), other), default=None
        )

    def difference(self, name: str, column: tuple[str, str]) -> float:
        """How far the mIoU of ``name`` is above that of its plain run; nan without one."""
        plain = self.plain(name, column)
        return math.nan if plain is None else self.value(name, column) - self.value(plain, column)


def _took(metrics: Mapping[str, Any], other: str) -> bool:
    """Whether a run has taken over what it has in common with the run of that name."""
    return Path(metrics.get("reused") or "").name == Path(other).name


def protocol_differences(runs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One sentence for every condition of a measurement that is not the same in all runs (name to metrics)."""
    for key in ("data", "classes"):
        values = {name: metrics[key] for name, metrics in runs.items() if key in metrics}
        if len({str(value) for value in values.values()}) > 1:
            yield f"{key}: " + _each(values)
    measured = {name: measurements(metrics) for name, metrics in runs.items()}
    for column in sorted({(m.what, m.split) for ms in measured.values() for m in ms}, key=_order):
        images = {name: m.images for name, ms in measured.items() for m in ms if (m.what, m.split) == column}
        if len(set(images.values())) > 1:
            yield f"images of {column[0]} on {column[1]}: " + _each(images)
        thresholds = {
            name: m.threshold_from
            for name, ms in measured.items()
            for m in ms
            if (m.what, m.split) == column and not m.oracle
        }
        if len(set(thresholds.values())) > 1:
            yield f"threshold of {column[0]} on {column[1]}: " + _each(thresholds)
    for what in WHATS:
        splits = {name: sorted({m.split for m in ms if m.what == what}) for name, ms in measured.items()}
        splits = {name: found for name, found in splits.items() if found}
        if splits and not set.intersection(*map(set, splits.values())):
            yield f"split of {what}: " + _each(splits)


def total_seconds(stages: Mapping[str, Mapping[str, float]]) -> float:
    """Time of all stages."""
    return sum(stage["seconds"] for stage in stages.values())


def processor_seconds(stages: Mapping[str, Mapping[str, float]]) -> float | None:
    """Processor time of all stages; None if it was not recorded of each."""
    busy = [stage.get("cpu_seconds") for stage in stages.values()]
    return None if None in busy else sum(seconds for seconds in busy if seconds is not None)


def peak_mb(stages: Mapping[str, Mapping[str, float]]) -> float:
    """Largest peak memory of a stage."""
    return max((stage["peak_mb"] for stage in stages.values()), default=0.0)


def percent(value: float) -> str:
    """One decimal; a dash for nan, which stands for what does not occur."""
    return "-" if math.isnan(value) else f"{value:.1f}"


def overlap_of(key: str) -> str:
    """The overlap that a key of average precisions stands for: 0.5 of "ap50"."""
    return f"{int(key.removeprefix('ap')) / 100:g}"


def bracketed(difference: float) -> str:
    """A difference with its sign, in brackets behind a figure; nothing for nan."""
    return "" if math.isnan(difference) else f" ({round(difference, 1) + 0.0:+.1f})"  # not -0.0


def duration(seconds: float) -> str:
    """Seconds as 4.2 s, 3 min 05 s or 2 h 07 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def threshold_note(measurement: Measurement) -> str:
    """The threshold and where it is from, in a few words; empty without a threshold."""
    if measurement.threshold is None:
        return ""
    return f"{measurement.threshold:g}, {'oracle' if measurement.oracle else measurement.threshold_from}"


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")


def _order(column: tuple[str, str]) -> tuple[int, tuple[str, str]]:
    return (WHATS.index(column[0]) if column[0] in WHATS else len(WHATS)), column


def _each(values: Mapping[str, object]) -> str:
    return "; ".join(f"{name}: {', '.join(v) if isinstance(v, list) else v}" for name, v in values.items())
