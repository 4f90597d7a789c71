from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import recipes
from recipes import cli
from recipes.cli import main, run_recipe
from recipes.pipeline import data
from recipes.pipeline.evaluation import Measurement
from recipes.pipeline.tables import comparison_table, percent, protocol_differences
from tests.faults.test_disk import fill_up
from tests.recipes.synthetic import install_toy, make_dataset, make_run

ROOT = Path(recipes.__path__[0]).parent


@pytest.fixture(autouse=True)
def _no_debug(monkeypatch):
    monkeypatch.delenv("WSSS_DEBUG", raising=False)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return install_toy(tmp_path, monkeypatch)


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """The synthetic data set, as what ``--data synthetic`` loads."""
    found = make_dataset(tmp_path / "data")

    def load(spec, **options):
        assert spec == "synthetic"
        return found

    monkeypatch.setattr(data, "load_dataset", load)
    return found


@pytest.fixture
def run(tmp_path, dataset):
    return make_run(tmp_path / "a run", dataset)


def fails(argv: list[str], capsys, status: int = 2) -> str:
    """The message of a command that must end with ``status`` and no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == status
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err
    return " ".join((told.err or told.out).split())


# list


def test_list_names_paper_and_presets_of_every_recipe(toy, capsys):
    assert main(["list"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "toy Toy: A Paper About <Nothing> (Nobody, 1999). demo tiny Does no work at all." in told
    assert "Second sentence" not in told
    assert "cli" not in cli.discover()
    assert cli.discover().keys() >= {"cam", "rw", "irn", "toy"}


@pytest.mark.parametrize("name", [name for name in cli.discover() if name != "toy"])
def test_every_recipe_says_what_it_is(name):
    recipe = cli.discover()[name]
    assert set(recipe.presets) == {"demo", "small", "paper", "tiny"}
    assert recipe.paper
    assert recipe.summary
    source = recipe.path.read_text()
    assert len(source.splitlines()) <= 250, "what can be set belongs to recipes/settings, what is shared to pipeline"
    assert f"from recipes.settings.{name} import " in source
    assert 'if __name__ == "__main__":\n    run_recipe(sys.modules[__name__])\n' in source


def settings_of_their_own(extra: str) -> str:
    """The script of `cam` with ``extra`` below its imports."""
    source = cli.discover()["cam"].path.read_text()
    imports, listed, rest = source.partition("\n__all__ = ")
    return imports + extra + listed + rest


def test_list_finds_the_presets_that_a_script_imports_and_its_own(tmp_path, monkeypatch):
    for name, extra in {
        "same": "",
        "more": '\nPRESETS = {**PRESETS, "mine": Config(threshold=0.5)}\n',
        "only": '\nPRESETS = {"mine": Config(threshold=0.5)}\n',
    }.items():
        (tmp_path / f"{name}.py").write_text(settings_of_their_own(extra))
    monkeypatch.setattr(recipes, "__path__", [*recipes.__path__, str(tmp_path)])
    found = {name: cli.discover()[name].presets for name in ("cam", "same", "more", "only")}
    assert found["same"] == found["cam"]
    assert found["more"] == (*found["cam"], "mine")
    assert found["only"] == ("mine",)


def test_list_help_and_tables_of_runs_do_not_wait_for_torch():
    code = "import sys; from recipes.cli import main; main(['list']); import recipes.pipeline.results; "
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# run


def seen(folder: Path) -> str:
    return (folder / "seen.txt").read_text()


def test_run_takes_the_demo_preset_by_default(toy):
    assert main(["run", "toy"]) == 0
    assert seen(Path("runs/toy-demo-s0")) == repr(toy.Config(out=Path("runs/toy-demo-s0")))


@pytest.mark.parametrize("flag", [["--preset", "tiny"], ["--preset=tiny"]], ids=["two words", "one word"])
def test_run_takes_flags_on_top_of_the_preset(toy, flag):
    main(["run", "toy", "--seed", "4", *flag, "--part.no-deep", "--out", "my runs/a b"])
    part = toy.Part(rate=0.125, deep=False, scales=(1.0,))
    assert seen(Path("my runs/a b")) == repr(toy.Config(preset="tiny", seed=4, out=Path("my runs/a b"), part=part))


def test_run_help_lists_every_field_with_its_comment(toy, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "toy", "--preset", "tiny", "--help"])
    assert stop.value.code == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "A Paper About <Nothing>" in told
    assert "--label-file" in told
    assert "Rate of the part. (default: 0.125)" in told


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "toi"], "error: recipe: there is no 'toi'; did you mean toy?"),
        (["run", "quite another"], "error: recipe: there is no 'quite another'; There are a"),
        (["run", "toy.py"], "error: recipe: toy.py is a script; run it as `python toy.py`"),
        (["run", "toy", "--preset", "huge"], "error: preset: expected one of demo, tiny, got 'huge'"),
        (["run", "toy", "--data", "voc:here [1]"], "error: data: expected demo, got 'voc:here [1]'"),
        (["run", "cam", "--until", "mask"], "error: until: cam has classify, cams, masks, segment, but no 'mask'"),
        (["run", "toy", "--sed", "1"], "--sed"),
        (["run", "toy", "--seed", "one"], "--seed"),
        (["run"], "Missing from python -m recipes run: NAME"),
        (["rum"], "rum"),
        (["copy", "toy"], "Missing from python -m recipes copy: FILE"),
        (["compare", "nowhere"], "error: nowhere: expected a run directory with metrics.json, found none"),
        (["compare"], "error: runs: expected at least one run directory, got none"),
        (["evaluate", "nowhere"], "error: nowhere: expected a run directory or a folder of PNG masks"),
        (
            ["evaluate", ".", "--report"],
            "error: report: expected a run directory to use it on, but . has no metrics.json",
        ),
        (["evaluate", ".", "--threshold", "0.3"], "error: threshold: expected a run directory to use it on"),
        (["evaluate", "."], "error: data: . is no run directory, so --data must say where the ground truth is"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_told_in_one_message(toy, capsys, argv, message):
    assert message in fails(argv, capsys)


def test_debug_shows_where_it_was_raised(toy, monkeypatch):
    monkeypatch.setenv("WSSS_DEBUG", "1")
    with pytest.raises(ValueError, match="data: expected demo, got 'x'"):
        main(["run", "toy", "--data", "x"])


def test_a_bug_keeps_its_traceback(toy):
    with pytest.raises(RuntimeError, match="a bug"):
        main(["run", "toy", "--data", "bug"])


def test_missing_package_says_what_to_install(toy, capsys, monkeypatch):
    def no_timm(config):
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    monkeypatch.setattr(toy, "main", no_timm)
    assert """No module named 'timm'; the recipes need more than the library: pip install "wsss[recipes]\"""" in fails(
        ["run", "toy"], capsys
    )


