"""Files of a run that were cut short, changed or replaced by a pickle are told by name, and no pickle is ever run."""

from __future__ import annotations

import ast
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from recipes.pipeline.data.tags import read_tags
from recipes.pipeline.files import load_arrays, load_mask, load_tensors, save_arrays, save_mask
from recipes.pipeline.models import load_weights
from recipes.pipeline.pretrained import from_pretrained
from recipes.pipeline.run import RunConfig, start
from recipes.pipeline.saliency import saliency_source
from tests.recipes.test_training import make_run, train

ROOT = Path(__file__).parents[2]
PALETTE = (0, 8, 20)


def write_arrays(path: Path) -> None:
    save_arrays(path, keys=np.array([1, 2]), cam=np.random.default_rng(0).random((2, 30, 40)))


def write_mask(path: Path) -> None:
    save_mask(path, np.random.default_rng(0).integers(0, 3, (30, 40)).astype(np.uint8), PALETTE)


def write_tensors(path: Path) -> None:
    torch.save({"model": {"weight": torch.rand(30, 40)}, "step": 3}, path)


FILES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "cam.npz": (write_arrays, load_arrays),
    "mask.png": (write_mask, lambda path: load_mask(path, PALETTE)),
    "checkpoint.pt": (write_tensors, load_tensors),
}
each_file = pytest.mark.parametrize("name", FILES)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return bool(np.array_equal(a, b))


def read_or_told(name: str, path: Path) -> Any:
    """The content of a file, or the message that it can't be read."""
    try:
        return FILES[name][1](path)
    except ValueError as error:
        return str(error)


@each_file
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_told_or_still_whole(name: str, share: float, tmp_path: Path) -> None:
    file = tmp_path / name
    FILES[name][0](file)
    whole = read_or_told(name, file)
    os.truncate(file, int(share * file.stat().st_size))
    found = read_or_told(name, file)
    if share < 0.999 or isinstance(found, str):
        assert found.startswith(f"{file}: cannot be read (")
        assert found.endswith("Remove it, and the same command makes it anew")
    else:
        assert equal(found, whole)


@pytest.mark.parametrize("name", ["cam.npz", "mask.png"])  # torch does not look at the check sums of its files
@pytest.mark.parametrize("seed", range(4))
def test_changed_bytes_are_told_or_do_not_matter(name: str, seed: int, tmp_path: Path) -> None:
    file = tmp_path / name
    FILES[name][0](file)
    whole, content = read_or_told(name, file), bytearray(file.read_bytes())
    draw = np.random.default_rng(seed)
    for place in draw.integers(0, len(content), 8):
        content[place] ^= 1 << int(draw.integers(8))
    file.write_bytes(content)
    found = read_or_told(name, file)
    assert "cannot be read" in found if isinstance(found, str) else equal(found, whole)


class Bomb:
    """Leaves a trace if it is ever unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def plant(path: Path, kind: str) -> Path:
    """A pickle at ``path`` in the guise of ``kind``; the trace that it would leave."""
    trace = path.with_name("the bomb went off")
    bomb = Bomb(trace)
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"model": bomb}, protocol=2))
    elif kind == "torch":
        torch.save({"model": bomb}, path)
    else:
        with path.open("wb") as file:
            np.savez(file, keys=np.array([bomb]), cam=np.array([bomb]), names=np.array([bomb]), labels=np.array([bomb]))
    pickle.loads(pickle.dumps(bomb))
    assert trace.exists(), "the bomb works"
    trace.unlink()
    return trace


@pytest.mark.parametrize("kind", ["pickle", "torch", "arrays"])
@each_file
def test_no_output_of_a_run_can_smuggle_a_pickle_in(name: str, kind: str, tmp_path: Path) -> None:
    trace = plant(tmp_path / name, kind)
    with pytest.raises(ValueError, match="cannot be read"):
        FILES[name][1](tmp_path / name)
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["pickle", "torch", "arrays"])
def test_no_input_can_smuggle_a_pickle_in(kind: str, whole_voc: Path, tmp_path: Path) -> None:
    weights, tags, model = tmp_path / "weights.pt", tmp_path / "tags.npz", tmp_path / "model"
    traces = [plant(path, kind) for path in (weights, tags)]
    with pytest.raises(ValueError, match=r"weights\.pt: cannot be read .* Expected a state dict"):
        load_weights(nn.Linear(2, 2), "linear", str(weights))
    with pytest.raises(ValueError, match=r"tags\.npz(: expected arrays| cannot be read as plain arrays)"):
        read_tags(tags)
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"network": {}, "classes": ["cat"], "palette_index": [0, 8]}))
    traces.append(plant(model / "model.safetensors", kind))
    with pytest.raises(ValueError, match=r"model\.safetensors: not the weights of this network"):
        from_pretrained(model)
    saliency = tmp_path / "saliency"
    saliency.mkdir()
    run = start("cam", RunConfig(data=f"voc:{whole_voc}", out=tmp_path / "run", accelerator="cpu"))
    traces += [plant(saliency / f"{name}.npz", kind) for name in run.train]
    with pytest.raises(ValueError, match="broken map"):
        saliency_source(run, str(saliency))
    assert not any(trace.exists() for trace in traces)


def test_no_code_of_ours_loads_a_pickle() -> None:
    for file in (
        file for package in ("recipes", "wsss_losses", "wsss_modules") for file in ROOT.glob(f"{package}/**/*.py")
    ):
        source = file.read_text()
        tree = ast.walk(ast.parse(source if "load" in source else ""))
        for call in (node for node in tree if isinstance(node, ast.Call)):
            called, options = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert called not in ("pickle.load", "pickle.loads", "np.lib.format.open_memmap", "yaml.load"), file
            assert called != "torch.load" or options.get("weights_only") == "True", f"{file}:{call.lineno}"
            assert called != "np.load" or options.get("allow_pickle", "False") == "False", f"{file}:{call.lineno}"


@pytest.mark.parametrize("stage", ["points", "points.partial"])
def test_a_damaged_checkpoint_stops_the_run_and_is_not_replaced(stage: str, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    whole = train(run)
    file = run.path("checkpoints", f"{stage}.pt")
    if stage != "points":
        run.path("checkpoints", "points.pt").unlink()
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=rf"{stage}\.pt: cannot be read .* Remove it"):
        train(run)
    assert file.read_bytes() == b"PK\x03\x04"
    file.unlink()
    again = train(run)
    assert all(torch.equal(again[key], whole[key]) for key in whole)


def test_a_checkpoint_of_another_network_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.path("checkpoints").mkdir()
    torch.save({"model": nn.Linear(3, 3).state_dict()}, run.path("checkpoints", "points.pt"))
    with pytest.raises(ValueError, match=r"points\.pt: cannot be read \(Error\(s\) in loading state_dict"):
        train(run)


def test_damaged_metrics_and_settings_are_told(whole_voc: Path, tmp_path: Path) -> None:
    config = RunConfig(data=f"voc:{whole_voc}", out=tmp_path, accelerator="cpu")
    run = start("cam", config)
    run.record(stages={"classify": {"seconds": 1.0}})
    file = tmp_path / "metrics.json"
    file.write_text(file.read_text()[:-5])
    with pytest.raises(ValueError, match=r"metrics\.json: cannot be read"):
        run.record(stages={})
    for damage in ("recipe: [", "", "only text"):
        (tmp_path / "config.yaml").write_text(damage)
        with pytest.raises(ValueError, match=r"config\.yaml: cannot be read"):
            start("cam", config)
