"""The commands behind ``python -m recipes``: list, run, evaluate, compare, sweep, predict, copy.

A recipe is any module of this package with ``Config``, ``PRESETS`` and ``main``, the first two as a rule imported from
:mod:`recipes.settings`; nothing is registered. A copy of one is a command of its own with the same flags, because both
end in :func:`run_recipe`. What needs torch is imported by the command that needs it, so that a list or a help text
comes at once.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import os
import pkgutil
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import recipes

Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]

if TYPE_CHECKING:
    from recipes.pipeline.data import ImageSet

# What a wrong option, file or environment raises; anything else is a bug of ours and keeps its traceback.
BAD_INPUT = (ValueError, OSError, ModuleNotFoundError, FloatingPointError)


@dataclass(frozen=True)
class Recipe:
    """A recipe as its source says, without importing it."""

    name: str
    path: Path
    paper: str
    summary: str
    presets: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit status is 0, 2 for bad input, or 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[..., None]] = {
        "list": list_recipes,
        "run": run,
        "evaluate": evaluate,
        "compare": compare,
        "sweep": sweep,
        "predict": predict,
        "copy": copy,
    }
    with _told_plainly(["python", "-m", "recipes", *argv]):
        if argv[:1] == ["run"] and argv[1:2] not in ([], ["-h"], ["--help"]):
            run_recipe(_import(argv[1]), argv[2:])
        else:
            tyro.extras.subcommand_cli_from_dict(
                commands,
                args=argv or ["--help"],
                prog="python -m recipes",
                description="Published systems for weakly supervised semantic segmentation, from image tags to masks.",
            )
    return 0


def run_recipe(module: ModuleType, argv: Sequence[str] | None = None) -> None:
    """Run a recipe with the settings of ``--preset`` and every other field of its ``Config`` as a flag.

    Args:
        module: has ``Config`` (a dataclass with ``preset``, ``seed`` and ``out``), ``PRESETS`` and ``main(config)``.
        argv: the flags; those of the process by default.

    Raises:
        SystemExit: bad input (2) or Ctrl-C (130), after a message; ``WSSS_DEBUG=1`` shows the traceback instead.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    script = Path(str(module.__file__))
    is_ours = module.__name__.startswith("recipes.")
    words = ["python", "-m", "recipes", "run", script.stem] if is_ours else ["python", os.path.relpath(script)]
    with _told_plainly([*words, *argv]):
        preset = _preset(argv, module)
        config = tyro.cli(
            module.Config,
            args=argv,
            default=dataclasses.replace(module.PRESETS[preset], preset=preset),
            prog=shlex.join(words),
            description=module.__doc__,
            config=(tyro.conf.AvoidSubcommands,),  # a schedule of SGD or AdamW has the flags of the preset's
        )
        if config.out is None:  # named after the script, so that an edited copy does not go on with the original's run
            config = dataclasses.replace(config, out=Path("runs") / f"{script.stem}-{preset}-s{config.seed}")
        if getattr(config, "until", None) is not None:
            from recipes.pipeline.stages import check_until

            check_until(config.until, script.stem, module)
        with _keeping_source(script, Path(config.out)):
            from recipes.pipeline.report import finish
            from recipes.pipeline.run import StoppedEarly

            try:
                module.main(config)
            except StoppedEarly as stop:
                finish(stop.run)


# The commands. Their signatures are their flags, their docstrings the help.


