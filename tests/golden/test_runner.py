"""The runner itself: what it must reject."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.golden import conftest
from tests.golden.case import Agreement, Case, GoldenError, Overlap, Within, check, run
from tests.golden.compare import choose_rule, parse_tolerance


def write(
    folder: Path, tensors: dict[str, Tensor], tolerance: str, call: dict | None = None, piece: str = "square"
) -> Path:
    (folder / "toy").mkdir(exist_ok=True)
    path = folder / "toy" / f"{piece}__a.safetensors"
    save_file(tensors, path, {"tolerance": tolerance, "call": json.dumps(call or {})})
    return path


def squares(case: Case) -> dict[str, Tensor]:
    x = case.leaf("in.x")
    y = case.call["gain"] * x**2
    return {"out.y": y, **case.grads({"y": y})}


def toy(folder: Path, **changes: Tensor) -> Path:
    x = torch.tensor([1.0, 2.0, 3.0])
    tensors = {"in.x": x, "cot.y": torch.ones(3), "out.y": 2 * x**2, "grad.in.x": 4 * x}
    return write(folder, tensors | changes, "rtol=1e-5,atol=1e-6", {"gain": 2})


def test_a_right_value_passes(tmp_path: Path) -> None:
    run(toy(tmp_path), {"toy/square": squares})


@pytest.mark.parametrize("key", ["out.y", "grad.in.x"])
def test_a_wrong_value_fails(tmp_path: Path, key: str) -> None:
    wrong = {key: torch.tensor([2.0, 8.0, 18.1])}
    with pytest.raises(GoldenError, match=rf"{key}: \d of 3 values beyond rtol=1e-05, atol=1e-06"):
        run(toy(tmp_path, **wrong), {"toy/square": squares})


def test_a_missing_key_fails(tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match=r"grad\.in\.x: the adapter does not return it"):
        run(toy(tmp_path), {"toy/square": lambda case: {"out.y": 2 * case.inputs["in.x"] ** 2}})


def test_a_wrong_shape_fails(tmp_path: Path) -> None:
    path = toy(tmp_path, **{"out.y": torch.ones(3, 1)})
    with pytest.raises(GoldenError, match=r"out.y: expected shape \(3, 1\), got \(3,\)"):
        run(path, {"toy/square": squares})


def test_a_missing_adapter_fails_and_says_how_to_add_one(tmp_path: Path) -> None:
    with pytest.raises(
        GoldenError, match=r'square__a.safetensors: no adapter. Add to .*toy.py .*@adapter\("toy/square"\)'
    ):
        run(toy(tmp_path), {})


def test_a_file_without_outputs_fails(tmp_path: Path) -> None:
    path = write(tmp_path, {"in.x": torch.ones(1)}, "exact")
    with pytest.raises(GoldenError, match="holds no out"):
        run(path, {"toy/square": lambda case: {}})


@pytest.mark.parametrize("stored", [float("nan"), float("inf")])
def test_where_the_stored_value_is_not_finite_ours_must_be(tmp_path: Path, stored: float) -> None:
    path = write(tmp_path, {"out.y": torch.tensor([1.0, stored])}, "rtol=1e-5")
    run(path, {"toy/square": lambda case: {"out.y": torch.tensor([1.0, 7.0])}})
    for ours, message in [([1.0, float("nan")], "ours must be finite"), ([2.0, 7.0], "1 of 1 values")]:
        with pytest.raises(GoldenError, match=message):
            run(path, {"toy/square": lambda case, ours=ours: {"out.y": torch.tensor(ours)}})


def test_our_nan_is_a_failure(tmp_path: Path) -> None:
    path = write(tmp_path, {"out.y": torch.ones(2)}, "rtol=1e9")
    with pytest.raises(GoldenError, match="1 of 2 values"):
        run(path, {"toy/square": lambda case: {"out.y": torch.tensor([1.0, float("nan")])}})


def test_module_parameters_are_loaded_and_differentiated(tmp_path: Path) -> None:
    weight, x = torch.randn(2, 3).double(), torch.randn(4, 3).double()
    y = x @ weight.T
    stored = {"in.x": x, "param.fc.weight": weight, "out.loss": y.square().sum(), "grad.param.fc.weight": 2 * y.T @ x}
    path = write(tmp_path, stored, "rtol=1e-12")

    def linear(case: Case) -> dict[str, Tensor]:
        layer = case.load(nn.Linear(3, 2, bias=False), rename=lambda name: name.removeprefix("fc."))
        loss = layer(case.inputs["in.x"]).square().sum()
        return {"out.loss": loss, **case.grads(loss)}

    run(path, {"toy/square": linear})
    with pytest.raises(GoldenError, match=r"without a stored value \['bias'\]"):
        Case.read(path).load(nn.Linear(3, 2), rename=lambda name: name.removeprefix("fc."))


def test_every_cotangent_must_be_used(tmp_path: Path) -> None:
    path = toy(tmp_path, **{"cot.z": torch.ones(3)})
    with pytest.raises(GoldenError, match=r"cotangents \['cot.y', 'cot.z'\]"):
        run(path, {"toy/square": squares})


def test_agreement_and_overlap(tmp_path: Path) -> None:
    label = torch.arange(100) % 5
    off = label.clone()
    off[:2] = 9
    case = Case.read(write(tmp_path, {"out.label": label}, "in words"))
    assert check(case, {"out.label": Agreement(off, at_least=0.98)}) == []
    assert check(case, {"out.label": Agreement(off, at_least=0.99)})
    assert check(case, {"out.label": off}), "words can't be read, so a bare tensor is not enough"
    masks = torch.zeros(2, 10, 10, dtype=torch.bool)
    masks[:, :5] = True
    case = Case.read(write(tmp_path, {"out.mask": masks}, "IoU"))
    less = masks.clone()
    less[1, 0, 0] = False
    assert check(case, {"out.mask": Overlap(less, at_least=0.98)}) == []
    assert "mask 1 overlaps by 0.98" in check(case, {"out.mask": Overlap(less, at_least=0.99)})[0]
    case = Case.read(write(tmp_path, {"out.mask": masks[:0]}, "IoU"))
    assert check(case, {"out.mask": Overlap(masks[:0], at_least=0.99)}) == []


FLOAT, BYTE, LONG, BOOL = torch.rand(3), torch.tensor([0, 7], dtype=torch.uint8), torch.arange(3), torch.ones(2).bool()


@pytest.mark.parametrize(
    ("text", "key", "stored", "kind", "numbers"),
    [
        ("rtol=1e-5,atol=1e-6", "out.x", FLOAT, "close", (1e-5, 1e-6)),
        ("rtol=1e-7", "out.x", FLOAT, "close", (1e-7, 0)),
        ("exact", "out.x", FLOAT, "close", (0, 0)),
        ("exact (ties aside)", "out.label", BYTE, "close", (0, 0)),
        ("exact values; grad rtol=1e-5,atol=1e-6", "out.aff", FLOAT, "close", (0, 0)),
        ("exact values; grad rtol=1e-5,atol=1e-6", "grad.in.edge", FLOAT, "close", (1e-5, 1e-6)),
        ("rw: rtol=5e-4,atol=2e-5; label: >=99.9% of pixels equal", "out.rw_stride8", FLOAT, "close", (5e-4, 2e-5)),
        ("rw: rtol=5e-4,atol=2e-5; label: >=99.9% of pixels equal", "out.label", BYTE, "agreement", 0.999),
        ("rw_up rtol=5e-4,atol=5e-5; label >=99.9% equal", "out.rw_up", FLOAT, "close", (5e-4, 5e-5)),
        ("without_crf exact; with CRF >=95% of pixels equal", "out.label_without_crf", BYTE, "close", (0, 0)),
        ("without_crf exact; with CRF >=95% of pixels equal", "out.label", BYTE, "agreement", 0.95),
        ("centroids and map equal on >=99% of pixels (rounding)", "out.instance_map", BOOL, "agreement", 0.99),
        ("masks IoU>=.99 matched in order; score atol=1e-3", "out.mask", BOOL, "overlap", 0.99),
        ("masks IoU>=.99 matched in order; score atol=1e-3", "out.class", LONG, "close", (0, 0)),
        ("masks IoU>=.99 matched in order; score atol=1e-3", "out.score", FLOAT, "close", (0, 1e-3)),
        ("mask exact, stride rtol=1e-6", "out.stride", FLOAT, "close", (1e-6, 0)),
        ("labels exact; loss rtol=1e-5,atol=1e-6", "grad.in.affinity", FLOAT, "close", (1e-5, 1e-6)),
        (
            "rtol=1e-4,atol=2e-6 (grads atol=1e-6; ties may move single entries)",
            "grad.in.cam1",
            FLOAT,
            "close",
            (0, 1e-6),
        ),
        ("label: <=0.2% of pixels may differ; refined cam rtol=1e-4,atol=1e-5", "out.label", BYTE, "agreement", 0.998),
        (
            "step 0: rtol=1e-4,atol=1e-6; later steps rtol=1e-3,atol=1e-4 (kinks)",
            "out.step0.mask",
            FLOAT,
            "close",
            (1e-4, 1e-6),
        ),
        (
            "step 0: rtol=1e-4,atol=1e-6; later steps rtol=1e-3,atol=1e-4 (kinks)",
            "out.step3.mask",
            FLOAT,
            "close",
            (1e-3, 1e-4),
        ),
        ("exact to 2 grey levels", "out.attention", BYTE, "grey", (0, 2)),
        ("exact to 2 grey levels", "out.has_map", BOOL, "close", (0, 0)),
        ("exact (uint8), allow +-1 on rounding ties", "out.accumulated", BYTE, "grey", (0, 1)),
        ("exact (uint8), allow +-1 on rounding ties", "out.index", LONG, "close", (0, 0)),
    ],
)
def test_tolerance_texts_are_read(text: str, key: str, stored: Tensor, kind: str, numbers: tuple | float) -> None:
    rule = choose_rule(parse_tolerance(text), key, stored)
    assert rule.kind == kind
    assert (pytest.approx(rule.at_least) if isinstance(numbers, float) else (rule.rtol, rule.atol)) == numbers


@pytest.mark.parametrize(
    ("text", "key", "stored"),
    [
        ("mask_after_1: 1e-5; final: 2e-2 max, 1e-3 mean", "out.mask_after_1", FLOAT),
        ("rtol=1e-5,atol=1e-5 (pred: exact except pixels within 1e-5 of a tie)", "out.pred", BYTE),
        ("losses rtol=2e-3; grads compared only where labels agree", "grad.in.logits", FLOAT),
        ("exact to 1 grey level", "out.probability", FLOAT),
        ("", "out.x", FLOAT),
    ],
)
def test_a_tolerance_in_words_is_left_to_the_adapter(tmp_path: Path, text: str, key: str, stored: Tensor) -> None:
    case = Case.read(write(tmp_path, {key: stored}, text))
    assert "must return Within" in check(case, {key: stored})[0]
    assert check(case, {key: Within(stored)}) == []


def test_a_folder_is_run_and_an_unknown_file_fails(tmp_path: Path) -> None:
    toy(tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/golden/test_golden.py"]
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [*command, "--golden", str(tmp_path)], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "test_golden[toy/square__a]" in result.stdout
    assert '@adapter("toy/square")' in result.stdout


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    asked = SimpleNamespace(
        fixturenames=["golden_file"], config=SimpleNamespace(getoption=lambda option: str(tmp_path))
    )
    with pytest.raises(pytest.UsageError, match=r"--golden: no SYSTEM/\*\.safetensors file"):
        conftest.pytest_generate_tests(asked)
