"""Which form of an operation runs is the user's choice, and off CUDA never Triton by itself."""

import pytest
import torch

from tests.kernels.conftest import INTERPRETER
from wsss_modules import pixel_correlation
from wsss_modules.kernels import backend
from wsss_modules.kernels.backend import runs_triton


def test_auto_stays_with_torch_on_a_cpu() -> None:
    assert not runs_triton("auto", torch.zeros(1))


def test_torch_is_torch() -> None:
    assert not runs_triton("torch", torch.zeros(1))


@pytest.mark.skipif(INTERPRETER, reason="the interpreter takes CPU tensors")
def test_triton_on_a_cpu_is_refused() -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match='backend: "triton" expected CUDA tensors, got cpu; use "auto" or "torch"'):
        pixel_correlation(torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 3), backend="triton")


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match='backend: expected "auto", "torch" or "triton", got \'cuda\''):
        pixel_correlation(torch.rand(1, 2, 3, 3), torch.rand(1, 2, 3, 3), backend="cuda")


def test_missing_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INSTALLED", False)
    with pytest.raises(ImportError, match='backend: "triton" needs the package triton, which is not installed'):
        runs_triton("triton", torch.zeros(1))
