"""docs/results.md and what writes it."""

import json
import shutil

import pytest

from docs import make_results
from tests.recipes.synthetic import make_dataset, make_run


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A copy of the records and of the README, and a page of their own."""
    shutil.copytree(make_results.RECORDS, tmp_path / "data")
    shutil.copy(make_results.README, tmp_path / "README.md")
    (tmp_path / "images").mkdir()
    monkeypatch.setattr(make_results, "README", tmp_path / "README.md")
    monkeypatch.setattr(make_results, "HERE", tmp_path)
    monkeypatch.setattr(make_results, "RECORDS", tmp_path / "data")
    return tmp_path


def test_the_page_is_what_its_records_give(elsewhere):
    page = make_results.HERE / "results.md"
    make_results.main([])
    kept = (make_results.Path(make_results.__file__).parent / "results.md").read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8") == kept, "run python docs/make_results.py"
    readme = (make_results.Path(make_results.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert (elsewhere / "README.md").read_text(encoding="utf-8") == readme, "run python docs/make_results.py"
    assert "| [cam](recipes/cam.py) | " in readme.split("<!-- figures")[1]
    for picture in (elsewhere / "images").iterdir():
        assert f"](images/{picture.name})" in kept


def test_every_system_has_a_row_on_both_data_sets(elsewhere):
    make_results.main([])
    text = (elsewhere / "results.md").read_text(encoding="utf-8")
    for part in text.split("### All systems")[1:]:
        table = part.split("![")[0]
        assert all(f"\n| {name} |" in table for name in make_results.discover())
    assert text.count("### All systems") == 2


@pytest.mark.parametrize("part", ["On photographs", "On the demo data"])
def test_what_ends_below_the_plain_cam_is_told_and_why(part):
    page = (make_results.HERE / "results.md").read_text(encoding="utf-8")
    section = page.split(f"## {part}\n")[1].split("\n## ")[0]
    table = section.split("### All systems")[1].split("![")[0]
    remarks = section.split("### Remarks")[1].split("\n### ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    for name, _, *figures in rows[1:]:
        measured = [figure for figure in figures if figure != "-"]
        if measured and "(-" in measured[-1]:
            assert f"`{name}`" in remarks, f"{name} ends below cam: {measured[-1]}"


@pytest.mark.parametrize(("data", "part", "told"), [("voc:/home/x", "runs", "voc:PATH"), ("demo", "demo", "demo")])
def test_a_record_has_no_places_of_a_machine(elsewhere, tmp_path, data, part, told):
    run = make_run(tmp_path / "toy", make_dataset(tmp_path / "photographs"))
    metrics = json.loads((run / "metrics.json").read_text())
    config = {"recipe": "toy", "preset": "tiny", "seed": 0, "data": data, "saliency": "/home/x/c2am-s0", "out": "/y"}
    (run / "metrics.json").write_text(json.dumps({**metrics, "data": data, "reused": "/home/x/cam"}))
    (run / "config.yaml").write_text(json.dumps(config))
    make_results.main([tmp_path / "toy"])
    text = (elsewhere / "data" / part / "toy-s0.json").read_text()
    assert "/home" not in text
    record = json.loads(text)
    assert (record["data"], record["reused"]) == (told, "cam-s0")
    runs = "runs/demo" if part == "demo" else "runs"
    assert record["command"].endswith(f" --saliency {runs}/c2am-s0 --out {runs}/toy-s0")
    assert "| toy | 0 |" in (elsewhere / "results.md").read_text()
