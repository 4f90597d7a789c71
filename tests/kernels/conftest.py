"""Where kernels run in tests: on a GPU if there is one, else in Triton's interpreter, in a process of its own."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from wsss_modules.kernels.backend import INSTALLED

opcheck_reads_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


# compiling is for a process without the interpreter, and both need triton
collect_ignore = ["ahead.py", "test_ahead.py", "test_interpreter.py"] if INTERPRETER or not INSTALLED else []


@pytest.fixture(
    params=[
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("cpu", id="interpreter", marks=pytest.mark.interpreter),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cpu" and not INTERPRETER:
        pytest.skip("needs TRITON_INTERPRET=1; test_interpreter.py runs it")
    if request.param == "cuda" and INTERPRETER:
        pytest.skip("the interpreter is for CPU tensors")
    return torch.device(request.param)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory comes filled with NaN, so that what a kernel forgets to write is seen."""

    def fill(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return filled

    monkeypatch.setattr(torch, "empty", fill(torch.empty))
    monkeypatch.setattr(torch, "empty_like", fill(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", fill(torch.Tensor.new_empty))
