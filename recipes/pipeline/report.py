"""The page a run ends with: what was measured and how, what it cost, and pictures of where it is right and wrong.

``report.html`` is one file that opens from disk and asks the network for nothing. It is written from what lies in the
run directory, so a run that is not finished, or has no ground truth, gets the part of the page that it has.
"""

from __future__ import annotations

import ast
import base64
import importlib.metadata
import importlib.util
import io
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import numpy as np
import psutil
import torch
import yaml
from markupsafe import Markup, escape
from PIL import Image

from recipes.pipeline.data import ImageSet
from recipes.pipeline.evaluation import BACKGROUND, Confusion, Measurement
from recipes.pipeline.files import load_arrays, load_mask, read_curves, read_metrics, read_settings, write_text
from recipes.pipeline.pictures import (
    CONFUSED,
    FALSE_FOREGROUND,
    MISSED,
    RIGHT,
    Example,
    cam_overlay,
    class_colours,
    error_map,
    fit_within,
    mask_overlay,
    picture,
    resize_cam,
    resize_image,
    resize_mask,
)
from recipes.pipeline.run import Run, settings
from recipes.pipeline.tables import (
    duration,
    measurements,
    overlap_of,
    peak_mb,
    percent,
    print_summary,
    threshold_note,
    total_seconds,
)

__all__ = ["Example", "finish", "machine", "picture", "repeat_command", "write_report"]

PANEL_SIDE = 300  # pixels of the longer side
EXAMPLES = 16  # images of a split
RANKED_IMAGES = 400  # at most so many images are measured one by one to find the best and the worst
SPLITS = {"seed": "training images with masks", "val": "validation images"}
TITLES = {
    "mask": "pseudo mask",
    "mask_crf": "pseudo mask + CRF",
    "segmentation": "segmentation",
    "segmentation_crf": "segmentation + CRF",
    "truth": "ground truth",
}


def write_report(run_dir: str | Path, dataset: ImageSet) -> Path:
    """Write ``report.html`` into a run directory, finished or not.

    Args:
        run_dir: holds config.yaml and metrics.json, and what the stages have written so far.
        dataset: the photographs and, where there are any, ground-truth masks.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: ``run_dir`` is no run directory.
        ValueError: a file in it is damaged.
    """
    folder = Path(run_dir)
    metrics, config = read_metrics(folder), read_settings(folder)
    measured = measurements(metrics)
    stages = metrics.get("stages", {})
    recipe = str(metrics.get("recipe", ""))
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            recipe=recipe,
            paper=_paper(recipe),
            metrics=metrics,
            dataset=dataset,
            command=metrics.get("command") or repeat_command(config),
            measured=measured,
            results=[m for m in measured if not m.oracle],
            splits=SPLITS,
            classes=(BACKGROUND, *dataset.classes),
            colours=_css_colours(len(dataset.classes)),
            stages=stages,
            seconds=total_seconds(stages),
            slowest=max((stage["seconds"] for stage in stages.values()), default=0),
            peak_mb=peak_mb(stages),
            loss_charts=_loss_charts(folder, list(stages)),
            sweep=_threshold_sweep(measured),
            galleries=[gallery for split in SPLITS if (gallery := _gallery(folder, dataset, split)) is not None],
            error_colours={
                "false foreground": FALSE_FOREGROUND,
                "missed": MISSED,
                "wrong class": CONFUSED,
                "right": RIGHT,
            },
            cut_short=config.get("max_steps"),
            config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
            machine=metrics.get("machine") or machine(),
        )
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def finish(run: Run) -> dict[str, Any]:
    """The end of every recipe: write the report, print the table of results, give the metrics back."""
    if run.fabric.global_rank == 0:
        run.record(machine=machine())
        write_report(run.folder, run.dataset)
        run.record(finished=True)
        print_summary(run.metrics, run.folder, run.console)
        until = run.config.until
        if until is not None and until not in run.stages_begun:
            told = f"--until {until}: these settings have no such stage, so the run went on to its end"
            run.console.print(f"[yellow]{told}[/]", highlight=False)
    run.fabric.barrier()
    return run.metrics


