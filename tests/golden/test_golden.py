"""Every file of the folder given by ``--golden`` (default: tests/golden/data) against the library's public API."""

from pathlib import Path

import pytest

import tests.golden.adapters  # noqa: F401 (fills the table of adapters)
from tests.golden.case import run


@pytest.mark.golden
def test_golden(golden_file: Path) -> None:
    run(golden_file)
