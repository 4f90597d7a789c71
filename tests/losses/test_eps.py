from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.losses import reference_eps
from wsss_losses import EPSLoss, SaliencyGuidedMapLoss, eps_loss, saliency_guided_map_loss
from wsss_modules import BackgroundAwareCAMHead, estimate_saliency, route_by_saliency

LABELS = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Class maps with a background, and saliency on a finer grid."""
    return 3 * random(3, 4, 5, 6, seed=seed), torch.sigmoid(3 * random(3, 1, 15, 12, seed=seed + 100))


@given(st.integers(0, 99), st.floats(-0.1, 1.1), st.floats(0, 1))
def test_loss_is_that_of_the_maps(seed: int, threshold: float, weight: float) -> None:
    scores, saliency = batch(seed)
    p, target = scores.softmax(1), saliency[:, :, ::3, ::2]
    expected = torch.zeros(3, dtype=torch.float64)
    for i in range(3):
        fg, bg = torch.zeros(5, 6, dtype=torch.float64), p[i, 0].clone()
        for k in LABELS[i].nonzero().flatten().tolist():
            hard = p[i, 1 + k] > 0.5
            ratio = (hard & (target[i, 0] > 0.5)).sum().double() / (hard.sum() + 30 * 1e-4)
            if ratio > threshold:
                fg += p[i, 1 + k]
            else:
                bg += p[i, 1 + k]
        expected[i] = (weight * fg + (1 - weight) * (1 - bg) - target[i, 0]).square().mean()
    options = {"threshold": threshold, "foreground_weight": weight}
    each = saliency_guided_map_loss(scores, saliency, LABELS, **options, reduction="none")
    torch.testing.assert_close(each, expected)
    torch.testing.assert_close(saliency_guided_map_loss(scores, saliency, LABELS, **options), expected.mean())
    kept = route_by_saliency(p, saliency, LABELS, threshold=threshold)
    maps = estimate_saliency(p, kept, LABELS, foreground_weight=weight)
    torch.testing.assert_close((maps.estimate - target).square().mean((1, 2, 3)), expected)
    assert bool(((maps.estimate >= 0) & (maps.estimate <= 1 + 1e-12)).all())


@given(st.integers(0, 99), st.permutations(range(3)))
def test_constants_and_the_order_of_classes_are_of_no_account(seed: int, order: list[int]) -> None:
    scores, saliency = batch(seed)
    loss = saliency_guided_map_loss(scores, saliency, LABELS)
    shifted = scores + 5 * random(3, 1, 5, 6, seed=seed + 200)
    torch.testing.assert_close(saliency_guided_map_loss(shifted, saliency, LABELS), loss)
    moved = scores[:, [0, *(1 + k for k in order)]]
    torch.testing.assert_close(saliency_guided_map_loss(moved, saliency, LABELS[:, order]), loss)


@given(st.integers(0, 99), st.lists(st.floats(-0.5, 1.5), min_size=2, max_size=2))
def test_fewer_classes_are_kept_as_the_threshold_rises(seed: int, thresholds: list[float]) -> None:
    scores, saliency = batch(seed)
    low, high = (route_by_saliency(scores.softmax(1), saliency, LABELS, threshold=t) for t in sorted(thresholds))
    assert bool((high <= low).all())


def test_limits_of_the_threshold() -> None:
    scores, saliency = batch()
    probability = scores.softmax(1)
    assert not route_by_saliency(probability, saliency, LABELS, threshold=1.0).any()
    assert torch.equal(route_by_saliency(probability, saliency, LABELS, threshold=-1e-9), LABELS > 0)
    everything = torch.ones_like(saliency)
    has_area = (probability[:, 1:] > 0.5).any(3).any(2)
    assert torch.equal(route_by_saliency(probability, everything, LABELS), (LABELS > 0) & has_area)
    assert not route_by_saliency(probability, torch.full_like(saliency, 0.5), LABELS).any()  # not above a half
    halves = torch.full((1, 2, 3, 3), 0.5)
    assert not route_by_saliency(halves, torch.ones(1, 1, 3, 3), torch.ones(1, 1)).any()  # nor is a class
    assert route_by_saliency(halves + 1e-3, torch.ones(1, 1, 3, 3), torch.ones(1, 1)).all()


def test_divisor_grows_with_the_map_or_not() -> None:
    probability = torch.zeros(1, 2, 10, 10)
    probability[0, 1, 0, 0] = 1  # an area of one cell, all salient
    saliency, labels = torch.ones(1, 1, 10, 10), torch.ones(1, 1)
    options = {"threshold": 0.6, "eps": 0.01}
    assert not route_by_saliency(probability, saliency, labels, **options)  # 1 / (1 + 100 * 0.01)
    assert route_by_saliency(probability, saliency, labels, **options, eps_mode="once")


def test_foreground_weight_decides_who_counts() -> None:
    scores, saliency = batch()
    kept = route_by_saliency(scores.softmax(1), saliency, LABELS)
    pushed = scores.clone()
    pushed[:, 1:] += torch.where((LABELS > 0)[:, :, None, None], 0.0, 1.0)  # the absent classes rise
    p, q = scores.softmax(1), pushed.softmax(1)
    foreground = [estimate_saliency(x, kept, LABELS, foreground_weight=1.0) for x in (p, q)]
    torch.testing.assert_close(foreground[0].estimate, foreground[0].foreground)
    background = estimate_saliency(q, kept, LABELS, foreground_weight=0.0)
    torch.testing.assert_close(background.estimate, 1 - background.background)
    assert bool((background.estimate > estimate_saliency(p, kept, LABELS, foreground_weight=0.0).estimate).all())


def test_right_prediction_costs_nothing_and_teaches_all_maps_otherwise() -> None:
    saliency = torch.zeros(1, 1, 4, 4)
    saliency[..., :2] = 1
    right = torch.cat([1 - saliency, saliency, torch.zeros_like(saliency)], 1) * 40
    labels = torch.tensor([[1, 0]])
    assert saliency_guided_map_loss(right, saliency, labels) < 1e-9
    wrong = (0.1 * right.flip(3)).requires_grad_()
    (grad,) = torch.autograd.grad(saliency_guided_map_loss(wrong, saliency, labels), wrong)
    assert all(grad[:, c].any() for c in range(3))


def test_objective_of_the_head() -> None:
    torch.manual_seed(0)
    head, labels = BackgroundAwareCAMHead(6, 3).double(), LABELS.double()
    out = head(random(3, 6, 5, 6))
    torch.testing.assert_close(out.logits, out.scores[:, 1:].mean((2, 3)))
    terms = eps_loss(out.logits, out.scores, batch()[1], labels)
    torch.testing.assert_close(terms.classification, F.multilabel_soft_margin_loss(out.logits, labels))
    torch.testing.assert_close(terms.saliency, saliency_guided_map_loss(out.scores, batch()[1], labels))
    assert terms.total == terms.classification + terms.saliency


def test_an_empty_saliency_rejects_all_classes_and_teaches_background() -> None:
    scores = batch()[0].requires_grad_()
    nothing = torch.zeros(3, 1, 15, 12, dtype=torch.float64)
    assert not route_by_saliency(scores.detach().softmax(1), nothing, LABELS).any()
    (grad,) = torch.autograd.grad(saliency_guided_map_loss(scores, nothing, LABELS), scores)
    assert bool((grad[:, 0] < 0).all())  # a step against it raises the background's map
    assert bool((grad[2, 1:] > 0).all())  # no class is present there


def test_saliency_of_the_same_size_is_not_resampled_and_others_are_read_at_the_nearest_pixel() -> None:
    scores, fine = batch()
    rows, columns = [0, 3, 6, 9, 12], [0, 2, 4, 6, 8, 10]  # floor(i * 15 / 5), floor(i * 12 / 6)
    same = fine[:, :, rows][..., columns]
    loss = saliency_guided_map_loss(scores, fine, LABELS, reduction="none")
    torch.testing.assert_close(saliency_guided_map_loss(scores, same, LABELS, reduction="none"), loss, rtol=0, atol=0)


def test_no_gradient_flows_through_the_routing() -> None:
    scores, saliency = batch()
    kept = route_by_saliency(scores.softmax(1), saliency, LABELS)

    def with_fixed_routing(scores: Tensor) -> Tensor:
        maps = estimate_saliency(scores.softmax(1), kept, LABELS)
        return (maps.estimate - saliency[:, :, ::3, ::2]).square().mean()

    grads = []
    for loss_of in (with_fixed_routing, lambda x: saliency_guided_map_loss(x, saliency, LABELS)):
        leaf = scores.clone().requires_grad_()
        grads.append(torch.autograd.grad(loss_of(leaf), leaf)[0])
    torch.testing.assert_close(*grads)
    maps = scores.softmax(1).requires_grad_()
    assert not route_by_saliency(maps, saliency, LABELS).requires_grad


def test_padding_may_be_left_out() -> None:
    scores, saliency = batch()
    valid = torch.zeros(3, 1, 5, 6, dtype=torch.bool)
    valid[:2, :, :3, :4] = True  # the third image is padding only
    cut = saliency_guided_map_loss(
        scores[..., :3, :4], saliency[:, :, :9, :8], LABELS, eps=2e-4, eps_mode="once", reduction="none"
    )
    options = {"eps": 2e-4, "eps_mode": "once", "reduction": "none"}
    each = saliency_guided_map_loss(scores, saliency, LABELS, valid, **options)
    torch.testing.assert_close(each, torch.cat([cut[:2], cut.new_zeros(1)]))
    fine = valid.repeat_interleave(3, 2).repeat_interleave(2, 3).float()
    torch.testing.assert_close(saliency_guided_map_loss(scores, saliency, LABELS, fine, **options), each)
    everywhere = torch.ones_like(valid)
    whole = saliency_guided_map_loss(scores, saliency, LABELS, **options)
    torch.testing.assert_close(saliency_guided_map_loss(scores, saliency, LABELS, everywhere, **options), whole)
    terms = eps_loss(torch.zeros_like(LABELS).double(), scores, saliency, LABELS, valid, **options)
    torch.testing.assert_close(terms.saliency, each)
    leaf = scores.requires_grad_()
    (grad,) = torch.autograd.grad(saliency_guided_map_loss(leaf, saliency, LABELS, valid), leaf)
    assert not grad[~valid.expand_as(grad)].any()
    assert grad[:2, :, :3, :4].any()


@given(st.integers(0, 99), st.booleans())
def test_loss_equals_the_released_one_by_masks(seed: int, soft: bool) -> None:
    scores, saliency = batch(seed)
    saliency = saliency if soft else saliency.round()
    leaves = [scores.clone().requires_grad_() for _ in range(2)]
    losses = [saliency_guided_map_loss(leaves[0], saliency, LABELS), reference_eps.loss(leaves[1], saliency, LABELS)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(x, y)[0] for x, y in zip(losses, leaves, strict=True)))


SCORES, SALIENCY = (x.float() for x in batch())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: saliency_guided_map_loss(SCORES, SALIENCY, torch.ones(3, 4)),
            ValueError,
            r"labels: expected shape \(3, 3\) to match scores, got \(3, 4\)",
        ),
        (
            lambda: saliency_guided_map_loss(SCORES, SALIENCY[:, 0], LABELS),
            ValueError,
            r"saliency: expected shape \(3, 1, \*, \*\) to match the class maps, got \(3, 15, 12\)",
        ),
        (
            lambda: saliency_guided_map_loss(SCORES, SALIENCY, LABELS, SALIENCY[:, 0]),
            ValueError,
            r"valid: expected shape \(3, 1, \*, \*\) to match the class maps, got \(3, 15, 12\)",
        ),
        (lambda: saliency_guided_map_loss(SCORES.long(), SALIENCY, LABELS), TypeError, "scores: expected a floating"),
        (lambda: saliency_guided_map_loss(SCORES, SALIENCY > 0.5, LABELS), TypeError, "saliency: expected a floating"),
        (
            lambda: SaliencyGuidedMapLoss(foreground_weight=2),
            ValueError,
            r"foreground_weight: expected a number in \[0, 1\], got 2",
        ),
        (lambda: EPSLoss(foreground_weight=-1), ValueError, "foreground_weight: expected a number in"),
        (lambda: EPSLoss(eps_mode="twice"), ValueError, 'eps_mode: expected "pixels" or "once"'),
        (lambda: EPSLoss(reduction="all"), ValueError, 'reduction: expected "mean", "sum" or "none"'),
        (
            lambda: route_by_saliency(SCORES, SALIENCY, LABELS, eps_mode="twice"),
            ValueError,
            'eps_mode: expected "pixels" or "once", got \'twice\'',
        ),
        (
            lambda: estimate_saliency(SCORES, LABELS[:, 1:] > 0, LABELS),
            ValueError,
            r"kept: expected shape \(3, 3\) to match probability, got \(3, 2\)",
        ),
        (
            lambda: EPSLoss()(torch.ones(3, 4), SCORES, SALIENCY, LABELS),
            ValueError,
            r"labels: expected shape \(3, 4\) to match logits, got \(3, 3\)",
        ),
        (
            lambda: BackgroundAwareCAMHead(5, 3)(SCORES),
            ValueError,
            r"features: expected shape \(\*, 5, \*, \*\) for this head, got \(3, 4, 5, 6\)",
        ),
    ],
)
def test_messages(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