def test_interrupt_says_how_to_go_on(toy, capsys):
    told = fails(["run", "toy", "--data", "interrupt", "--out", "a b"], capsys, status=130)
    assert told.endswith(
        "The same command goes on where it stopped: python -m recipes run toy --data interrupt --out 'a b'"
    )


def test_run_keeps_the_script_and_says_when_it_has_changed(toy, capsys):
    main(["run", "toy"])
    kept = Path("runs/toy-demo-s0/recipe.py")
    assert kept.read_bytes() == Path(toy.__file__).read_bytes()
    main(["run", "toy"])
    assert "has changed" not in capsys.readouterr().err
    kept.write_text("another version")
    main(["run", "toy"])
    assert "toy.py has changed since runs/toy-demo-s0 was begun" in " ".join(capsys.readouterr().err.split())
    assert kept.read_bytes() == Path(toy.__file__).read_bytes()


def test_a_schedule_of_another_kind_has_the_flags_of_the_preset(monkeypatch):
    from recipes import bbam

    found = []
    monkeypatch.setattr(bbam, "main", found.append)
    main(["run", "bbam", "--preset", "small", "--detect.schedule.warmup", "0.2"])
    main(["run", "bbam", "--detect.schedule.momentum", "0.8"])
    assert [type(config.detect.schedule).__name__ for config in found] == ["AdamSchedule", "Schedule"]
    assert (found[0].detect.schedule.warmup, found[1].detect.schedule.momentum) == (0.2, 0.8)


def test_a_refused_run_leaves_the_script_of_the_other(toy, capsys, monkeypatch):
    main(["run", "toy"])
    kept = Path("runs/toy-demo-s0/recipe.py")
    kept.write_text("the other's")

    def refuse(config):
        raise ValueError("out: holds a run with other settings")

    monkeypatch.setattr(toy, "main", refuse)
    assert "other settings" in fails(["run", "toy"], capsys)
    assert kept.read_text() == "the other's"


def test_a_full_disk_leaves_the_script_that_was_kept(toy, capsys, monkeypatch):
    main(["run", "toy"])
    kept = Path("runs/toy-demo-s0/recipe.py")
    kept.write_text("another version")
    fill_up(monkeypatch, room=10)
    assert "make room" in fails(["run", "toy"], capsys)
    assert kept.read_text() == "another version"


