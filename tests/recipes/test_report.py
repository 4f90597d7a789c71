from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric import Fabric
from rich.console import Console

from recipes.pipeline import report
from recipes.pipeline.evaluation import Measurement
from recipes.pipeline.files import save_arrays, save_mask
from recipes.pipeline.report import finish, repeat_command, write_report
from recipes.pipeline.run import Run, RunConfig, StoppedEarly, settings
from recipes.pipeline.tables import duration, percent
from tests.recipes.synthetic import install_toy, make_dataset, make_run

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails on a tag that is closed out of turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.words, self.pictures = [], [], [], []
        self.feed(html)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.pictures.append((dict(attrs)["alt"], dict(attrs)["src"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data")


@pytest.fixture
def run(tmp_path, dataset):
    return make_run(tmp_path / "a run", dataset)


def read(run, dataset) -> Page:
    return Page(write_report(run, dataset).read_text(encoding="utf-8"))


def test_report_needs_nothing_but_itself(run, dataset):
    html = write_report(run, dataset).read_text(encoding="utf-8")
    page = Page(html)
    assert "url(" not in html
    assert "@import" not in html
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object")
        assert tag != "script" or not attributes
        assert attributes.get("src", "data:").startswith("data:image/webp;base64,") or tag != "img"
        assert not {"href", "srcset", "xlink:href"} & attributes.keys()
    assert len(html) < 8e6


def test_report_says_what_was_measured(run, dataset):
    page = read(run, dataset)
    recorded = [Measurement.from_dict(m) for m in json.loads((run / "metrics.json").read_text())["measurements"]]
    fixed, oracle, mask, segmentation = (percent(m.miou) for m in recorded)
    assert f"seed seed: training images with masks 8 no 0.15, fixed {fixed} none" in page.text
    assert f"seed oracle seed: training images with masks 8 no {recorded[1].threshold:g}, oracle {oracle}" in page.text
    assert f"mask seed: training images with masks 8 no - {mask}" in page.text
    assert f"segmentation val: validation images 4 no - {segmentation}" in page.text
    assert "upper bound, not a result" in page.text
    assert f"{oracle} at {recorded[1].threshold:g} (oracle: searched on the ground truth of this split)" in page.text
    assert "1 min 45 s in all" in page.text
    assert "1,024 MB" in page.text


def test_report_lists_every_class_with_precision_and_recall(run, dataset):
    page = read(run, dataset)
    mask = Measurement.from_dict(json.loads((run / "metrics.json").read_text())["measurements"][2])
    for name in ("background", "cat", "cow & calf"):
        expected = f"{percent(mask.iou[name])} P {percent(mask.precision[name])} · R {percent(mask.recall[name])}"
        assert expected in page.text


def test_report_shows_each_image_with_cam_mask_truth_and_errors(run, dataset):
    page = read(run, dataset)
    captions = [alt for alt, _ in page.pictures if alt.endswith("of photo 00")]
    assert captions == [
        "photograph of photo 00",
        "CAM: cat of photo 00",
        "pseudo mask of photo 00",
        "ground truth of photo 00",
        "errors of the pseudo mask of photo 00",
    ]
    assert {alt[-8:] for alt, _ in page.pictures} == {f"photo {n:02d}" for n in range(12)}
    assert "errors of the segmentation of photo 09" in {alt for alt, _ in page.pictures}


def test_report_shows_the_cam_of_each_class(run, dataset):
    height, width = dataset.size("photo 00")
    cam = np.zeros((2, height, width), np.float16)
    cam[0, :, :20], cam[1, :, 40:] = 1, 1
    save_arrays(run / "cam" / "photo 00.npz", keys=np.array([1, 2]), cam=cam)
    pictures = dict(read(run, dataset).pictures)
    assert [alt for alt in pictures if alt.startswith("CAM") and alt.endswith("photo 00")] == [
        "CAM: strongest of all of photo 00",
        "CAM: cat of photo 00",
        "CAM: cow & calf of photo 00",
    ]
    assert len({source for alt, source in pictures.items() if alt.startswith("CAM") and "photo 00" in alt}) == 3


def test_report_sorts_cards_by_the_iou_they_show(run, dataset):
    page = read(run, dataset)
    shown = dict(re.findall(r"(photo \d\d) \w+, ([\d.]+)", page.text))
    cards = [attributes["data-iou"] for _, attributes in page.tags if attributes.get("class") == "card"]
    assert len(cards) == 12
    assert sorted(f"{float(iou):.1f}" for iou in cards) == sorted(shown.values())
    lists = {attributes["id"] for _, attributes in page.tags if attributes.get("id", "").startswith("cards-")}
    bars = [attributes for _, attributes in page.tags if attributes.get("class") == "sort"]
    assert [bar["data-of"] for bar in bars] == ["cards-1", "cards-2"]
    assert {bar["data-of"] for bar in bars} == lists
    assert all("hidden" in bar for bar in bars)  # until the script runs


def test_report_marks_the_chosen_threshold_and_the_oracle(run, dataset):
    metrics = json.loads((run / "metrics.json").read_text())
    cue = {**metrics["measurements"][0], "what": "saliency", "threshold": 0.5}  # of another curve, which is not kept
    (run / "metrics.json").write_text(json.dumps({**metrics, "measurements": [*metrics["measurements"], cue]}))
    page = read(run, dataset)
    fixed, oracle = json.loads((run / "metrics.json").read_text())["measurements"][:2]
    assert f"chosen {fixed['threshold']:g}" in page.text
    assert f"oracle {oracle['threshold']:g}" in page.text
    marks = [attributes["class"] for tag, attributes in page.tags if tag == "circle"]
    assert marks == ["mark", "mark oracle"]
    poles = {a["class"]: float(a["x1"]) for tag, a in page.tags if tag == "line" and "pole" in a["class"]}
    assert (poles["pole"] < poles["pole oracle"]) == (fixed["threshold"] < oracle["threshold"])


def test_report_ranks_images_by_their_own_iou(run, dataset):
    page = read(run, dataset)
    notes = dict(re.findall(r"(photo \d\d) (best|median|worst|random), ", page.text))
    assert notes["photo 09"] == "worst"  # the one with the wrong class
    scores = {kind: float(x) for kind, x in re.findall(r"photo (?:08|09|10|11) (\w+), ([\d.]+)", page.text)}
    assert scores["worst"] < scores["best"]


def test_report_is_the_same_every_time(run, dataset):
    assert write_report(run, dataset).read_bytes() == write_report(run, dataset).read_bytes()


def test_report_escapes_names(tmp_path):
    dataset = make_dataset(tmp_path / "data", classes=("<b>cat</b>", "cow"))
    page = read(make_run(tmp_path / "run", dataset), dataset)
    assert "<b>cat</b>" in page.text
    assert "b" not in page.open


def test_report_without_ground_truth(tmp_path):
    dataset = make_dataset(tmp_path / "data", masks=False)
    page = read(make_run(tmp_path / "run", dataset), dataset)
    assert "Nothing was measured" in page.text
    captions = {alt.rsplit(" of ", 1)[0] for alt, _ in page.pictures}
    assert captions == {"photograph", "CAM: cat", "CAM: cow & calf", "pseudo mask", "segmentation"}


def test_report_of_a_run_that_has_only_begun(tmp_path, dataset):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"recipe": "toy", "stages": {}, "measurements": []}))
    page = read(folder, dataset)
    assert page.pictures == []
    assert "Nothing was measured." in page.text
    assert ("svg", {}) not in page.tags


