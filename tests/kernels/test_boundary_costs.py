"""The kernels of the boundary loss against the plain form in float64."""

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import opcheck_reads_grad
from wsss_losses import boundary_affinity_loss, inter_pixel_relation_loss

CASES = {  # B, H, W, radius, border; a program has 64 pixels
    "B1-2x2-r2": (1, 2, 2, 2, "full"),
    "B2-9x12-r4": (2, 9, 12, 4, "released"),
    "B1-13x7-r5": (1, 13, 7, 5, "full"),
    "B1-9x19-r7": (1, 9, 19, 7, "released"),
    "no pair": (1, 3, 3, 4, "released"),
}


def inputs_of(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Logits without ties, so that each path has one largest; and labels with all kinds of pairs."""
    number = batch * height * width
    logits = (torch.randperm(number).float() / number * 8 - 4).view(batch, 1, height, width)
    labels = torch.tensor([0, 0, 1, 2, 255])[torch.randint(0, 5, (batch, height, width))]
    return logits, labels


def terms_of(logits: Tensor, labels: Tensor, device: torch.device, backend: str, **options: object) -> list[Tensor]:
    leaf = logits.to(device).requires_grad_()
    terms = boundary_affinity_loss(leaf, labels.to(device), backend=backend, **options)
    (gradient,) = torch.autograd.grad(2 * terms.bg + terms.fg - 3 * terms.neg, leaf)
    return [x.detach().cpu().double() for x in (*terms, gradient)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_terms_and_gradients_are_those_of_the_plain_form(case: tuple, device: torch.device) -> None:
    batch, height, width, radius, border = case
    logits, labels = inputs_of(batch, height, width)
    options = {"radius": radius, "border": border}
    exact = terms_of(logits.double(), labels, torch.device("cpu"), "torch", **options)
    for found, expected in zip(terms_of(logits, labels, device, "triton", **options), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_saturated_logits_keep_their_gradient(device: torch.device) -> None:
    logits, labels = torch.full((1, 1, 3, 4), 40.0), torch.zeros(1, 3, 4, dtype=torch.int64)
    options = {"radius": 2, "border": "full"}
    exact = terms_of(logits.double(), labels, torch.device("cpu"), "torch", **options)
    found = terms_of(logits, labels, device, "triton", **options)
    torch.testing.assert_close(found[0], exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[-1].sum(), exact[-1].sum(), rtol=1e-5, atol=0)  # ties: which pixel gets it is free


def test_the_objective_of_irn_and_half_precision(device: torch.device) -> None:
    logits, labels = inputs_of(2, 8, 9)
    field = torch.randn(2, 2, 8, 9)
    exact = inter_pixel_relation_loss(logits.bfloat16().double(), field.double(), labels, radius=4, backend="torch")
    parts = (logits.bfloat16().to(device), field.to(device), labels.to(device))
    found = inter_pixel_relation_loss(*parts, radius=4, backend="triton")
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-5)


@opcheck_reads_grad
def test_the_operator_passes_the_checks_of_torch(device: torch.device) -> None:
    from wsss_modules.kernels.boundary_costs import boundary_pair_costs

    logits, labels = inputs_of(2, 5, 6)
    arguments = (logits[:, 0].to(device).requires_grad_(), labels.to(torch.uint8).to(device))
    torch.library.opcheck(boundary_pair_costs, (*arguments, 3, True, 1e-5))


def test_a_compiled_function_sees_one_operator(device: torch.device) -> None:
    logits, labels = (x.to(device) for x in inputs_of(1, 6, 7))

    def loss(logits: Tensor) -> Tensor:
        return boundary_affinity_loss(logits, labels, radius=3, backend="triton").total

    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(logits), loss(logits))


def test_no_image(device: torch.device) -> None:
    logits, labels = torch.rand(0, 1, 4, 5, device=device), torch.zeros(0, 4, 5, dtype=torch.int64, device=device)
    assert boundary_affinity_loss(logits, labels, radius=2, border="full", backend="triton").total == 0


def test_labels_come_as_bytes_or_with_more_classes_than_bytes_have(device: torch.device) -> None:
    from wsss_modules.kernels.boundary_costs import boundary_pair_costs

    logits, labels = inputs_of(1, 6, 7)
    known = torch.where(labels == 255, -1, labels).to(torch.int32)
    many = torch.where(known == 2, 257, known).to(torch.int32)  # 1 if only its lowest byte were read
    as_bytes, as_integers, as_many = (
        boundary_pair_costs(logits[:, 0].to(device), x.to(device), 3, True, 1e-5)
        for x in (labels.to(torch.uint8), known, many)
    )
    for found in (as_integers, as_many):
        torch.testing.assert_close(found, as_bytes)