def test_failed_start_leaves_no_folder(toy, capsys):
    fails(["run", "toy", "--data", "x"], capsys)
    assert not Path("runs").exists()


# copy


def test_copy_runs_from_anywhere_with_the_same_flags(toy, tmp_path, capsys):
    (tmp_path / "my scripts").mkdir()
    assert main(["copy", "toy", "my scripts/my toy.py"]) == 0
    assert "python 'my scripts/my toy.py'" in capsys.readouterr().out
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # as an editable installation gives
    command = [sys.executable, "my toy.py", "--preset", "tiny", "--seed", "5"]
    done = subprocess.run(command, cwd=tmp_path / "my scripts", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "my scripts" / "runs" / "my toy-tiny-s5"  # not the original's folder
    assert "seed=5" in seen(folder)
    assert "rate=0.125" in seen(folder)


def test_copy_says_where_the_settings_are(tmp_path, capsys):
    main(["copy", "cam", str(tmp_path / "mine.py")])
    assert f"its settings are in {ROOT / 'recipes' / 'settings' / 'cam.py'}" in capsys.readouterr().out
    assert (tmp_path / "mine.py").read_bytes() == cli.discover()["cam"].path.read_bytes()


def test_copy_may_have_settings_and_presets_of_its_own(tmp_path, monkeypatch):
    mine = """
from dataclasses import dataclass


@dataclass(frozen=True)
class Config(Config):
    depth: int = 3
    \"\"\"How deep.\"\"\"


PRESETS = {"mine": Config(threshold=0.5)}
"""
    (tmp_path / "mine.py").write_text(settings_of_their_own(mine))
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mine", script)
    spec.loader.exec_module(script)
    given = []
    monkeypatch.setattr(script, "main", given.append)
    monkeypatch.chdir(tmp_path)
    run_recipe(script, ["--preset", "mine", "--depth", "4", "--cams.scales", "1"])
    (config,) = given
    assert (config.preset, config.threshold, config.depth, config.cams.scales) == ("mine", 0.5, 4, (1.0,))


def test_copied_script_tells_bad_input_with_its_own_name(toy, tmp_path):
    main(["copy", "toy", "mine.py"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "mine.py", "--data", "interrupt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 130
    assert "python mine.py --data interrupt" in done.stderr


def test_copy_into_a_folder_keeps_the_name(toy, tmp_path):
    (tmp_path / "scripts").mkdir()
    main(["copy", "toy", "scripts"])
    assert (tmp_path / "scripts" / "toy.py").read_bytes() == Path(toy.__file__).read_bytes()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("there.py", "file: there.py exists and is not overwritten; give another name"),
        ("toy.txt", "file: expected a name that ends in .py, got toy.txt"),
        ("no/where.py", "file: there is no folder no"),
    ],
)
def test_copy_refuses(toy, tmp_path, capsys, file, message):
    (tmp_path / "there.py").write_text("mine")
    assert message in fails(["copy", "toy", file], capsys)
    assert (tmp_path / "there.py").read_text() == "mine"


# evaluate


def recorded(run: Path) -> list[Measurement]:
    return [Measurement.from_dict(m) for m in json.loads((run / "metrics.json").read_text())["measurements"]]


def rows(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_evaluate_finds_in_the_files_what_the_run_recorded(run, capsys):
    assert main(["evaluate", str(run)]) == 0
    told = capsys.readouterr().out
    fixed, oracle, mask, segmentation = recorded(run)
    assert f"seed seed 8 0.15, fixed {percent(fixed.miou)}" in rows(told)
    assert f"seed seed 8 {oracle.threshold:g}, oracle {percent(oracle.miou)}" in rows(told)
    assert f"mask seed 8 - {percent(mask.miou)}" in rows(told)
    assert f"segmentation val 4 - {percent(segmentation.miou)}" in rows(told)
    assert any(row.startswith("cow & calf") for row in rows(told))
    assert "metrics.json says" not in told


def test_evaluate_says_what_differs_and_what_is_missing(run, dataset, capsys):
    first, second = dataset.val[:2]
    (run / "segmentation" / f"{first}.png").unlink()
    Image.fromarray(np.zeros(dataset.size(second), np.uint8)).save(run / "segmentation" / f"{second}.png")
    main(["evaluate", str(run)])
    told = " ".join(capsys.readouterr().out.split())
    assert "segmentation on val: 3 of 4 images are there" in told
    assert f"metrics.json says {recorded(run)[3].miou:.2f} on 4 images, the files give" in told


def test_evaluate_measures_the_seed_at_another_threshold(run, capsys):
    main(["evaluate", str(run), "--threshold", "0.4"])
    assert any(row.startswith("seed seed 8 0.4, fixed") for row in rows(capsys.readouterr().out))


def test_evaluate_without_a_recorded_threshold_gives_only_the_oracle(run, capsys):
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "measurements": []}))
    main(["evaluate", str(run)])
    seeds = [row for row in rows(capsys.readouterr().out) if row.startswith("seed seed")]
    assert len(seeds) == 1
    assert "oracle" in seeds[0]


