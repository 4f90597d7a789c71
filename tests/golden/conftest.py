from pathlib import Path

import pytest

from tests.golden.case import system_and_file

KEPT = Path(__file__).parent / "data"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" not in metafunc.fixturenames:
        return
    given = metafunc.config.getoption("--golden")
    folder = Path(given) if given else KEPT
    files = sorted(folder.glob("*/*.safetensors"))
    if not files:
        raise pytest.UsageError(f"--golden: no SYSTEM/*.safetensors file in {folder}")
    metafunc.parametrize("golden_file", files, ids=system_and_file)