def list_recipes() -> None:
    """List the recipes with their papers and presets."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("recipe", "paper", "presets"):
        table.add_column(title, header_style="bold")
    for recipe in discover().values():
        about = escape(recipe.paper) + (f"\n[dim]{escape(recipe.summary)}[/]" if recipe.summary else "")
        table.add_row(f"[bold cyan]{recipe.name}[/]", about, " ".join(recipe.presets))
    console = _console()
    console.print(table)
    console.print("\n[dim]python -m recipes run NAME --help  lists the options of a recipe[/]")


def run(name: Name, preset: Annotated[str, tyro.conf.arg(metavar="demo|small|paper|tiny")] = "demo") -> None:
    """Run a recipe; `run NAME --help` lists its flags.

    Args:
        name: one of those that `list` shows.
        preset: the settings to start from; every other flag changes one of them.
    """
    run_recipe(_import(name), ["--preset", preset])


def evaluate(
    path: tyro.conf.Positional[Path],
    data: str | None = None,
    labels: str | None = None,
    classes: str | None = None,
    train_list: str | None = None,
    seed_list: str | None = None,
    val_list: str | None = None,
    split: Literal["seed", "val"] = "val",
    threshold: float | None = None,
    report: bool = False,
    workers: int = 2,
) -> None:
    """Measure again what lies in a run directory, or the masks in any folder of PNGs.

    Args:
        path: a run directory, or a folder of NAME.png in the data set's indices (then `--data` is needed).
        data: where the ground truth is; by default the run's own.
        labels: tags file, as in `run`.
        classes: comma-separated classes, as in `run`.
        train_list: as in `run`.
        seed_list: as in `run`.
        val_list: as in `run`.
        split: which images a folder of PNGs is measured on.
        threshold: background threshold of the seeds; by default the one the run used.
        report: also write the run's report.html anew.
        workers: threads.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: expected a run directory or a folder of PNG masks, found no such folder")
    from recipes.pipeline.files import read_metrics, read_settings
    from recipes.pipeline.remeasure import measure_folder, remeasure_run
    from recipes.pipeline.tables import class_table, measurement_table, measurements

    is_run = (path / "metrics.json").is_file()
    for name, given in (("report", report), ("threshold", threshold is not None)):
        if given and not is_run:
            raise ValueError(f"{name}: expected a run directory to use it on, but {path} has no metrics.json")
    told = {"data": data, "labels": labels, "classes": classes}
    told |= {"train_list": train_list, "seed_list": seed_list, "val_list": val_list}
    known = read_settings(path) if is_run else {}
    dataset = _dataset({**known, **{key: value for key, value in told.items() if value is not None}}, path)
    console = _console()

    def say(note: str) -> None:
        console.print(f"[yellow]{escape(note)}[/]", highlight=False)

    if is_run:
        recorded = measurements(read_metrics(path))
        measured = list(remeasure_run(path, dataset, recorded, threshold=threshold, workers=workers, say=say))
    else:
        measured = [measure_folder(path, dataset, split, workers=workers, say=say)]
    if not measured:
        raise ValueError(f"{path}: there is nothing to measure, no CAMs or masks of images that have a ground truth")
    console.print(measurement_table(measured))
    console.print()
    console.print(class_table([m for m in measured if not m.oracle]))
    if report and is_run:
        from recipes.pipeline.report import write_report

        console.print(f"report: {escape(str(write_report(path, dataset)))}", soft_wrap=True, highlight=False)


def compare(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")],
    html: Path | None = None,
    csv: Path | None = None,
) -> None:
    """Put runs side by side: figures of each stage, time, memory; and say where they cannot be compared.

    Where a run of `cam` with the same seed is among them, a difference in mIoU to it stands behind each figure.

    Args:
        runs: run directories, or folders of them, such as that of a sweep.
        html: also write a page with tables and plots to this file.
        csv: also write every measurement to this file, a line each.
    """
    from recipes.pipeline.files import read_metrics, run_folders, write_text
    from recipes.pipeline.tables import comparison_table, protocol_differences

    if not runs:
        raise ValueError("runs: expected at least one run directory, got none")
    folders = run_folders(runs)
    found = {str(folder): read_metrics(folder) for folder in folders}
    console = _console()
    console.print(comparison_table(found))
    for difference in protocol_differences(found):
        console.print(f"[yellow]not comparable:[/] {escape(difference)}", highlight=False)
    if html is not None or csv is not None:
        from recipes.pipeline.results import Results, page, record_of, table_csv

        results = Results({str(folder): record_of(folder) for folder in folders})
        for file, text in ((html, page(results, "Runs side by side")), (csv, table_csv(results))):
            if file is not None:
                write_text(file, text)
                console.print(f"written: {escape(str(file))}", soft_wrap=True, highlight=False)