def test_evaluate_can_write_the_report_anew(run, capsys):
    main(["evaluate", str(run), "--report"])
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    assert (run / "report.html").is_file()


def test_evaluate_of_an_empty_run_says_so(tmp_path, dataset, capsys):
    folder = tmp_path / "begun"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"recipe": "toy", "stages": {}, "measurements": []}))
    assert "there is nothing to measure" in fails(["evaluate", str(folder), "--data", "synthetic"], capsys)


def test_evaluate_of_any_folder_of_masks(run, capsys):
    folder = str(run / "segmentation")
    assert main(["evaluate", folder, "--data", "synthetic", "--split", "val"]) == 0
    assert f"segmentation val 4 - {percent(recorded(run)[3].miou)}" in rows(capsys.readouterr().out)


def test_evaluate_of_a_folder_wants_every_mask(run, capsys):
    told = fails(["evaluate", str(run / "segmentation"), "--data", "synthetic", "--split", "seed"], capsys)
    assert "expected masks of the 8 images of split 'seed', but 8 files: photo 00.png" in told


def test_evaluate_counts_left_out_classes_as_background_and_says_so(run, dataset, capsys):
    path = run / "segmentation" / f"{dataset.val[0]}.png"
    stored = np.array(Image.open(path))
    Image.fromarray(np.where(stored == 0, 15, stored).astype(np.uint8)).save(path)
    main(["evaluate", str(run / "segmentation"), "--data", "synthetic"])
    told = capsys.readouterr().out
    assert "values 15 of the masks are none of the chosen classes and count as background" in told
    assert f"segmentation val 4 - {percent(recorded(run)[3].miou)}" in rows(told)


def test_evaluate_refuses_a_value_that_is_no_class(run, dataset, monkeypatch, capsys):
    everything = type(dataset)(**{**vars(dataset), "palette_index": (0, 1, 2)})
    monkeypatch.setattr(data, "load_dataset", lambda spec, **options: everything)
    told = fails(["evaluate", str(run / "segmentation"), "--data", "synthetic"], capsys)
    assert "expected values 0..2 or 255, found" in told


def test_evaluate_of_photographs_without_masks(tmp_path, monkeypatch, capsys):
    dataset = make_dataset(tmp_path / "bare", masks=False)
    monkeypatch.setattr(data, "load_dataset", lambda spec, **options: dataset)
    told = fails(["evaluate", str(tmp_path), "--data", "folder:bare"], capsys)
    assert "synthetic has no ground truth for the images of split 'val'" in told


# compare


def metrics_of(run: Path, **changes) -> dict:
    return {**json.loads((run / "metrics.json").read_text()), **changes}


def test_compare_shows_runs_in_rows(run, tmp_path, capsys):
    second = tmp_path / "second run"
    second.mkdir()
    metrics = metrics_of(run, stages={"classify": {"seconds": 4.0, "peak_mb": 2000.0}})
    metrics["measurements"] = metrics["measurements"][:3]
    metrics["measurements"][2]["miou"] = 91.25
    (second / "metrics.json").write_text(json.dumps(metrics))
    assert main(["compare", str(run), str(second)]) == 0
    told = rows(capsys.readouterr().out)
    fixed, oracle, mask, segmentation = (percent(m.miou) for m in recorded(run))
    assert told[:2] == ["seed mask segmentation", "run on seed on seed on val time processor peak memory"]
    assert f"{run} {fixed} {mask} {segmentation} 1 min 45 s - 1,024 MB" in told
    assert f"{second} {fixed} 91.2 - 4.0 s - 2,000 MB" in told
    rates = [f"P {percent(m.mean_precision)} R {percent(m.mean_recall)}" for m in recorded(run) if not m.oracle]
    assert told.count(" ".join(rates)) == 1
    assert told.count(" ".join(rates[:2])) == 1
    assert told.count(f"oracle {oracle}") == 2
    assert not any("not comparable" in row for row in told)