def test_report_of_a_run_that_stopped_after_the_cams(run, dataset):
    for kind in ("mask", "segmentation"):
        for file in (run / kind).iterdir():
            file.unlink()
    captions = {alt.rsplit(" of ", 1)[0] for alt, _ in read(run, dataset).pictures}
    assert captions == {"photograph", "CAM: cat", "CAM: cow & calf", "ground truth"}


def test_report_says_how_many_pixels_are_unsure(run, dataset):
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["measurements"][2]["unsure"] = 12.34
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert "12.3 %, counted as wrong" in read(run, dataset).text


def test_report_shows_the_precision_of_instances_where_it_was_measured(run, dataset):
    assert "average precision" not in read(run, dataset).text
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["instances"] = {"ap50": {"mean": 61.23, "images": 3, "cow & calf": 61.23}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert "IoU above 0.5 3 61.2 - 61.2" in read(run, dataset).text


def test_report_says_when_the_run_was_cut_short(run, dataset):
    assert "cut short" not in read(run, dataset).text
    with (run / "config.yaml").open("a") as file:
        file.write("max_steps: 2\n")
    assert "cut short after 2 steps or images" in read(run, dataset).text


def test_report_of_an_undecided_mask(run, dataset):
    name = dataset.train[0]
    save_mask(run / "mask" / f"{name}.png", np.full(dataset.size(name), 255, np.uint8), dataset.palette_index)
    assert "photo 00 worst, 0.0" in read(run, dataset).text


def test_report_says_which_maps_are_damaged(run, dataset):
    file = run / "cam" / "photo 00.npz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"photo 00\.npz: cannot be read"):
        write_report(run, dataset)


def test_report_wants_a_run_directory(tmp_path, dataset):
    with pytest.raises(FileNotFoundError, match=r"expected a run directory with metrics\.json"):
        write_report(tmp_path, dataset)


def test_curves_stay_inside_their_charts(run, dataset):
    charts = re.findall(r'<svg viewBox="0 0 (\d+) (\d+)".*?</svg>', write_report(run, dataset).read_text(), re.DOTALL)
    assert len(charts) == 2  # thresholds of the seed, loss of the classifier
    html = write_report(run, dataset).read_text()
    for width, height, body in re.findall(r'<svg viewBox="0 0 (\d+) (\d+)"(.*?)</svg>', html, re.DOTALL):
        points = [p for line in re.findall(r'points="([^"]+)"', body) for p in line.split()]
        assert len(points) >= 100
        for x, y in (map(float, point.split(",")) for point in points):
            assert 0 <= x <= int(width)
            assert 0 <= y <= int(height)


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e6))
def test_ticks_are_round_and_cover_the_range(low, span):
    ticks = report._ticks(low, low + span)
    steps = np.diff(ticks)
    assert 1 <= len(ticks) <= 8
    assert ticks[0] <= low + 1e-6 * span
    assert ticks[-1] <= low + span * (1 + 1e-6)
    if len(steps):
        np.testing.assert_allclose(steps, steps[0], rtol=1e-3)
        assert low + span - ticks[-1] <= steps[0] * (1 + 1e-3)


