"""The kernels of pixel correlation against the plain form in float64."""

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import opcheck_reads_grad
from wsss_modules import pixel_correlation

SHAPES = {  # B, C, E, H, W
    "B1-C1-E1-1x1": (1, 1, 1, 1, 1),
    "B2-C3-E5-7x6": (2, 3, 5, 7, 6),
    "B1-C21-E40-5x17": (1, 21, 40, 5, 17),
    "B1-C37-E70-4x9": (1, 37, 70, 4, 9),
}


def related(maps: Tensor, keys: Tensor, device: torch.device, backend: str) -> tuple[Tensor, ...]:
    """The result, and gradients of its product with a fixed direction, back on the CPU."""
    inputs = [x.detach().to(device).requires_grad_() for x in (maps, keys)]
    result = pixel_correlation(*inputs, backend=backend)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(result)
    gradients = torch.autograd.grad((result * direction).sum(), inputs)
    return tuple(x.detach().cpu() for x in (result, *gradients))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_those_of_the_plain_form(shape: tuple[int, ...], device: torch.device) -> None:
    batch, n_maps, n_keys, height, width = shape
    maps, keys = torch.rand(batch, n_maps, height, width), torch.randn(batch, n_keys, height, width)
    exact = related(maps.double(), keys.double(), torch.device("cpu"), "torch")
    for found, expected in zip(related(maps, keys, device, "triton"), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_strided_and_half_precision_inputs(device: torch.device) -> None:
    maps, keys = torch.rand(2, 4, 5, 6).half(), torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last)
    exact = pixel_correlation(maps.double(), keys.double(), backend="torch")
    found = pixel_correlation(maps.to(device), keys.to(device), backend="triton")
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-3, atol=1e-3)  # float16 rounds by 5e-4


def test_kernels_take_half_precision_and_sum_in_float32(device: torch.device) -> None:
    from wsss_modules.kernels.relu_correlation import relu_correlation

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter multiplies bfloat16's bits
    maps, keys = torch.rand(1, 3, 20).to(dtype), torch.randn(1, 16, 20).to(dtype)
    weights = (keys.double().mT @ keys.double()).relu()
    sums, totals = relu_correlation(maps.to(device), keys.to(device))
    torch.testing.assert_close(sums.cpu().double(), maps.double() @ weights, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(totals.cpu().double(), weights.sum(1), rtol=1e-5, atol=1e-4)


def test_float64_goes_to_torch_unless_triton_is_asked_for(device: torch.device) -> None:
    maps, keys = (torch.rand(1, 2, 3, 3, dtype=torch.float64, device=device) for _ in range(2))
    torch.testing.assert_close(pixel_correlation(maps, keys), pixel_correlation(maps, keys, backend="torch"))
    with pytest.raises(TypeError, match="maps, keys: expected at most float32 for the Triton kernel, got float64"):
        pixel_correlation(maps, keys, backend="triton")


def test_no_image(device: torch.device) -> None:
    maps, keys = torch.rand(0, 2, 3, 3, device=device), torch.rand(0, 4, 3, 3, device=device)
    assert pixel_correlation(maps, keys, backend="triton").shape == (0, 2, 3, 3)


@opcheck_reads_grad
def test_the_operator_passes_the_checks_of_torch(device: torch.device) -> None:
    from wsss_modules.kernels.relu_correlation import relu_correlation

    maps, keys = torch.rand(2, 3, 10, device=device), torch.randn(2, 4, 10, device=device)
    torch.library.opcheck(relu_correlation, (maps.requires_grad_(), keys.requires_grad_()))


def test_a_compiled_function_sees_one_operator(device: torch.device) -> None:
    maps, keys = torch.rand(1, 3, 4, 5, device=device), torch.randn(1, 4, 4, 5, device=device)
    compiled = torch.compile(pixel_correlation, fullgraph=True, backend="aot_eager")
    expected = pixel_correlation(maps, keys, backend="triton")
    torch.testing.assert_close(compiled(maps, keys, backend="triton"), expected)
