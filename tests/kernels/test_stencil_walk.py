"""The kernels of the local affinity and of its random walk against the plain forms in float64."""

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import opcheck_reads_grad
from wsss_modules import LocalAffinity, affinity_offsets, random_walk
from wsss_modules.affinity.offsets import inside

SHAPES = {  # B, C, H, W, radius; a program has 128 pixels and 8 maps at most
    "B1-C1-1x1-r2": (1, 1, 1, 1, 2),
    "B2-C3-7x6-r3": (2, 3, 7, 6, 3),
    "B1-C11-5x27-r4": (1, 11, 5, 27, 4),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def inputs_of(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, tuple]:
    batch, n_maps, height, width, radius = shape
    offsets = affinity_offsets(radius)
    values = torch.rand(batch, len(offsets), height, width) * inside(offsets, (height, width), torch.device("cpu"))
    return torch.rand(batch, n_maps, height, width), values, offsets


def with_gradients(call, x: Tensor, values: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    leaves = [part.detach().to(device).requires_grad_() for part in (x, values)]
    result = call(*leaves)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(result)
    gradients = torch.autograd.grad((result * direction).sum(), leaves, materialize_grads=True)
    return tuple(part.detach().cpu() for part in (result, *gradients))


@shapes
@pytest.mark.usefixtures("poisoned")
def test_the_product_and_its_gradients(shape: tuple[int, ...], device: torch.device) -> None:
    x, values, offsets = inputs_of(shape)

    def product(backend: str):
        return lambda x, values: LocalAffinity(offsets, values).matvec(x, backend=backend)

    exact = with_gradients(product("torch"), x.double(), values.double(), torch.device("cpu"))
    for found, expected in zip(with_gradients(product("triton"), x, values, device), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@shapes
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("method", ["power", "chebyshev"])
def test_the_walk_and_its_gradients(shape: tuple[int, ...], method: str, device: torch.device) -> None:
    x, values, offsets = inputs_of(shape)

    def walk(backend: str):
        options = {"beta": 2.0, "n_steps": 4, "method": method, "backend": backend}
        return lambda x, values: random_walk(x, LocalAffinity(offsets, values), **options)

    exact = with_gradients(walk("torch"), x.double(), values.double(), torch.device("cpu"))
    for found, expected in zip(with_gradients(walk("triton"), x, values, device), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)


def test_a_long_walk_keeps_the_digits_of_the_plain_one(device: torch.device) -> None:
    x, values, offsets = inputs_of((1, 2, 9, 8, 3))

    def walked(x: Tensor, values: Tensor, backend: str) -> Tensor:
        return random_walk(x, LocalAffinity(offsets, values), beta=8, n_steps=256, backend=backend).cpu().double()

    exact = walked(x.double(), values.double(), "torch")
    of_torch = (walked(x, values, "torch") - exact).abs().max()
    found = (walked(x.to(device), values.to(device), "triton") - exact).abs().max()
    assert found <= max(4 * of_torch, 1e-6)


def test_half_precision_and_a_shared_affinity(device: torch.device) -> None:
    x, values, offsets = inputs_of((1, 2, 6, 5, 3))
    maps = torch.cat([x, x.flip(3)]).half()
    exact = LocalAffinity(offsets, values.double()).matvec(maps.double(), backend="torch")
    found = LocalAffinity(offsets, values.to(device)).matvec(maps.to(device), backend="triton")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-5, atol=1e-5)


def test_no_map(device: torch.device) -> None:
    _, values, offsets = inputs_of((2, 1, 4, 5, 2))
    affinity, nothing = LocalAffinity(offsets, values.to(device)), torch.rand(2, 0, 4, 5, device=device)
    assert affinity.matvec(nothing, backend="triton").shape == (2, 0, 4, 5)
    assert random_walk(nothing, affinity, n_steps=2, backend="triton").shape == (2, 0, 4, 5)


@opcheck_reads_grad
def test_the_operators_pass_the_checks_of_torch(device: torch.device) -> None:
    from wsss_modules._stencil_walk import stencil_walk
    from wsss_modules.kernels.stencil_walk import stencil_product

    x, values, offsets = inputs_of((2, 2, 4, 5, 2))
    flat = [step for offset in offsets for step in offset]
    x, values = x.to(device).requires_grad_(), values.to(device).requires_grad_()
    torch.library.opcheck(stencil_product, (x, values, flat))
    torch.library.opcheck(stencil_walk, (x, values, flat, 3, [], True))


def test_a_compiled_function_sees_one_operator(device: torch.device) -> None:
    x, values, offsets = inputs_of((1, 2, 4, 5, 3))
    x, affinity = x.to(device), LocalAffinity(offsets, values.to(device))

    def both(x: Tensor) -> Tensor:
        return random_walk(affinity.matvec(x, backend="triton"), affinity, n_steps=3, backend="triton")

    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))
