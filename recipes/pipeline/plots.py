"""Plots of many systems as SVG, in the colours of the reports. The same figures give the same file."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, SOFT, LINE, PAGE = "#1c2128", "#636c76", "#e3e6ea", "#ffffff"
SERIES = ("#6741d9", "#0c8599", "#d9480f", "#2f9e44")
LETTERING = {
    "svg.fonttype": "none",
    "svg.hashsalt": "wsss",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": INK,
}


class Spread(NamedTuple):
    """Mean and standard deviation over runs; the latter is nan for a single one."""

    mean: float
    std: float = math.nan


def bars(systems: Mapping[str, Mapping[str, Spread]], first: str, unit: str = "mIoU, %") -> str:
    """Groups of horizontal bars, one group a system and one bar a series, with the spread over runs.

    Args:
        systems: name -> series -> figure; what was not measured is left out. Systems are drawn from top to bottom.
        first: the system whose figures go on as dashed lines, for the others to be seen against.
        unit: of the figures.

    Returns:
        The SVG.
    """
    series = list(dict.fromkeys(name for figures in systems.values() for name in figures))
    thick = 0.8 / max(1, len(series))
    with matplotlib.rc_context(LETTERING):
        figure, axes = _axes(7.5, 1.1 + 0.42 * len(systems))
        for place, name in enumerate(series):
            colour = SERIES[place % len(SERIES)]
            for row, figures in enumerate(systems.values()):
                if name not in figures:
                    continue
                mean, std = figures[name]
                height = row + (place - (len(series) - 1) / 2) * thick
                label = name if row == min(i for i, f in enumerate(systems.values()) if name in f) else None
                axes.barh(height, mean, thick * 0.9, color=colour, label=label, zorder=2)
                if not math.isnan(std):
                    axes.errorbar(mean, height, xerr=std, color=INK, elinewidth=0.9, capsize=1.8, zorder=3)
            if name in systems.get(first, {}):
                axes.axvline(systems[first][name].mean, color=colour, linestyle=(0, (3, 3)), linewidth=0.9, zorder=1)
        axes.set_yticks(range(len(systems)), list(systems))
        axes.set_ylim(len(systems) - 0.4, -0.6)
        axes.set_xlabel(unit)
        axes.grid(axis="x", color=LINE, linewidth=0.7, zorder=0)
        if series:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(series), frameon=False)
        return _svg(figure)


def scatter(points: Mapping[str, tuple[float, float]], first: str, x_label: str, y_label: str) -> str:
    """Named points over a diagonal, on which both figures are equal; ``first`` stands out. Returns the SVG."""
    with matplotlib.rc_context(LETTERING):
        figure, axes = _axes(6.4, 5.2)
        for name, (x, y) in points.items():
            axes.plot(x, y, "o", color=SERIES[2] if name == first else SERIES[0], zorder=3 + (name == first))
        if points:
            values = [value for point in points.values() for value in point]
            axes.axline((min(values),) * 2, slope=1, color=SOFT, linestyle=(0, (3, 3)), linewidth=0.9, zorder=1)
            xs, ys = zip(*points.values(), strict=True)
            axes.set_xlim(*_room(xs, right=0.18))
            axes.set_ylim(*_room(ys))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color=LINE, linewidth=0.7, zorder=0)
        _name(axes, points)
        return _svg(figure)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAGE)
    axes = figure.add_subplot()
    axes.set_facecolor(PAGE)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure, axes


def _room(values: Sequence[float], right: float = 0.06) -> tuple[float, float]:
    span = max(max(values) - min(values), 1.0)
    return min(values) - 0.06 * span, max(values) + right * span


def _name(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names to the right of the points, the lower of two that would overlap moved down."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    line, letter = (high - low) / 34, (right - left) / 62
    placed: list[tuple[float, float, float]] = []  # left, right, height
    for name, (x, y) in sorted(points.items(), key=lambda point: (-point[1][1], point[0])):
        start, end, height = x + letter, x + letter * (1 + len(name)), y
        for other_start, other_end, other in sorted(placed, key=lambda place: -place[2]):
            if start < other_end and other_start < end and abs(height - other) < line:
                height = other - line
        placed.append((start, end, height))
        axes.annotate(name, (start, height), fontsize=8, va="center", zorder=5)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the declaration of the file type, so that it may stand in a page
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"
