"""The kernel of exact Gaussian messages against the sum over all pairs in float64."""

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import opcheck_reads_grad
from wsss_modules import PSA_CRF, ExactGaussian, dense_crf

SHAPES = {"B1-N1-C1-F2": (1, 1, 1, 2), "B2-N70-C3-F5": (2, 70, 3, 5), "B1-N133-C33-F5": (1, 133, 33, 5)}


def filtered(values: Tensor, features: Tensor, device: torch.device, backend: str) -> tuple[Tensor, Tensor]:
    values = values.detach().to(device).requires_grad_()
    result = ExactGaussian(features.to(device), backend=backend).filter(values)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(result)
    (gradient,) = torch.autograd.grad((result * direction).sum(), values)
    return result.detach().cpu(), gradient.cpu()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_those_of_the_sum(shape: tuple[int, ...], shared: bool, device: torch.device) -> None:
    batch, points, labels, n_features = shape
    values, features = torch.randn(batch, points, labels), 2 * torch.randn(1 if shared else batch, points, n_features)
    exact = filtered(values.double(), features.double(), torch.device("cpu"), "torch")
    for found, expected in zip(filtered(values, features, device, "triton"), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_far_features_keep_their_digits(device: torch.device) -> None:
    """Features far from 0, as positions are: differences of their squares would be wrong in the first digit."""
    features, values = torch.randn(1, 40, 2) + 3000, torch.rand(1, 40, 2)
    exact = filtered(values.double(), features.double(), torch.device("cpu"), "torch")[0]
    found = filtered(values, features, device, "triton")[0]
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_half_precision_values_are_summed_in_float32(device: torch.device) -> None:
    from wsss_modules.kernels.gaussian_messages import gaussian_messages

    values, features = torch.rand(1, 50, 3).bfloat16(), torch.randn(1, 2, 50)
    weights = torch.exp(-0.5 * (features.double()[:, :, :, None] - features.double()[:, :, None]).square().sum(1))
    found = gaussian_messages(values.to(device), features.to(device))
    assert found.dtype == torch.bfloat16
    # one rounding; 6.6e-3 measured in the interpreter, which cuts digits off
    torch.testing.assert_close(found.cpu().double(), weights @ values.double(), rtol=2**-7, atol=1e-6)


def test_the_crf_runs_on_it(device: torch.device) -> None:
    image, unary = torch.randint(0, 256, (2, 3, 6, 7)), torch.rand(2, 3, 6, 7)
    exact = dense_crf(image, unary.double(), PSA_CRF, exact=True, backend="torch")
    found = dense_crf(image.to(device), unary.to(device), PSA_CRF, exact=True, backend="triton")
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-4, atol=1e-4)


def test_no_label(device: torch.device) -> None:
    kernel = ExactGaussian(torch.rand(1, 5, 2, device=device), backend="triton")
    assert kernel.filter(torch.rand(2, 5, 0, device=device)).shape == (2, 5, 0)


@opcheck_reads_grad
def test_the_operator_passes_the_checks_of_torch(device: torch.device) -> None:
    from wsss_modules.kernels.gaussian_messages import gaussian_messages

    values, features = torch.rand(2, 9, 3, device=device).requires_grad_(), torch.rand(1, 2, 9, device=device)
    torch.library.opcheck(gaussian_messages, (values, features))
