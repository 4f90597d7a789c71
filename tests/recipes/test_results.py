"""Tables and plots of many runs, on invented metrics: no training, no torch."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

from recipes.pipeline.evaluation import FIXED, ORACLE, Measurement
from recipes.pipeline.plots import Spread, bars, scatter
from recipes.pipeline.results import Results, markdown, page, record_of, supervision, table_csv, told
from recipes.pipeline.tables import Comparison, bracketed


def measurement(what: str, miou: float, split: str = "seed", **changes) -> dict:
    names = ("background", "cat", "dog")
    values = {
        "what": what,
        "split": split,
        "images": 8,
        "threshold": 0.25 if what == "seed" else None,
        "threshold_from": FIXED if what == "seed" else "",
        "miou": miou,
        "iou": dict(zip(names, (miou + 10, miou, miou - 10), strict=True)),
        "precision": dict.fromkeys(names, 50.0),
        "recall": dict.fromkeys(names, 70.0),
    }
    return Measurement(**{**values, **changes}).to_dict()


def metrics(recipe: str, seed: int, seeds: float, masks: float | None = None, **changes) -> dict:
    return {
        "recipe": recipe,
        "preset": "demo",
        "seed": seed,
        "data": "demo",
        "classes": ["cat", "dog"],
        "stages": {"classify": {"seconds": 60.0, "cpu_seconds": 30.0, "peak_mb": 1500.0}},
        "measurements": [measurement("seed", seeds), *([] if masks is None else [measurement("mask", masks)])],
        "machine": {"torch": "2"},
        **changes,
    }


RUNS = {
    "cam-s0": metrics("cam", 0, 40.0, 40.0),
    "cam-s1": metrics("cam", 1, 44.0, 44.0),
    "recam-s0": metrics("recam", 0, 45.0, 60.0, reused="cam-s0"),
    "recam-s1": metrics("recam", 1, 47.0, 66.0, reused="somewhere/cam-s1"),
    "aeft-s1": metrics("aeft", 1, 43.0),
}


def rows(results: Results, number: int) -> dict[str, tuple[str, ...]]:
    return {row[0]: row[1:] for row in results.overview()[number].rows}


def test_means_over_seeds_stand_beside_the_plain_cam_of_the_same_seed() -> None:
    table = rows(Results(RUNS), 0)
    assert table["cam"][:3] == ("0, 1", "42.0 ± 2.8", "42.0 ± 2.8")
    assert table["recam"][:3] == ("0, 1", "46.0 ± 1.4 (+4.0)", "63.0 ± 4.2 (+21.0)")
    assert table["aeft"] == ("1", "43.0 (-1.0)", "-", "-", "-")


def test_what_was_not_run_has_a_row_that_says_so() -> None:
    results = Results(RUNS, ["cam", "irn", "recam"], {"irn-s0": "ValueError: no | such file"})
    assert list(rows(results, 0)) == ["cam", "irn", "aeft", "recam"]
    assert rows(results, 0)["irn"] == ("not run", "-", "-", "-", "-")
    assert "irn" not in rows(results, 1)
    text = "\n".join(markdown(results))
    assert "| irn | not run | - | - | - | - |" in text
    assert "- irn-s0 failed: ValueError: no | such file" in text
    assert "irn-s0 failed: ValueError: no | such file" in page(results, "Demo")


def test_precision_and_recall_are_means_over_the_classes_that_have_one() -> None:
    assert rows(Results(RUNS), 1)["recam"][:2] == ("50.0 ± 0.0 / 70.0 ± 0.0",) * 2
    found = Measurement.from_dict(
        measurement("mask", 1.0, precision={"background": 80.0, "cat": math.nan, "dog": 60.0})
    )
    assert (found.mean_precision, found.mean_recall) == (70.0, 70.0)
    nothing = Measurement.from_dict(measurement("mask", 1.0, precision={}, recall={}))
    assert math.isnan(nothing.mean_precision)
    old = {"cam-s0": metrics("cam", 0, 40.0, measurements=[measurement("seed", 40.0, precision={}, recall={})])}
    assert rows(Results(old), 1)["cam"][0] == "-"


def test_costs_are_means_and_memory_the_largest() -> None:
    slow = {"classify": {"seconds": 120.0, "peak_mb": 2500.0}}
    table = rows(Results({**RUNS, "cam-s2": metrics("cam", 2, 41.0, stages=slow)}), 2)
    assert table["cam"] == ("-", "-", "1 min 20 s", "-", "2.5 GB")
    assert table["recam"] == ("-", "-", "1 min 00 s", "30.0 s", "1.5 GB")


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ({"a/cam-s0": RUNS["cam-s0"], "b/cam-s0-t2": metrics("cam", 0, 10.0)}, 5.0),
        ({"a/cam-s0": metrics("cam", 0, 0.0, measurements=[]), "b/cam-s0-t2": metrics("cam", 0, 10.0)}, 35.0),
        ({"a/cam-s0": metrics("cam", 0, 10.0), "b/cam-s0-t2": metrics("cam", 0, 40.0, reused="recam-s0")}, 35.0),
        ({"a/cam-c0": metrics("cam", 0, 10.0), "b/cam-s0-t2": metrics("cam", 0, 40.0, reused="x/recam-s0")}, 5.0),
        ({"cam-s1": RUNS["cam-s1"]}, math.nan),
    ],
    ids=[
        "the one it reuses",
        "the other where that has not measured it",
        "the one it reuses rather than one that reuses it",
        "one that reuses it",
        "another seed",
    ],
)
def test_a_run_is_compared_with(runs: dict, expected: float) -> None:
    comparison = Comparison({**runs, "recam-s0": RUNS["recam-s0"]})
    assert comparison.difference("recam-s0", ("seed", "seed")) == pytest.approx(expected, nan_ok=True)


def test_the_plain_cam_is_compared_with_nothing() -> None:
    assert math.isnan(Comparison(RUNS).difference("cam-s0", ("seed", "seed")))


@pytest.mark.parametrize(("value", "text"), [(1.26, " (+1.3)"), (-0.04, " (+0.0)"), (-2.0, " (-2.0)"), (math.nan, "")])
def test_differences_have_a_sign(value: float, text: str) -> None:
    assert bracketed(value) == text


def test_an_oracle_stands_in_brackets_and_nowhere_else() -> None:
    oracle = measurement("seed", 48.0, threshold=0.3, threshold_from=ORACLE)
    run = metrics("cam", 0, 40.0, measurements=[measurement("seed", 40.0), oracle])
    results = Results({"cam-s0": run})
    assert results.each_run().rows[0][:2] == ("cam-s0", "40.0 (48.0 at 0.3)")
    assert rows(results, 0)["cam"][1] == "40.0"


def test_what_single_systems_measure_has_a_table_of_its_own() -> None:
    def student(seed: int, miou: float) -> dict:
        return metrics("reviewkd", seed, 40.0, measurements=[measurement("student alone", miou, split="val")])

    boxes = [
        metrics("bbam", seed, 50.0, instances={"ap50": {"mean": mean, "images": 7, "cat": mean}})
        for seed, mean in ((0, 60.0), (1, 62.0))
    ]
    runs = {"bbam-s0": boxes[0], "bbam-s1": boxes[1], "reviewkd-s0": student(0, 35.0), "reviewkd-s1": student(1, 37.0)}
    table = Results({**RUNS, **runs}).rest()
    assert table is not None
    assert table.rows == [
        ("bbam", "instances", "AP at 0.5", "7 val", "61.0 ± 1.4"),
        ("reviewkd", "student alone", "mIoU", "8 val", "36.0 ± 1.4"),
    ]
    assert Results(RUNS).rest() is None


def test_classes_are_means_over_the_runs() -> None:
    grid = next(iter(Results(RUNS).classes()))
    assert grid.title == "IoU per class: seed, 8 train images"
    assert grid.rows[0] == ("cam", "42.0", "52.0", "42.0", "32.0")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"preset": "small"}, "preset of most: demo; small: aeft-s1"),
        ({"backbones": ["mit_b1"]}, "backbones of most: lite; mit_b1: aeft-s1"),
        (
            {"settings": {"segment": {"crop": 128, "schedule": {"epochs": 8}}}},
            "the segmentation network of aeft-s1 is not that of cam: schedule.epochs 8",
        ),
        ({"settings": {"max_steps": 2}}, "max_steps of most: None; 2: aeft-s1"),
    ],
    ids=["preset", "backbone", "budget", "cut short"],
)
def test_it_says_what_is_not_alike(changes: dict, sentence: str) -> None:
    alike = {
        "backbones": ["lite"],
        "settings": {"max_steps": None, "segment": {"crop": 128, "schedule": {"epochs": 6}}},
    }
    runs = {name: {**run, **alike} for name, run in RUNS.items()}
    assert Results(runs).unfair() == []
    runs["aeft-s1"] |= changes
    assert Results(runs).unfair() == [sentence]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "tags"),
        ({"saliency": {"encoder": "x"}}, "tags"),
        ({"saliency": "none"}, "tags"),
        ({"saliency": None}, "tags, saliency"),
        ({"saliency": "runs/c2am-s0"}, "tags, saliency of c2am"),
        ({"saliency": None, "variant": "seam"}, "tags"),
        ({"boxes": "annotations"}, "tags, boxes"),
        ({"boxes": "components_of_masks"}, "tags, boxes made from masks"),
        ({"outside": None}, "tags, images without objects"),
        ({"critic": {}}, "tags, image-text pairs"),
    ],
)
def test_supervision_is_read_off_the_settings(config: dict, expected: str) -> None:
    assert supervision(config) == expected


def test_a_record_is_what_the_tables_need(tmp_path: Path) -> None:
    run = metrics("rw", 0, 40.0, reused="/some/where/cam-s0", polarity={"inverted": True})
    run["stages"]["segment"] = {"seconds": 60.0, "peak_mb": 1500.0}
    run["measurements"].append(measurement("seed", 41.0, threshold_from=ORACLE, curve=((0.1, 30.0), (0.2, 41.0))))
    config = {
        "recipe": "rw",
        "max_steps": None,
        "classify": {"backbone": "lite", "schedule": {"epochs": 5}},
        "affinity": {"backbone": "lite", "schedule": {"epochs": 3}},
        "segment": {"encoder": "big", "schedule": {"epochs": 6}},
        "student": {"network": {"encoder": "small"}},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(run))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for name, steps in (("classify", 75), ("affinity", 90)):
        for file in (tmp_path / "checkpoints" / f"{name}.pt", tmp_path / "curves" / f"{name}.jsonl"):
            file.parent.mkdir(exist_ok=True)
            file.write_text(f'{{"step": 0, "steps": {steps}}}\n{{"step": {steps - 1}, "steps": {steps}}}\n')
        os.utime(tmp_path / "checkpoints" / f"{name}.pt", (steps, steps))
    (tmp_path / "checkpoints" / "segment.partial.pt").write_text("")  # begun, not finished
    (tmp_path / "curves" / "segment.jsonl").write_text('{"step": 0, "steps": 90}\n')
    record = record_of(tmp_path)
    assert record["backbones"] == ["lite"]
    assert record["steps"] == {"classify": 75, "affinity": 90}
    assert record["settings"] == {"classify": config["classify"], "segment": config["segment"], "max_steps": None}
    assert record["reused"] == "cam-s0"
    assert record["until"] is None
    assert "polarity" not in record
    del run["stages"]["segment"]
    (tmp_path / "metrics.json").write_text(json.dumps(run))
    assert "segment" not in record_of(tmp_path)["settings"]
    assert all(m["curve"] == [] for m in record["measurements"])
    assert Results({"rw-s0": record}).overview()[2].rows[0][1:3] == ("tags", "classify 75, affinity 90")


def test_csv_has_a_line_for_each_measurement() -> None:
    found = list(csv.DictReader(io.StringIO(table_csv(Results(RUNS)))))
    assert len(found) == sum(len(run["measurements"]) for run in RUNS.values())
    mask = next(line for line in found if (line["run"], line["what"]) == ("recam-s1", "mask"))
    assert [mask[key] for key in ("miou", "precision", "recall", "difference")] == ["66.0", "50.0", "70.0", "22.0"]
    assert (mask["cpu_seconds"], mask["threshold"]) == ("30.0", "")
    assert next(line for line in found if line["run"] == "cam-s0")["difference"] == ""


def test_the_page_needs_nothing_but_itself_and_escapes() -> None:
    html = page(Results({"<b>": metrics("cam", 0, 40.0, 40.0, command="run <cam>")}), "Title & co")
    assert "<b>" not in html
    assert "Title &amp; co" in html
    assert "run &lt;cam&gt;" in html
    for word in ("url(http", "@import", "<link", "<iframe", "src="):
        assert word not in html
    assert html.count("<script>") == 1
    assert html.count("<svg") == 2


def test_nothing_run_is_a_page_too() -> None:
    results = Results({}, ["cam", "rw"])
    assert results.plots() == {}
    assert "| rw | not run | - | - | - | - |" in markdown(results)
    assert "not run" in page(results, "Demo")


# Plots.


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return [(node.text or "").strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_bars_name_systems_and_series_and_are_the_same_every_time() -> None:
    systems = {"recam": {"seed": Spread(50.0, 1.0), "mask": Spread(60.0)}, "cam": {"seed": Spread(45.0)}}
    svg = bars(systems, "cam")
    assert {"recam", "cam", "seed", "mask", "mIoU, %"} <= set(texts(svg))
    assert svg == bars(systems, "cam")
    wider = bars({**systems, "recam": {"seed": Spread(50.0, 9.0), "mask": Spread(60.0)}}, "cam")
    assert svg != wider


def test_scatter_names_every_point_without_overlap() -> None:
    points = {f"system{i}": (50.0, 60.0 + i / 100) for i in range(5)}
    svg = scatter(points, "system0", "x", "y")
    assert set(points) <= set(texts(svg))
    root = ElementTree.fromstring(svg)
    named = [node for node in root.iter("{http://www.w3.org/2000/svg}text") if (node.text or "").strip() in points]
    heights = sorted(
        float(re.search(r"translate\([\d.]+ ([\d.]+)\)|", n.get("transform", "")).group(1) or n.get("y")) for n in named
    )
    assert min(b - a for a, b in itertools.pairwise(heights)) > 8


@pytest.mark.parametrize(
    ("spread", "text"), [(None, "-"), (Spread(54.44), "54.4"), (Spread(54.44, 0.26), "54.4 ± 0.3")], ids=str
)
def test_spread_as_text(spread: Spread | None, text: str) -> None:
    assert told(spread) == text
