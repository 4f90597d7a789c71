from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from wsss_losses import (
    AdaptiveMinPoolingLoss,
    EquivariantCrossRegularizationLoss,
    adaptive_min_pooling_loss,
    equivariant_cross_regularization_loss,
    equivariant_regularization_loss,
    seam_loss,
)
from wsss_losses.seam import _mean_of_largest
from wsss_modules import minmax_cam

LABELS = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def views(seed: int = 0) -> list[Tensor]:
    """Refined maps of both views, in [0, 1] with a background, and class maps of both."""
    refined = [torch.sigmoid(random(3, 5, *size, seed=seed + i)) for i, size in enumerate(((6, 7), (4, 5)))]
    return [*refined, *(random(3, 4, *size, seed=seed + i) for i, size in enumerate(((6, 7), (4, 5)), 2))]


def cross_of_one(target: Tensor, maps: Tensor, label: Tensor, ratio: float) -> Tensor:
    """One image and one direction of ECR on the grid of the second view: a sort over all entries."""
    a = minmax_cam(target) * label[:, None, None]
    background = 1 - a.amax(0)
    onehot = torch.where(a < a.amax(0), 0.0, a)
    present = torch.cat([torch.ones(1), label])[:, None, None]
    difference = (torch.cat([background[None], onehot]) - minmax_cam(maps) * present).abs().flatten()
    return difference.sort(descending=True).values[: int(len(difference) * ratio)].mean()


@given(st.integers(0, 99), st.sampled_from([0.2, 0.5, 1.0]))
def test_cross_regularisation_is_the_mean_of_the_largest_differences(seed: int, ratio: float) -> None:
    refined1, refined2, cam1, cam2 = views(seed)
    cam1, refined1 = cam1[..., :4, :5], refined1[..., :4, :5]  # no resizing
    terms = equivariant_cross_regularization_loss(refined1, refined2, cam1, cam2, LABELS, ratio=ratio, reduction="none")
    for i in range(3):
        torch.testing.assert_close(terms.first[i], cross_of_one(cam2[i], refined1[i], LABELS[i], ratio))
        torch.testing.assert_close(terms.second[i], cross_of_one(cam1[i], refined2[i], LABELS[i], ratio))
    torch.testing.assert_close(terms.total, terms.first + terms.second)


def test_cross_regularisation_teaches_refined_maps_only() -> None:
    leaves = [x.requires_grad_() for x in views()]
    total = equivariant_cross_regularization_loss(*leaves, LABELS).total
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    assert grads[0].any()
    assert grads[1].any()
    assert grads[2:] == (None, None)


def test_forgotten_background_changes_which_class_is_protected() -> None:
    maps = views()
    labels = torch.ones_like(LABELS)
    legacy = equivariant_cross_regularization_loss(*maps, labels, legacy_background=True)
    assert legacy.total != equivariant_cross_regularization_loss(*maps, labels).total
    order = [1, 0, 2, 3]  # which class comes first matters to the released EPS-based code only
    swapped = [x[:, [0, *(1 + k for k in order)]] for x in maps[:2]] + [x[:, order] for x in maps[2:]]
    assert legacy.total != equivariant_cross_regularization_loss(*swapped, labels, legacy_background=True).total
    torch.testing.assert_close(
        equivariant_cross_regularization_loss(*swapped, labels), equivariant_cross_regularization_loss(*maps, labels)
    )


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=1, max_size=12), st.floats(0.05, 1))
def test_mean_of_the_largest_with_ties_is_that_of_a_sort(values: list[float], ratio: float) -> None:
    x = torch.tensor([values, values[::-1]], dtype=torch.float64, requires_grad=True)
    count = max(1, int(len(values) * ratio))
    mean = _mean_of_largest(x, ratio)
    torch.testing.assert_close(mean, x.detach().sort(1, descending=True).values[:, :count].mean(1))
    (grad,) = torch.autograd.grad(mean.sum(), x)
    torch.testing.assert_close(grad.sum(1), torch.ones(2, dtype=torch.float64))
    for row, share in zip(x.detach(), grad, strict=True):
        assert all(len(share[row == value].unique()) == 1 for value in row)  # equals share equally


@given(st.integers(0, 99))
def test_regularisation_is_symmetric_and_zero_for_equal_views(seed: int) -> None:
    first, second = random(3, 4, 5, 6, seed=seed), random(3, 4, 5, 6, seed=seed + 100)
    loss = equivariant_regularization_loss(first, second, LABELS)
    assert loss > 0
    torch.testing.assert_close(equivariant_regularization_loss(second, first, LABELS), loss)
    assert equivariant_regularization_loss(first, first, LABELS) == 0
    torch.testing.assert_close(
        equivariant_regularization_loss(first, 7 * first, LABELS), 0 * loss, rtol=0, atol=1e-4
    )  # eps beside the range of the maps
    spoilt = torch.where((LABELS > 0)[:, :, None, None], first, 1e3 * second)
    torch.testing.assert_close(equivariant_regularization_loss(spoilt, second, LABELS), loss)


