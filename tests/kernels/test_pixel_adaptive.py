"""The kernel of pixel-adaptive refinement against the plain form in float64."""

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import opcheck_reads_grad
from wsss_modules.refinement.pixel_adaptive import DILATIONS, PixelAdaptiveKernel, _ring_offsets

SHAPES = {  # B, C, H, W; a program has 256 pixels and 2 maps
    "B1-C1-1x1": (1, 1, 1, 1),
    "B2-C3-7x5": (2, 3, 7, 5),
    "B1-C21-9x33": (1, 21, 9, 33),
    "B2-C17-9x23": (2, 17, 9, 23),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def refined(
    maps: Tensor, weights: Tensor, device: torch.device, backend: str, dilations: tuple[int, ...], iterations: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and gradients of its product with a fixed direction, back on the CPU."""
    inputs = [x.detach().to(device).requires_grad_() for x in (maps, weights)]
    kernel = PixelAdaptiveKernel(_ring_offsets(dilations), inputs[1])
    result = kernel.refine(inputs[0], iterations, backend=backend)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result)
    gradients = torch.autograd.grad((result * direction).sum(), inputs)
    return tuple(x.detach().cpu() for x in (result, *gradients))


def inputs_of(shape: tuple[int, ...], dilations: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    batch, _, height, width = shape
    return torch.randn(shape), torch.rand(batch, 8 * len(dilations), height, width).softmax(1)


@shapes
@pytest.mark.usefixtures("poisoned")
def test_values_and_gradients_are_those_of_the_plain_form(shape: tuple[int, ...], device: torch.device) -> None:
    maps, weights = inputs_of(shape, (1, 3))
    exact = refined(maps.double(), weights.double(), torch.device("cpu"), "torch", (1, 3))
    for found, expected in zip(refined(maps, weights, device, "triton", (1, 3)), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)], ids=["f16", "bf16"])
def test_half_precision_is_rounded_once(dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    from wsss_modules.kernels.pixel_adaptive import average_neighbours

    maps, weights = (x.to(dtype) for x in inputs_of((2, 3, 7, 5), (1,)))
    offsets = _ring_offsets((1,))
    exact = PixelAdaptiveKernel(offsets, weights.double()).refine(maps.double(), 1, backend="torch")
    found = average_neighbours(maps.to(device), weights.to(device), offsets)
    assert found.dtype == dtype
    torch.testing.assert_close(found.cpu().double(), exact, rtol=tolerance / 4, atol=tolerance / 4)


def test_float64_is_summed_in_float64(device: torch.device) -> None:
    maps, weights = (x.double() for x in inputs_of((1, 2, 6, 5), (2,)))
    exact = refined(maps, weights, torch.device("cpu"), "torch", (2,))
    for found, expected in zip(refined(maps, weights, device, "triton", (2,)), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_strided_maps_and_the_published_neighbours(device: torch.device) -> None:
    maps, weights = inputs_of((1, 3, 26, 30), DILATIONS)
    turned = maps.to(memory_format=torch.channels_last)
    exact = PixelAdaptiveKernel(_ring_offsets(DILATIONS), weights.double()).refine(maps.double(), 1, backend="torch")
    kernel = PixelAdaptiveKernel(_ring_offsets(DILATIONS), weights.to(device))
    found = kernel.refine(turned.to(device), 1, backend="triton")
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-5, atol=1e-5)


@opcheck_reads_grad
def test_the_operator_passes_the_checks_of_torch(device: torch.device) -> None:
    from wsss_modules.kernels.pixel_adaptive import pixel_adaptive_average

    maps, weights = (x.to(device).requires_grad_() for x in inputs_of((2, 3, 5, 4), (1,)))
    torch.library.opcheck(pixel_adaptive_average, (maps, weights, [y for o in _ring_offsets((1,)) for y in o]))


def test_no_image_and_no_map(device: torch.device) -> None:
    kernel = PixelAdaptiveKernel(_ring_offsets((1,)), torch.rand(0, 8, 4, 5, device=device))
    assert kernel.refine(torch.rand(0, 3, 4, 5, device=device), 2, backend="triton").shape == (0, 3, 4, 5)
    kernel = PixelAdaptiveKernel(_ring_offsets((1,)), torch.rand(2, 8, 4, 5, device=device))
    assert kernel.refine(torch.rand(2, 0, 4, 5, device=device), 2, backend="triton").shape == (2, 0, 4, 5)


def test_a_compiled_function_sees_one_operator_an_iteration(device: torch.device) -> None:
    maps, weights = (x.to(device) for x in inputs_of((1, 2, 6, 5), (1,)))
    offsets = _ring_offsets((1,))

    def refine(x: Tensor, w: Tensor) -> Tensor:
        return PixelAdaptiveKernel(offsets, w).refine(x, 2, backend="triton")

    compiled = torch.compile(refine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(maps, weights), refine(maps, weights))
