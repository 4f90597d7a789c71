"""What several faults happen to."""

from pathlib import Path

import pytest

from recipes.pipeline.data.demo import demo_folder


@pytest.fixture(scope="session")
def whole_voc() -> Path:
    """The tiny demo data, a folder in the layout of VOC; never to be changed."""
    return demo_folder("tiny")
