"""The kernel of pixel-to-prototype contrast against tables of similarities in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.kernels.conftest import opcheck_reads_grad
from wsss_losses import pixel_to_prototype_contrast_loss

SHAPES = {"P1-C2-D3": (1, 2, 3), "P37-C21-D16": (37, 21, 16), "P70-C33-D50": (70, 33, 50)}


def costs_of(
    pixels: Tensor, prototypes: Tensor, target: Tensor, known: Tensor, ranks: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The costs by a table in float64, and the gradient of their weighted sum."""
    pixels = pixels.double().requires_grad_()
    logits = pixels @ prototypes.double().mT / 0.1
    logits = torch.where(known, logits, torch.finfo(torch.float64).min / 4)
    own = logits.gather(1, target[:, None])[:, 0]
    if ranks[1]:
        count = int(known.sum())
        ranked = logits[:, known].sort(1, descending=True).values
        negative = ranked[:, min(ranks[0], count - 1) : ranks[1]].logsumexp(1)
        costs = torch.logaddexp(own, negative) - own
    else:
        costs = logits.logsumexp(1) - own
    (gradient,) = torch.autograd.grad((costs * weights_of(pixels)).sum(), pixels)
    return costs.detach(), gradient


def weights_of(pixels: Tensor) -> Tensor:
    return torch.linspace(-1, 2, len(pixels), device=pixels.device, dtype=pixels.dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("ranks", [(0, 0), (1, 2), (0, 2), (3, 13)], ids=["all", "second", "first two", "semi-hard"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_costs_and_gradients_are_those_of_the_table(
    shape: tuple[int, ...], ranks: tuple[int, int], device: torch.device
) -> None:
    from wsss_modules.kernels.prototype_contrast import prototype_contrast

    n_pixels, n_prototypes, channels = shape
    pixels, prototypes = (F.normalize(torch.randn(n, channels)) for n in (n_pixels, n_prototypes))
    target, known = torch.randint(0, n_prototypes - 1, (n_pixels,)), torch.ones(n_prototypes, dtype=torch.bool)
    known[-1] = n_prototypes == 2  # one prototype that does not count
    expected = costs_of(pixels, prototypes, target, known, ranks)
    leaf = pixels.to(device).requires_grad_()
    costs, own, _ = prototype_contrast(leaf, prototypes.to(device), target.to(device), known.to(device), 0.1, *ranks)
    (gradient,) = torch.autograd.grad((costs * weights_of(leaf)).sum(), leaf)
    torch.testing.assert_close(costs.cpu().double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.cpu().double(), expected[1], rtol=1e-4, atol=1e-4)
    similar = (pixels * prototypes[target]).sum(1) / 0.1
    torch.testing.assert_close(own.cpu(), similar, rtol=1e-5, atol=1e-5)


def test_half_precision_pixels(device: torch.device) -> None:
    from wsss_modules.kernels.prototype_contrast import prototype_contrast

    pixels, prototypes = (F.normalize(torch.randn(n, 24)).half() for n in (10, 5))
    target, known = torch.randint(0, 5, (10,)), torch.ones(5, dtype=torch.bool)
    expected, _ = costs_of(pixels, prototypes, target, known, (0, 0))
    arguments = (x.to(device) for x in (pixels, prototypes, target, known))
    costs, _, gradients = prototype_contrast(*arguments, 0.1, 0, 0)
    assert gradients.dtype == torch.float16
    torch.testing.assert_close(costs.cpu().double(), expected, rtol=1e-5, atol=1e-5)  # inputs are rounded already


@pytest.mark.parametrize("drop_absent", [False, True], ids=["all", "present"])
def test_the_loss_is_that_of_the_tables(drop_absent: bool, device: torch.device) -> None:
    features = [torch.randn(2, 8, n, n) for n in (6, 4)]
    cams, labels = [torch.rand(2, 5, n, n) for n in (6, 4)], torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0]])
    drawn = [torch.rand(2, 4, 4) < 0.5 for _ in range(2)]

    def terms_of(place: torch.device, dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [x.to(place, dtype).requires_grad_() for x in features]
        rest = [x.to(place) for x in (cams[0].to(dtype), cams[1].to(dtype), labels, *drawn)]
        terms = pixel_to_prototype_contrast_loss(*leaves, *rest, drop_absent=drop_absent, backend=backend)
        return [x.detach().cpu().double() for x in (*terms, *torch.autograd.grad(terms.total, leaves))]

    exact = terms_of(torch.device("cpu"), torch.float64, "torch")
    for found, expected in zip(terms_of(device, torch.float32, "triton"), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_no_pixel_and_too_many_prototypes(device: torch.device) -> None:
    from wsss_modules.kernels.prototype_contrast import prototype_contrast

    target, known = torch.zeros(0, dtype=torch.int64, device=device), torch.ones(200, dtype=torch.bool, device=device)
    prototypes = torch.rand(200, 4, device=device)
    costs, _, gradients = prototype_contrast(prototypes[:0], prototypes[:3], target, known[:3], 0.1, 0, 0)
    assert costs.shape == (0,)
    assert gradients.shape == (0, 4)
    with pytest.raises(ValueError, match="prototypes: expected at most 128 for the Triton kernel, got 200"):
        prototype_contrast(prototypes[:0], prototypes, target, known, 0.1, 0, 0)


@opcheck_reads_grad
def test_the_operator_passes_the_checks_of_torch(device: torch.device) -> None:
    from wsss_modules.kernels.prototype_contrast import prototype_contrast

    pixels, prototypes = torch.rand(6, 4, device=device).requires_grad_(), torch.rand(3, 4, device=device)
    target, known = torch.tensor([0, 1, 2, 0, 1, 2], device=device), torch.ones(3, dtype=torch.bool, device=device)
    torch.library.opcheck(prototype_contrast, (pixels, prototypes, target, known, 0.1, 1, 2))