def test_a_curve_that_is_0_throughout_has_a_chart():  # such as the loss of labels that are all ignored
    svg = report._chart([report._Line("loss", [(0, 0.0), (9, 0.0)])], "step", "loss")
    assert re.search(r'points="[\d. ,]+"', svg)


def test_no_value_for_a_chart_of_one_number():
    assert report._ticks(3.0, 3.0)[0] <= 3.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.9, "1 h 00 min"),
        (7620, "2 h 07 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.fixture
def toy(tmp_path, monkeypatch):
    return install_toy(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--seed", "3", "--data", "folder:my photos"],
        ["--part.rate", "0.25", "--part.no-deep", "--part.scales", "0.5", "1.0", "1.5"],
        ["--label-file", "tags with spaces.csv", "--out", "some where"],
    ],
)
@pytest.mark.parametrize("preset", ["demo", "tiny"])
def test_repeat_command_gives_the_same_settings(toy, flags, preset):
    wanted = tyro.cli(toy.Config, args=[*flags, "--preset", preset], default=toy.PRESETS[preset])
    stored = yaml.safe_load(yaml.safe_dump({"recipe": "toy", **settings(wanted)}))
    words = shlex.split(repeat_command(stored))
    assert words[:5] == ["python", "-m", "recipes", "run", "toy"]
    assert tyro.cli(toy.Config, args=words[5:], default=toy.PRESETS[preset]) == wanted


def test_repeat_command_names_only_what_differs_from_the_preset(toy):
    config = dataclasses.replace(toy.PRESETS["tiny"], preset="tiny", seed=2, out=Path("runs/toy-tiny-s2"))
    command = repeat_command({"recipe": "toy", **settings(config)})
    assert command == "python -m recipes run toy --preset tiny --seed 2"


def test_repeat_command_of_a_script_names_the_script(toy, tmp_path, monkeypatch):
    script = types.ModuleType("__main__")
    script.Config, script.PRESETS, script.__file__ = toy.Config, toy.PRESETS, str(tmp_path / "my toy.py")
    monkeypatch.setitem(sys.modules, "__main__", script)
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(toy.PRESETS["demo"], data="folder:x")
    command = repeat_command({"recipe": "toy", **settings(config)})
    assert command == "python 'my toy.py' --preset demo --data folder:x"


def test_report_names_the_paper_and_the_command(toy, run, dataset):
    page = read(run, dataset)
    assert "Toy: A Paper About <Nothing> (Nobody, 1999)." in page.text
    assert "python -m recipes run toy --preset tiny --data synthetic" in page.text


def opened(folder: Path, dataset, until: str | None = None) -> Run:
    """The finished run, as a recipe that goes on with it has it."""
    fabric = Fabric(accelerator="cpu", devices=1)
    again = Run("toy", RunConfig(out=folder, until=until), fabric, dataset, folder)
    again.console = Console(width=200, file=io.StringIO())
    return again


def test_a_stage_to_stop_after_that_never_came_is_told(run, dataset):
    again, told = opened(run, dataset, until="instances"), "--until instances: these settings have no such stage"
    finish(again)
    assert told in again.console.file.getvalue()
    again = opened(run, dataset, until="instances")
    with pytest.raises(StoppedEarly), again.stage("instances", "Instances"):
        pass
    finish(again)
    assert told not in again.console.file.getvalue()


def test_finish_writes_the_report_and_prints_the_table(run, dataset):
    again = opened(run, dataset)
    assert finish(again)["machine"]["torch"] == torch.__version__.split("+")[0]
    told = again.console.file.getvalue()
    assert "segmentation" in told
    assert f"report: {run / 'report.html'}" in told
    assert (run / "report.html").is_file()
