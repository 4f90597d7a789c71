"""What a terminal is told: tables of measurements, of classes, of runs side by side; numbers and times for people."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes.pipeline.evaluation import Measurement

WHATS = ("seed", "mask", "mask+crf", "segmentation", "segmentation+crf")


def read_metrics(folder: Path) -> dict[str, Any]:
    """``metrics.json`` of a run directory.

    Raises:
        FileNotFoundError: ``folder`` is no run directory.
    """
    file = folder / "metrics.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: expected a run directory with metrics.json, found none")
    return json.loads(file.read_text())


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
    """Runs (name to metrics) in rows; mIoU of everything measured, time and peak memory in columns.

    An oracle stands in its own words below the figure at the fixed threshold, which is the one that counts.
    """
    measured = {name: measurements(metrics) for name, metrics in runs.items()}
    columns = sorted({(m.what, m.split) for ms in measured.values() for m in ms}, key=_order)
    table = _table()
    table.add_column("run")
    for what, split in columns:
        table.add_column(f"{escape(what)}\n[dim]on {escape(split)}[/]", justify="right")
    table.add_column("time", justify="right")
    table.add_column("peak memory", justify="right")

    def figure(name: str, column: tuple[str, str], oracle: bool) -> float:
        return next((m.miou for m in measured[name] if ((m.what, m.split), m.oracle) == (column, oracle)), math.nan)

    tops = {c: max((figure(n, c, False) for n in runs if figure(n, c, False) >= 0), default=math.nan) for c in columns}
    for name, metrics in runs.items():
        cells = [escape(name)]
        for column in columns:
            miou, oracle = figure(name, column, False), figure(name, column, True)
            text = percent(miou)
            text = f"[bold]{text}[/]" if len(runs) > 1 and miou == tops[column] else text
            cells.append(text if math.isnan(oracle) else f"{text}\n[dim]oracle {percent(oracle)}[/]")
        stages = metrics.get("stages", {})
        table.add_row(*cells, duration(total_seconds(stages)), f"{peak_mb(stages):,.0f} MB")
    return table


def protocol_differences(runs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """One sentence for every condition of a measurement that is not the same in all runs (name to metrics)."""
    for key in ("data", "classes"):
        values = {name: metrics.get(key) for name, metrics in runs.items()}
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


def peak_mb(stages: Mapping[str, Mapping[str, float]]) -> float:
    """Largest peak memory of a stage."""
    return max((stage["peak_mb"] for stage in stages.values()), default=0.0)


def percent(value: float) -> str:
    """One decimal; a dash for nan, which stands for what does not occur."""
    return "-" if math.isnan(value) else f"{value:.1f}"


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