def sweep(
    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME...|all")],
    preset: Annotated[str, tyro.conf.arg(metavar="demo|small|paper|tiny")] = "demo",
    seeds: tuple[int, ...] = (0,),
    out: Path | None = None,
    without: tuple[str, ...] = (),
    data: str | None = None,
    labels: str | None = None,
    classes: str | None = None,
    train_list: str | None = None,
    seed_list: str | None = None,
    val_list: str | None = None,
    outside: str | None = None,
    outside_list: str | None = None,
    until: str | None = None,
    max_steps: int | None = None,
    workers: int | None = None,
    accelerator: str | None = None,
    precision: str | None = None,
    count: tuple[Path, ...] = (),
    dry_run: bool = False,
) -> None:
    """Run many recipes on the same images under the same settings, and write one page of their results.

    Each run has a process of its own and a log beside its folder. `cam` is always among them: it comes first for every
    seed, and whoever begins with the same classifier takes it over. The same command goes on where it was stopped,
    leaves out what is finished and tries again what has failed. The exit status is 1 if any run failed.

    Args:
        names: recipes, or all.
        preset: the settings of all of them.
        seeds: each recipe runs once with each.
        out: folder of the runs and of results.md, results.html, results.csv; runs/sweep-PRESET by default.
        without: recipes that are left out; not `cam`, nor `c2am` where others need its saliency maps.
        data: as in `run`, like the options below.
        labels: tags file.
        classes: comma-separated classes.
        train_list: list of training images.
        seed_list: list of training images whose masks measure seeds and masks.
        val_list: list of validation images.
        outside: for recipes that want them, a folder of photographs without any of the classes.
        outside_list: list of those to be used.
        until: stop each run after this stage, which all of the recipes must have.
        max_steps: cut every stage short.
        workers: loader processes.
        accelerator: auto, cpu or cuda.
        precision: 32-true, 16-mixed or bf16-mixed.
        count: runs, or folders of them: those that are finished and have the same settings are not made again.
        dry_run: only show what would be run, in which order, and what it took before.
    """
    from recipes.pipeline.sweep import SweepConfig, plan_sweep, plan_table, run_sweep

    found = tuple(discover())
    unknown = [name for name in without if name not in found]
    if unknown:
        raise ValueError(f"without: there is no {unknown[0]!r}; there are {', '.join(found)}")
    options = {
        "data": data,
        "labels": labels,
        "classes": classes,
        "train_list": train_list,
        "seed_list": seed_list,
        "val_list": val_list,
        "outside": outside,
        "outside_list": outside_list,
        "until": until,
        "max_steps": max_steps,
        "workers": workers,
        "accelerator": accelerator,
        "precision": precision,
    }
    config = SweepConfig(
        recipes=found if "all" in names else tuple(dict.fromkeys(names)),
        preset=preset,
        seeds=seeds,
        out=out or Path("runs") / f"sweep-{preset}",
        options={key: value for key, value in options.items() if value is not None},
        count=count,
        without=without,
    )
    console = _console()
    plan = plan_sweep(config, _import)
    console.print(plan_table(config, plan))
    if not dry_run and run_sweep(config, plan, console):
        sys.exit(1)


def predict(
    run: tyro.conf.Positional[Path],
    photos: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PHOTO...")],
    out: Path | None = None,
    crf: bool | None = None,
    long_side: int | None = 1000,
    device: str = "cpu",
) -> None:
    """Segment photographs with the network that a run has trained; write masks and overlays.

    Args:
        run: a finished run directory, or the folder model/ of one.
        photos: photographs, or folders of them.
        out: folder for NAME.png and NAME_overlay.jpg; predictions/ in the run's by default.
        crf: refine by a dense CRF; as the run tested its network by default.
        long_side: photographs with a longer side are seen at this one, twice VOC's, and their masks are of their
            own size; None: as they are, in memory that grows with their pixels.
        device: cpu, cuda or another of torch's.
    """
    import torch

    from recipes.pipeline.predict import find_photos
    from recipes.pipeline.predict import predict as predictions
    from recipes.pipeline.pretrained import from_pretrained

    if not photos:
        raise ValueError("photos: expected at least one photograph or folder, got none")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected cpu, or cuda where there is one, got {device!r} ({reason})") from error
    found = find_photos(photos)
    trained = from_pretrained(run / "model" if (run / "model").is_dir() else run)
    folder, console, unread = out or run / "predictions", _console(), []
    for done in predictions(
        trained, found, folder, crf=crf, long_side=long_side, device=device, complain=unread.append
    ):
        told = ", ".join(f"{name} {100 * share:.0f} %" for name, share in done.shares.items()) or "background only"
        console.print(f"{escape(str(done.photo))}: {escape(told)}", soft_wrap=True, highlight=False)
    if len(unread) < len(found):
        console.print(f"masks and overlays: {escape(str(folder))}", soft_wrap=True, highlight=False)
    if unread:
        raise ValueError("photos: " + "; ".join(unread))


def copy(name: Name, file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]) -> None:
    """Copy a recipe to a script of your own, to edit and run.

    The script imports its settings from `recipes/settings/NAME.py`. Each is a flag; a preset of your own is a line
    below the imports, `PRESETS = {**PRESETS, "mine": replace(PRESETS["small"], ...)}` with the `replace` of
    `dataclasses`; for a setting that is not there copy that file too and import yours.

    Args:
        name: one of those that `list` shows.
        file: the new script; never overwritten.
    """
    recipe = _find(name)
    target = file / f"{name}.py" if file.is_dir() else file
    if target.suffix != ".py":
        raise ValueError(f"file: expected a name that ends in .py, got {file}")
    if target.exists():
        raise ValueError(f"file: {target} exists and is not overwritten; give another name")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"file: there is no folder {target.parent}")
    shutil.copyfile(recipe.path, target)
    command = shlex.join(["python", str(target)])
    told = f"copied {name}; run it with\n  {command}"
    if _settings(name).is_file():
        told += f"\nits settings are in {_settings(name)}; copy --help says how to change them"
    _console().print(escape(told), soft_wrap=True, highlight=False)


