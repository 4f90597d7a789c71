"""Exact Gaussian messages: the sum itself, its symmetry, and what the lattice makes of it."""

import pytest
import torch

from wsss_modules import CRFParameters, DenseCRF, ExactGaussian, PermutohedralLattice, dense_crf, unary_from_mask
from wsss_modules.dense_crf import _exact


def matrix(features: torch.Tensor) -> torch.Tensor:
    """(B, N, N) weights, normalised."""
    weights = torch.exp(-0.5 * (features[:, :, None] - features[:, None]).square().sum(3))
    scale = weights.sum(2).rsqrt()
    return scale[:, :, None] * weights * scale[:, None]


@pytest.mark.parametrize("chunk", [1, 64 * 2**20], ids=["row by row", "at once"])
def test_it_is_the_normalised_sum(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_exact, "CHUNK_BYTES", chunk)
    features, values = torch.randn(2, 30, 3, dtype=torch.float64), torch.randn(2, 30, 4, dtype=torch.float64)
    torch.testing.assert_close(ExactGaussian(features).filter(values), matrix(features) @ values)


def test_gradients_and_their_gradients() -> None:
    kernel = ExactGaussian(torch.randn(1, 6, 2, dtype=torch.float64))
    values = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kernel.filter, values)
    assert torch.autograd.gradgradcheck(kernel.filter, values)


def test_the_lattice_approximates_it() -> None:
    grid = torch.stack(torch.meshgrid(torch.arange(12.0), torch.arange(10.0), indexing="ij"), 2).view(1, -1, 2) / 3
    values = torch.rand(1, 120, 2)
    exact, lattice = ExactGaussian(grid).filter(values), PermutohedralLattice(grid).filter(values)
    assert (exact - lattice).abs().max() < 0.05  # 0.018 measured
    assert not torch.allclose(exact, lattice, atol=1e-3)


def test_the_crf_takes_it() -> None:
    image = torch.arange(42).view(1, 1, 6, 7).expand(1, 3, 6, 7)
    unary = unary_from_mask(torch.randint(0, 2, (1, 6, 7)), 2)
    once = CRFParameters(iterations=1)  # later the labels are sure, either way
    exact = dense_crf(image, unary, once, exact=True)
    torch.testing.assert_close(exact, DenseCRF(once, exact=True)(image, unary))
    torch.testing.assert_close(exact.sum(1), torch.ones(1, 6, 7))
    assert not torch.allclose(exact, dense_crf(image, unary, once), atol=1e-4)


def test_wrong_input_is_told() -> None:
    with pytest.raises(TypeError, match="features: expected float32 or float64"):
        ExactGaussian(torch.rand(1, 3, 2).half())
    with pytest.raises(ValueError, match="features: expected at least one point and one feature"):
        ExactGaussian(torch.rand(1, 0, 2))
    with pytest.raises(ValueError, match=r"values: expected shape \(2, 3, C\) to match the features, got \(1, 3, 2\)"):
        ExactGaussian(torch.rand(2, 3, 2)).filter(torch.rand(1, 3, 2))