def test_compare_says_how_far_a_run_is_from_the_plain_cam(run, tmp_path, capsys):
    (tmp_path / "runs" / "cam").mkdir(parents=True)
    plain = change(run, 2, miou=recorded(run)[2].miou - 10, iou={})
    (tmp_path / "runs" / "cam" / "metrics.json").write_text(json.dumps({**plain, "recipe": "cam"}))
    run.rename(tmp_path / "runs" / "toy")
    files = ["--html", str(tmp_path / "page.html"), "--csv", str(tmp_path / "out" / "all.csv")]
    main(["compare", str(tmp_path / "runs"), *files])  # a folder of runs
    told = rows(capsys.readouterr().out)
    assert any(row.startswith(f"{tmp_path / 'runs' / 'toy'} ") and "(+10.0)" in row for row in told)
    assert f"written: {tmp_path / 'page.html'}" in told
    assert "(+10.0)" in (tmp_path / "page.html").read_text()
    assert len((tmp_path / "out" / "all.csv").read_text().splitlines()) == 1 + 2 * 4


def test_compare_marks_the_best_of_a_column(run):
    better = metrics_of(run)
    better["measurements"][2]["miou"] = 91.0
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - rich wants it open
    console.print(comparison_table({"a": metrics_of(run), "b": better}))
    console.file.close()
    styled = console.export_text(styles=True)
    assert "\x1b[1m91.0" in styled
    assert f"\x1b[1m{percent(recorded(run)[2].miou)}" not in styled


def change(run: Path, index: int, **changes) -> dict:
    metrics = metrics_of(run)
    metrics["measurements"][index].update(changes)
    return metrics


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda run: metrics_of(run, data="voc:x"), "data: a: synthetic; b: voc:x"),
        (lambda run: metrics_of(run, classes=["cat"]), "classes: a: cat, cow & calf; b: cat"),
        (lambda run: change(run, 2, images=7), "images of mask on seed: a: 8; b: 7"),
        (lambda run: change(run, 3, split="test"), "split of segmentation: a: val; b: test"),
        (
            lambda run: change(run, 0, threshold_from="searched on other images"),
            "threshold of seed on seed: a: fixed; b: searched on other images",
        ),
    ],
    ids=["data", "classes", "images", "split", "threshold"],
)
def test_compare_warns_when_protocols_differ(run, edit, message):
    assert list(protocol_differences({"a": metrics_of(run), "b": edit(run)})) == [message]
    assert list(protocol_differences({"a": metrics_of(run), "b": metrics_of(run)})) == []


def test_compare_survives_a_measurement_that_is_nan(run):
    table = comparison_table({"a": change(run, 2, miou=math.nan), "b": change(run, 2, miou=None)})
    assert table.row_count == 2


# files that can't be read

NO_RUN = {
    "metrics.json": ("", "{", "[1, 2]", '{"accuracy": 0.5}', '{"recipe": "toy", "stages": [], "measurements": []}'),
    "config.yaml": ("", "{", "[1, 2]", "only text"),
    "curves/classify.jsonl": ("", "{", "[1, 2]", '{"loss": 0.5}'),
}


@pytest.mark.parametrize("command", [["compare", "--html", "page.html"], ["evaluate", "--report"]], ids=lambda c: c[0])
@pytest.mark.parametrize(("file", "content"), [(file, content) for file in NO_RUN for content in NO_RUN[file]])
def test_a_file_cut_short_or_of_another_kind_is_told_by_name(run, capsys, monkeypatch, command, file, content):
    monkeypatch.chdir(run.parent)
    (run / file).write_text(content)
    told = fails([command[0], str(run), *command[1:]], capsys)
    assert f"error: {run / file}: cannot be read (" in told
    assert "Remove it and give the command of that run again, or leave that run out" in told
    assert not Path("page.html").exists()


# the end of a run


def test_summary_without_ground_truth(tmp_path, capsys):
    from recipes.pipeline.tables import print_summary

    print_summary({"stages": {"masks": {"seconds": 2.0, "peak_mb": 10.0}}}, tmp_path / "a [run]", Console(width=80))
    told = capsys.readouterr().out
    assert "Nothing was measured: there is no ground truth here." in told
    assert "2.0 s in all, at most 10 MB" in told
    assert f"results: {tmp_path / 'a [run]'}" in told


def test_run_recipe_is_what_a_script_calls(toy, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy.py", "--seed", "9"])
    run_recipe(toy)
    assert "seed=9" in seen(Path("runs/toy-demo-s9"))