def test_absent_classes_count_in_the_mean() -> None:
    first, second = random(3, 4, 5, 6), random(3, 4, 5, 6, seed=1)
    each = equivariant_regularization_loss(first, second, LABELS, reduction="none")
    assert each[2] == 0
    only = equivariant_regularization_loss(first[1:2, 3:], second[1:2, 3:], LABELS[1:2, 3:])
    torch.testing.assert_close(each[1], only / 4)
    torch.testing.assert_close(equivariant_regularization_loss(first, second, LABELS), each.mean())


@given(st.integers(0, 99), st.sampled_from([0.1, 0.25, 1.0]))
def test_min_pooling_is_the_mean_of_the_smallest(seed: int, fraction: float) -> None:
    cam = random(3, 4, 5, 8, seed=seed)
    each = adaptive_min_pooling_loss(cam, LABELS, fraction=fraction, reduction="none")
    for i in range(3):
        strongest = (cam[i] * LABELS[i][:, None, None]).amax(0).flatten()
        smallest = strongest.sort().values[: int(40 * fraction)]
        torch.testing.assert_close(each[i], smallest.clamp(min=0).mean())


def test_objective_is_the_sum_of_its_parts() -> None:
    refined1, refined2, cam1, cam2 = views()
    terms = seam_loss(cam1, cam2, refined1, refined2, LABELS, er_weight=2.0, ecr_weight=3.0)
    torch.testing.assert_close(terms.total, sum(terms[1:]))
    er = equivariant_regularization_loss(cam1, cam2, LABELS)
    ecr = equivariant_cross_regularization_loss(refined1, refined2, cam1, cam2, LABELS).total
    torch.testing.assert_close((terms.er, terms.ecr), (2 * er, 3 * ecr))
    bce = [F.multilabel_soft_margin_loss(cam.mean((2, 3)), LABELS.double()) for cam in (cam1, cam2)]
    torch.testing.assert_close(terms.classification, sum(bce) / 2)
    weakest = [adaptive_min_pooling_loss(maps[:, 1:], LABELS) for maps in (refined1, refined2)]
    torch.testing.assert_close(terms.min_pooling, sum(weakest) / 2)


def test_maps_of_zeros_and_single_pixels_stay_finite() -> None:
    for size in ((1, 1), (4, 5)):
        leaves = [torch.zeros(3, k, *size, requires_grad=True) for k in (4, 4, 5, 5)]
        terms = seam_loss(*leaves, LABELS)
        assert all(term.isfinite() for term in terms)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(terms.total, leaves))


CAM, REFINED = random(3, 4, 5, 6).float(), random(3, 5, 5, 6).float()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: adaptive_min_pooling_loss(CAM[0], LABELS), ValueError, r"cam: expected shape \(B, K, H, W\)"),
        (lambda: adaptive_min_pooling_loss(CAM.long(), LABELS), TypeError, "cam: expected a floating-point tensor"),
        (
            lambda: adaptive_min_pooling_loss(CAM, LABELS[:, 1:]),
            ValueError,
            r"labels: expected shape \(3, 4\) to match cam, got \(3, 3\)",
        ),
        (lambda: adaptive_min_pooling_loss(CAM, LABELS, fraction=0), ValueError, r"fraction: expected a number in"),
        (lambda: adaptive_min_pooling_loss(CAM[:, :0], LABELS[:, :0]), ValueError, "cam: expected at least one image"),
        (lambda: AdaptiveMinPoolingLoss(reduction="max"), ValueError, 'reduction: expected "mean", "sum" or "none"'),
        (
            lambda: equivariant_regularization_loss(CAM, CAM[:, 1:], LABELS),
            ValueError,
            r"cam2: expected shape \(3, 4, \*, \*\) to match cam1, got \(3, 3, 5, 6\)",
        ),
        (
            lambda: equivariant_cross_regularization_loss(CAM, REFINED, CAM, CAM, LABELS),
            ValueError,
            r"refined1: expected shape \(3, 5, 5, 6\) to match its cam, got \(3, 4, 5, 6\)",
        ),
        (
            lambda: EquivariantCrossRegularizationLoss(ratio=1.5)(REFINED, REFINED, CAM, CAM, LABELS),
            ValueError,
            r"ratio: expected a number in \(0, 1\], got 1.5",
        ),
    ],
)
def test_messages(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