def machine() -> dict[str, str]:
    """Versions and hardware that a number depends on, for people to read."""
    found = {"system": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}
    for package in ("wsss", "torch", "timm", "segmentation-models-pytorch", "lightning-fabric", "numpy", "pillow"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found["processor"] = f"{_processor()}, {cores} cores"
    found["memory"] = f"{psutil.virtual_memory().total / 1e9:.0f} GB"
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return found


def repeat_command(config: Mapping[str, Any]) -> str:
    """The command line of a ``config.yaml``: the preset, and a flag for each setting that differs from it."""
    recipe = str(config.get("recipe", ""))
    module = _module(recipe)
    preset = config.get("preset")
    options = {key: value for key, value in config.items() if key not in ("recipe", "preset")}
    presets = getattr(module, "PRESETS", {})
    default = _flat(settings(presets[preset])) if preset in presets else {}
    words, name = ["python", "-m", "recipes", "run", recipe], recipe
    if module is not None and module.__name__ == "__main__":
        words, name = ["python", os.path.relpath(str(module.__file__))], Path(str(module.__file__)).stem
    if options.get("out") == f"runs/{name}-{preset}-s{options.get('seed')}":
        del options["out"]  # the folder it gets anyway
    if preset:
        words += ["--preset", str(preset)]
    for key, value in _flat(options).items():
        if default.get(key) != value:
            words += _flag(key, value)
    return shlex.join(words)


# The recipe a run was made by: a module of ours, or the script being run, which may be an edited copy of one.


def _module(recipe: str) -> ModuleType | None:
    script = sys.modules.get("__main__")
    if script is not None and hasattr(script, "PRESETS") and hasattr(script, "Config"):
        return script
    if _source(recipe) is None:
        return None
    try:
        return importlib.import_module(f"recipes.{recipe}")
    except ImportError:  # an extra that this machine lacks must not keep the page from being written
        return None


def _source(recipe: str) -> Path | None:
    spec = importlib.util.find_spec(f"recipes.{recipe}") if recipe.isidentifier() else None
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _paper(recipe: str) -> str:
    """First line of the recipe's docstring."""
    source = _source(recipe)
    text = None if source is None else ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
    return (text or "").split("\n", 1)[0]


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _flag(key: str, value: Any) -> list[str]:
    name = key.replace("_", "-")
    if isinstance(value, bool):
        parent, dot, last = name.rpartition(".")
        return [f"--{name}" if value else f"--{parent}{dot}no-{last}"]
    return [f"--{name}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]


# Pictures: for a fixed choice of images, everything the run has of each, at the size it is shown.


@dataclass(frozen=True)
class _Card:
    name: str
    note: str
    iou: float | None  # of the image, where it was ranked
    panels: list[tuple[str, str]]  # caption, data URI


@dataclass(frozen=True)
class _Gallery:
    title: str
    ranking: str
    cards: list[_Card]
    legend: list[tuple[str, str]]  # class, colour


def _gallery(folder: Path, dataset: ImageSet, split: str) -> _Gallery | None:
    """Images of one split: seeds and masks on training images, the segmentation on validation images."""
    subject = "mask" if split == "seed" else "segmentation"
    names = dataset.seed if split == "seed" else dataset.val
    if not names and split == "seed":
        names = dataset.train
    kinds = {"cam": {path.stem: path for path in (folder / "cam").glob("*.npz")}}
    kinds |= {kind: {path.stem: path for path in (folder / kind).glob("*.png")} for kind in TITLES}
    made = [name for name in names if any(name in found for found in kinds.values())]
    made = [name for name in made if name in kinds[subject]] or made
    if not made:
        return None
    ranked = _rank(kinds[subject], dataset, made)
    ious = {name: iou for iou, name in ranked}
    seen: set[int] = set()
    cards = [
        _Card(name, note, ious.get(name), _panels(kinds, dataset, name, subject, seen))
        for name, note in _choose(ranked, made)
    ]
    colours = _css_colours(len(dataset.classes))
    ranking = ""
    if ranked:
        all_or_some = "all" if len(ranked) == len(made) else f"{len(ranked)} evenly spaced of the"
        ranking = f"ranked by the {subject}'s mean IoU within the image, among {all_or_some} {len(made)} images"
    title = SPLITS[split] if dataset.seed or split == "val" else "training images"
    return _Gallery(title, ranking, cards, [(dataset.classes[k - 1], colours[k]) for k in sorted(seen)])


def _rank(files: Mapping[str, Path], dataset: ImageSet, names: Sequence[str]) -> list[tuple[float, str]]:
    """(mean IoU of the image, name) from worst to best, of the images that have a prediction and a ground truth."""
    spaced = [names[i] for i in np.linspace(0, len(names) - 1, min(len(names), RANKED_IMAGES)).astype(int)]
    ranked = []
    for name in spaced:
        truth = dataset.mask(name) if name in files else None
        if truth is not None and (truth != 255).any():
            confusion = Confusion(dataset.classes)
            confusion.update(load_mask(files[name], dataset.palette_index), truth, name)
            ranked.append((confusion.miou(), name))
    return sorted(ranked)


def _choose(ranked: Sequence[tuple[float, str]], names: Sequence[str]) -> list[tuple[str, str]]:
    """Up to `EXAMPLES` (name, why): the best, the median and the worst, then some drawn with a fixed seed."""
    chosen: dict[str, str] = {}
    some, middle = EXAMPLES // 5, len(ranked) // 2
    for why, part in (
        ("best", ranked[::-1][:some]),
        ("median", ranked[max(0, middle - some // 2) : middle - some // 2 + some]),
        ("worst", ranked[:some]),
    ):
        for score, name in part:
            chosen.setdefault(name, f"{why}, {score:.1f}")
    scores = {name: score for score, name in ranked}
    for index in np.random.default_rng(0).permutation(len(names)):
        if len(chosen) >= min(EXAMPLES, len(names)):
            break
        name = names[index]
        chosen.setdefault(name, f"random, {scores[name]:.1f}" if name in scores else "random")
    return list(chosen.items())


def _panels(
    kinds: Mapping[str, Mapping[str, Path]], dataset: ImageSet, name: str, subject: str, seen: set[int]
) -> list[tuple[str, str]]:
    """(caption, picture) of an image: the photograph, the CAM of each class, masks, truth, errors."""
    colours = class_colours(len(dataset.classes))
    image = np.asarray(dataset.image(name))
    size = fit_within(PANEL_SIDE, image)
    image = resize_image(image, size)
    truth = dataset.mask(name)
    panels = [("photograph", image)]
    if name in kinds["cam"]:
        stored = load_arrays(kinds["cam"][name])
        keys, cam = stored["keys"].tolist(), stored["cam"]
        small_cam = resize_cam(cam, size)
        if len(keys) != 1:
            panels.append((f"CAM: {'strongest of all' if keys else 'no class'}", cam_overlay(image, small_cam)))
        for place, key in enumerate(keys):
            panels.append((f"CAM: {dataset.classes[key - 1]}", cam_overlay(image, small_cam[place : place + 1])))
    maps = {kind: load_mask(kinds[kind][name], dataset.palette_index) for kind in TITLES if name in kinds[kind]}
    maps |= {} if truth is None else {"truth": truth}
    small = {kind: resize_mask(mask, size) for kind, mask in maps.items()}
    panels += [(TITLES[kind], mask_overlay(image, mask, colours)) for kind, mask in small.items()]
    seen.update(k for mask in small.values() for k in np.unique(mask).tolist() if 0 < k < 255)
    if subject in small and "truth" in small:
        panels.append((f"errors of the {TITLES[subject]}", error_map(image, small[subject], small["truth"])))
    return [(caption, _data_uri(panel)) for caption, panel in panels]


def _data_uri(panel: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(panel).save(buffer, format="WEBP", quality=82, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _css_colours(classes: int) -> list[str]:
    return ["#{:02x}{:02x}{:02x}".format(*colour) for colour in class_colours(classes).tolist()]


# Charts: inline SVG whose colours come from the page's style, so that they follow dark mode.


@dataclass(frozen=True)
class _Line:
    name: str
    points: Sequence[tuple[float, float]]
    faint: bool = False


@dataclass(frozen=True)
class _Mark:
    x: float
    y: float
    oracle: bool


def _loss_charts(folder: Path, order: Sequence[str]) -> list[tuple[str, Markup]]:
    """(training, chart), those that are stages in ``order`` first: the loss, smoothed over the raw values."""
    charts, curves = [], read_curves(folder)
    for stage in (*(stage for stage in order if stage in curves), *(stage for stage in curves if stage not in order)):
        points = curves[stage]
        losses = [(float(p["step"]), float(p["loss"])) for p in points if math.isfinite(p.get("loss", math.nan))]
        if len(losses) < 2:
            continue
        smooth = _smooth([y for _, y in losses])
        lines = [
            _Line("loss", _thin(losses), faint=True),
            _Line("smoothed", _thin([(x, y) for (x, _), y in zip(losses, smooth, strict=True)])),
        ]
        charts.append((stage, _chart(lines, "step", "loss")))
    return charts


@dataclass(frozen=True)
class _Sweep:
    chart: Markup
    notes: list[str]


def _threshold_sweep(measured: Sequence[Measurement]) -> _Sweep | None:
    """Every curve in one chart; the points that were measured are circles, named in the notes below."""
    lines = [_Line(f"{m.what}, {SPLITS.get(m.split, m.split)}", m.curve) for m in measured if m.curve]
    if not lines:
        return None
    swept = {(m.what, m.split) for m in measured if m.curve}
    marks, notes = [], []
    for m in measured:
        if (m.what, m.split) in swept and m.threshold is not None and math.isfinite(m.miou):
            marks.append(_Mark(m.threshold, m.miou, m.oracle))
            sign, where = ("○", m.threshold_from) if m.oracle else ("●", "chosen, fixed beforehand")
            what = f"{sign} {m.what}, {SPLITS.get(m.split, m.split)}"
            notes.append(f"{what}: {percent(m.miou)} at {m.threshold:g} ({where})")
    return _Sweep(_chart(lines, "background threshold", "mIoU, %", marks, width=640), notes)


def _chart(
    lines: Sequence[_Line],
    x_label: str,
    y_label: str,
    marks: Sequence[_Mark] = (),
    width: int = 400,
    height: int = 230,
) -> Markup:
    """A line chart as SVG. Each line takes the page's next series colour; a faint one shares that of the line after.

    Marks are points with a dashed line down to the axis: full where a threshold was chosen, hollow for an oracle.
    """
    points = [p for line in lines for p in line.points if math.isfinite(p[1])]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(0.0, *ys), max(ys))
    x0, x1, y0, y1 = min(xs), max(max(xs), min(xs) + 1e-9), y_ticks[0], max(y_ticks[-1], *ys, y_ticks[0] + 1e-9)
    named = len({line.name for line in lines if not line.faint}) > 1
    left, right, top, bottom = 46, 14, 12 + 16 * named, 40

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x0) / (x1 - x0) * (width - left - right)
        down = height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)
        return round(across, 1), round(down, 1)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">']
    for tick in y_ticks:
        y = at(x0, tick)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for tick in (t for t in x_ticks if x0 <= t <= x1):
        parts.append(f'<text class="tick" x="{at(tick, y0)[0]}" y="{height - 22}" text-anchor="middle">{tick:g}</text>')
    middle, half_way = (left + width - right) / 2, (top + height - bottom) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{height - 5}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="rotate(-90 11 {half_way})" text-anchor="middle"'
    parts.append(f'<text class="axis" x="11" y="{half_way}" {turned}>{escape(y_label)}</text>')
    colour, legend = 0, left
    for line in lines:
        path = " ".join(f"{x},{y}" for x, y in (at(*p) for p in line.points if math.isfinite(p[1])))
        parts.append(f'<polyline class="series s{colour}{" faint" * line.faint}" points="{path}"/>')
        if named and not line.faint:
            parts.append(f'<text class="axis s{colour}" x="{legend}" y="12">{escape(line.name)}</text>')
            legend += 7 * len(line.name) + 20
        colour += not line.faint
    parts += _marked([(mark, *at(min(max(mark.x, x0), x1), mark.y)) for mark in marks], height - bottom, width)
    return Markup("".join([*parts, "</svg>"]))  # every text in it went through escape


def _marked(placed: Sequence[tuple[_Mark, float, float]], floor: float, width: int) -> list[str]:
    """Points, a line from the highest of each threshold to the axis, and its name above the axis."""
    parts = []
    for row, (oracle, x) in enumerate(dict.fromkeys((mark.oracle, x) for mark, x, _ in placed)):
        at = [(mark, y) for mark, across, y in placed if (mark.oracle, across) == (oracle, x)]
        kind = "pole oracle" if oracle else "pole"
        parts.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{min(y for _, y in at)}" y2="{floor}"/>')
        away, anchor = (5, "start") if x < 0.75 * width else (-5, "end")
        word = f"{'oracle' if oracle else 'chosen'} {at[0][0].x:g}"
        height = floor - 7 - 13 * row
        parts.append(f'<text class="{kind}" x="{x + away:g}" y="{height:g}" text-anchor="{anchor}">{word}</text>')
    for mark, x, y in placed:
        parts.append(f'<circle class="{"mark oracle" if mark.oracle else "mark"}" cx="{x}" cy="{y}" r="4"/>')
    return parts


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at or below ``low`` to at or above the last step under ``high``."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= count)
    first = math.floor(low / step + 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of the neighbours on either side, a fifteenth of the curve each."""
    reach = max(1, len(values) // 15)
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _thin(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    return [points[i] for i in np.unique(np.linspace(0, len(points) - 1, min(len(points), most)).astype(int))]


# The page.


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "duration": duration,
        "threshold": threshold_note,
        "overlap": overlap_of,
    }
    return environment


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
