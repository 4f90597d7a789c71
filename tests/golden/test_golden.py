"""Every file of the folder given by ``--golden`` (default: tests/golden/data) against the library's public API."""

from pathlib import Path

import pytest
import torch

import tests.golden.adapters  # noqa: F401 (fills the table of adapters)
from tests.golden.case import run


@pytest.mark.golden
def test_golden(golden_file: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    device = request.config.getoption("--golden-device")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions of float32 are not rounded in between
    with torch.device(device):  # what adapters make is there too
        run(golden_file, device=device)
