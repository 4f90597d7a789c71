"""Every kernel compiles to a cubin for GPUs of compute capability 8.0 and 9.0, and keeps its numbers in registers."""

import pytest

from tests.kernels.ahead import BUILDS, TARGETS, Build, build


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS, ids=lambda capability: f"sm_{capability}")
@pytest.mark.parametrize("each", BUILDS, ids=lambda each: each.name)
def test_kernel_compiles_without_spilling(each: Build, capability: int) -> None:
    report = build(each, capability)
    assert report.spilled == 0
    assert report.registers > 0
