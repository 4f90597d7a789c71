"""Files of tags."""

from pathlib import Path

import numpy as np
import pytest

from recipes.pipeline.data import load_dataset
from recipes.pipeline.data.tags import read_tags
from recipes.pipeline.data.voc import VOC_CLASSES


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name,tags\na,cat dog\nb,\nc,dog\n", {"a": ("cat", "dog"), "b": (), "c": ("dog",)}),
        ("file,tags\na,traffic light;cat\nb,cat\n", {"a": ("cat", "traffic light"), "b": ("cat",)}),
        ("image,tag\na,cat|dog\n", {"a": ("cat", "dog")}),
        ("name,tag,tag\na,traffic light,cat\nb,cat\n", {"a": ("cat", "traffic light"), "b": ("cat",)}),
        ("\ufeffName,dog,cat\r\na,1,0\r\nb,1,1\r\n", {"a": ("dog",), "b": ("dog", "cat")}),
        ('name,tags\n"a, b",cat\n', {"a, b": ("cat",)}),
        ("name,tag,tag\na,traffic light,\nb,,cat\n", {"a": ("traffic light",), "b": ("cat",)}),
        ("name,tags,\na,cat dog,\nb,cat,\n", {"a": ("cat", "dog"), "b": ("cat",)}),
        ("name,tags\na,cat,dog\nb,cat\n", {"a": ("cat", "dog"), "b": ("cat",)}),
        ("name,dog,cat\na,1.0,0.0\nb,,1.0\n", {"a": ("dog",), "b": ("cat",)}),
        ("name,dog,cat\na,True,False\nb,true,TRUE\n", {"a": ("dog",), "b": ("dog", "cat")}),
    ],
    ids=[
        *("spaces", "semicolons", "bars", "cells", "table", "quoted"),
        *("one a cell", "comma at the end", "more cells than headers", "table of floats", "table of words"),
    ],
)
def test_csv_tags_are_read(tmp_path: Path, text: str, expected: dict[str, tuple[str, ...]]) -> None:
    path = tmp_path / "tags.csv"
    path.write_text(text, encoding="utf-8")
    tags = read_tags(path)
    assert {name: tuple(tags.classes[i - 1] for i in indices) for name, indices in tags.of.items()} == expected


def test_class_order_is_the_columns_or_the_alphabet(tmp_path: Path) -> None:
    path = tmp_path / "tags.csv"
    path.write_text("name,dog,cat\na,1,0\n")
    assert read_tags(path).classes == ("dog", "cat")
    path.write_text("name,tags\na,dog\nb,cat\n")
    assert read_tags(path).classes == ("cat", "dog")


def test_json_and_npz_tags_agree_with_csv(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("name,cat,dog\na,1,1\nb,0,1\n")
    (tmp_path / "t.json").write_text('{"a": ["dog", "cat"], "b": ["dog"]}')
    (tmp_path / "i.json").write_text('{"classes": ["cat", "dog"], "labels": {"a": [0, 1], "b": {"tags": [1]}}}')
    labels = np.array([[1, 1], [0, 1]], dtype=np.uint8)
    np.savez(tmp_path / "t.npz", names=np.array(["a", "b"]), labels=labels, classes=np.array(["cat", "dog"]))
    expected = read_tags(tmp_path / "t.csv")
    for name in ("t.json", "i.json", "t.npz"):
        assert read_tags(tmp_path / name) == expected


def test_npz_columns_follow_the_data_set(real_voc: Path, tmp_path: Path) -> None:
    labels = np.zeros((3, 20), dtype=np.uint8)
    labels[[0, 1, 2], [7, 11, 8]] = 1
    np.savez(tmp_path / "cls_labels.npz", names=np.array(["a", "b", "c"]), labels=labels)
    data = load_dataset(f"voc:{real_voc}", labels=tmp_path / "cls_labels.npz", classes="cat,dog,chair")
    assert [data.labels(name).tolist() for name in "abc"] == np.eye(3).tolist()
    assert data.labels("v").tolist() == [1, 0, 0]
    assert any("val whose tags were read off their masks, if they have any: 1." in note for note in data.notes)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("t.csv", "", r"t.csv is empty; expected a header name,tags"),
        ("t.csv", "name,tags\n", r"t.csv has a header and no image"),
        ("t.csv", "a.jpg,cat\n", r"must begin with a header: .* its first line is 'a.jpg,cat'"),
        ("t.csv", "name\na\n", r"must begin with a header"),
        ("t.csv", "name,tags\na,\nb,\n", r"no image has a tag"),
        ("t.csv", "name,cat,dog\na,0.0,False\n", r"no image has a tag"),
        ("t.csv", "name,tags\na,cat\na,dog\n", r"1 name: a given more than once"),
        ("t.csv", "name,cat,dog\na,1,0\nb,1\n", r"1 row: b without 3 cells"),
        ("t.csv", "name,cat,dog\na,1,-1\nb,0,1\n", r"expected 0 or 1 in each cell of a table, got '-1'"),
        ("t.csv", "name,cat,dog\na,1,2\nb,0,1\n", r"expected 0 or 1 in each cell of a table, got '2'"),
        ("t.csv", "name,cat,\na,1,0\n", r"a column of the table has no name: 'name,cat,'"),
        ("t.json", '{"a": ["cat"], "a": ["dog"]}', r"t.json: 1 name: a given more than once"),
        ("t.json", "{", r"t.json is not JSON"),
        ("t.json", "[]", r'expected \{"a": \["cat", \.\.\.\]\} .*, got a list'),
        ("t.json", '{"classes": [], "labels": {"a": [1]}}', r't.json: expected the names .* as "classes", got \[\]'),
        ("t.json", '{"classes": [1, 2], "labels": {"a": [1]}}', r'as "classes", got \[1, 2\]'),
        ("t.json", '{"a": "cat"}', r"the entry of 'a' is not a list"),
        ("t.json", '{"classes": ["cat"], "labels": {"a": [1]}}', r"tag 1 of 'a' is not a class name or an index"),
        ("t.npy", "", r"is a pickle, which can run code .* np.savez\('x.npz'"),
        ("t.npz", "zip", r"t.npz cannot be read as plain arrays"),
        ("t.xlsx", "", r"expected a .csv, .json or .npz file"),
    ],
)
def test_malformed_tags_are_explained(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_tags(tmp_path / file)


def test_unknown_tags_and_wrong_arrays_are_explained(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("name,tags\na,hose\n")
    with pytest.raises(ValueError, match=r"1 unknown tag: 'hose' of a; did you mean 'horse'\?"):
        read_tags(tmp_path / "t.csv", VOC_CLASSES)
    with pytest.raises(ValueError, match=r"labels: no file .*t.cvs; did you mean 't.csv'\?"):
        read_tags(tmp_path / "t.cvs")
    np.savez(tmp_path / "t.npz", names=np.array(["a"]), labels=np.ones((1, 3)))
    with pytest.raises(ValueError, match=r"expected labels of shape \(1, 20\), got \(1, 3\)"):
        read_tags(tmp_path / "t.npz", VOC_CLASSES)
    with pytest.raises(ValueError, match=r'no array "classes" to name the columns'):
        read_tags(tmp_path / "t.npz")
    np.savez(tmp_path / "t.npz", labels=np.ones((1, 3)))
    with pytest.raises(ValueError, match=r'expected arrays "names" and "labels", found \[\'labels\'\]'):
        read_tags(tmp_path / "t.npz")