# Recipes, found by looking at the package.


def discover() -> dict[str, Recipe]:
    """All recipes by name, read from their sources."""
    found = {}
    for info in pkgutil.iter_modules(recipes.__path__):
        spec = info.module_finder.find_spec(info.name, None)
        if info.ispkg or spec is None or spec.origin is None:
            continue
        tree = _parse(Path(spec.origin))
        presets = _presets(tree)
        if presets is not None:
            paper, _, rest = (ast.get_docstring(tree) or "").partition("\n")
            first = " ".join(rest.strip().split("\n\n", 1)[0].split())
            summary = first.split(". ", 1)[0].rstrip(".") + "." * bool(first)
            found[info.name] = Recipe(info.name, Path(spec.origin), paper, summary, presets)
    return found


def _presets(tree: ast.Module) -> tuple[str, ...] | None:
    """Keys of ``PRESETS``, which the module sets to a dictionary or imports from :mod:`recipes.settings`, or both.

    None if it does neither, so that it is no recipe.
    """
    found: tuple[str, ...] | None = None
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == "PRESETS" for alias in node.names):
            package, _, name = str(node.module).rpartition(".")
            if package == "recipes.settings":
                found = _presets(_parse(_settings(name)))
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "PRESETS" for target in targets):
                kept = (found or ()) if None in node.value.keys else ()  # {**PRESETS, ...}
                found = (*kept, *(str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)))
    return found


def _settings(name: str) -> Path:
    return Path(__file__).parent / "settings" / f"{name}.py"


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _find(name: str) -> Recipe:
    found = discover()
    if name in found:
        return found[name]
    if name.endswith(".py"):
        raise ValueError(f"recipe: {name} is a script; run it as `python {name}`")
    close = difflib.get_close_matches(name, found, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ValueError(f"recipe: there is no {name!r}; {hint}There are {', '.join(found)}")


def _import(name: str) -> ModuleType:
    return importlib.import_module(f"recipes.{_find(name).name}")


def _preset(argv: Sequence[str], module: ModuleType) -> str:
    """Value of ``--preset`` in ``argv``, looked up before the other flags because it holds their defaults."""
    chosen = module.Config.__dataclass_fields__["preset"].default
    for position, word in enumerate(argv):
        if word == "--preset" and position + 1 < len(argv):
            chosen = argv[position + 1]
        elif word.startswith("--preset="):
            chosen = word.partition("=")[2]
    if chosen not in module.PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(module.PRESETS)}, got {chosen!r}")
    return str(chosen)


@contextmanager
def _keeping_source(script: Path, folder: Path) -> Iterator[None]:
    """Keep the script that makes a run beside its results, and say if another version of it began the run."""
    kept, settings = folder / "recipe.py", folder / "config.yaml"
    source, others = script.read_bytes(), False
    begun = settings.exists()
    if kept.exists() and kept.read_bytes() != source and _first_process():
        note = f"{script.name} has changed since {folder} was begun: stages that are finished stay as they are. "
        Console(stderr=True).print(f"[yellow]{escape(note)}Give another --out to start afresh.[/]", soft_wrap=True)
    try:
        yield
    except ValueError as error:  # the folder may be that of another run
        from recipes.pipeline.files import FolderInUse

        others = begun or isinstance(error, FolderInUse)
        raise
    finally:
        if settings.exists() and not others and _first_process():
            from recipes.pipeline.files import replacing

            with replacing(kept) as file:
                file.write(source)


def _first_process() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


def _dataset(options: Mapping[str, Any], path: Path) -> ImageSet:
    from recipes.pipeline.data import load_dataset

    if not options.get("data"):
        raise ValueError(f"data: {path} is no run directory, so --data must say where the ground truth is")
    keys = ("classes", "labels", "train_list", "val_list", "seed_list")
    return load_dataset(options["data"], **{key: options.get(key) for key in keys})


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=200)


@contextmanager
def _told_plainly(words: Sequence[str]) -> Iterator[None]:
    """Turn bad input into a message and exit status 2, Ctrl-C into how to go on and 130; bugs keep their traceback."""
    if os.environ.get("WSSS_DEBUG", "") not in ("", "0"):
        yield
        return
    console = Console(stderr=True, soft_wrap=True)
    try:
        yield
    except BAD_INPUT as error:
        hint = ""
        if isinstance(error, ModuleNotFoundError):
            hint = '; the recipes need more than the library: pip install "wsss[recipes]"'
        console.print(f"[bold red]error:[/] {escape(str(error) + hint)}", highlight=False)
        console.print("[dim]WSSS_DEBUG=1 shows where it was raised[/]")
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("\nInterrupted. The same command goes on where it stopped:")
        console.print(f"  {escape(shlex.join(words))}", highlight=False)
        sys.exit(130)
