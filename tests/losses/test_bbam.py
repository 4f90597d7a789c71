import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.modules.reference_bbam import looped_objective
from wsss_losses import (
    BoxAttributionLoss,
    MaskTotalVariation,
    SeedGrowingMaskLoss,
    box_attribution_loss,
    mask_total_variation,
    seed_growing_mask_loss,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 99), st.sampled_from([1.0, 2.0, 3.0]), st.booleans())
def test_variation_is_the_sum_over_the_stencil(seed: int, beta: float, diagonal: bool) -> None:
    mask = random(1, 4, 5, seed=seed)
    cells, expected = mask[0].tolist(), 0.0
    for y in range(4):
        for x in range(5):
            for dy, dx, times in ((0, 1, 1), (1, 0, 1), (1, 1, 2 * diagonal), (1, -1, 2 * diagonal)):
                if y + dy < 4 and 0 <= x + dx < 5:
                    expected += times * abs(cells[y][x] - cells[y + dy][x + dx]) ** beta
    found = mask_total_variation(mask, beta=beta, diagonal=diagonal)
    assert found == pytest.approx(expected)


@given(st.integers(0, 99), st.floats(-3, 3), st.sampled_from([1.0, 3.0]))
def test_variation_forgets_what_a_mask_looks_like_from_elsewhere(seed: int, factor: float, beta: float) -> None:
    mask = random(1, 4, 5, seed=seed)
    variation = MaskTotalVariation(beta=beta)
    base = variation(mask)
    for same in (mask.flip(1), mask.flip(2), mask.mT, mask + 5):
        torch.testing.assert_close(variation(same), base)
    torch.testing.assert_close(variation(factor * mask), abs(factor) ** beta * base)
    assert variation(torch.full((1, 3, 3), 0.7)) == 0


def test_mean_variation_averages_each_direction() -> None:
    mask = random(1, 3, 4)
    rows, columns = mask.diff(dim=1).abs().square().mean(), mask.diff(dim=2).abs().square().mean()
    found = mask_total_variation(mask, beta=2.0, diagonal=False, reduction="mean")
    torch.testing.assert_close(found, rows + columns)
    assert mask_total_variation(mask[:, :1, :1], reduction="mean") == 0


def case(seed: int = 0, proposals: int = 3) -> tuple[Tensor, ...]:
    """Detections under the mask, the mask, clean detections, float64."""
    first, second = random(proposals, 4, seed=seed), random(proposals, 16, seed=seed + 1)
    clean = random(proposals, 4, seed=seed + 2), random(proposals, 16, seed=seed + 3)
    return first, second, random(1, 3, 4, seed=seed + 4).sigmoid(), *clean


@given(st.integers(0, 99), st.integers(0, 3))
def test_objective_and_gradient_equal_the_loop_over_proposals(seed: int, label: int) -> None:
    inputs = [x.requires_grad_(k < 3) for k, x in enumerate(case(seed))]
    found = box_attribution_loss(*inputs, torch.tensor(label), area=0.03, tv=0.0).total
    expected = looped_objective(*inputs, label, 0.03)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, inputs[:3]), torch.autograd.grad(expected, inputs[:3]))


@given(st.integers(0, 99))
def test_equal_detections_leave_size_and_roughness(seed: int) -> None:
    logits, deltas, mask, _, _ = case(seed)
    leaves = [x.requires_grad_() for x in (logits, deltas, mask)]
    clean = logits.detach(), deltas.detach()
    found = box_attribution_loss(*leaves, *clean, torch.tensor(1), area=0.03, tv=0.2).total
    rest = 0.03 * mask.sum() + 0.2 * mask_total_variation(mask)
    torch.testing.assert_close(found, rest)
    of_logits, of_deltas, of_mask = torch.autograd.grad(found, leaves)
    assert not of_logits.any()
    assert not of_deltas.any()
    torch.testing.assert_close(of_mask, torch.autograd.grad(rest, mask)[0])


def test_an_image_that_nothing_hides_costs_its_area() -> None:
    logits, deltas, mask, _, _ = case()
    whole = torch.ones_like(mask)
    terms = BoxAttributionLoss(area=0.05)(logits, deltas, whole, logits, deltas, torch.tensor(1))
    assert terms.total == pytest.approx(0.05 * 12)
    assert terms.change == 0


@given(st.permutations(range(3)), st.floats(0, 1), st.floats(0, 1))
def test_order_of_proposals_changes_nothing_and_the_price_only_raises(
    order: list[int], low: float, more: float
) -> None:
    inputs = case()
    classes = torch.tensor([1, 2, 3])
    logits, deltas, mask, clean_logits, clean_deltas = inputs
    base = box_attribution_loss(*inputs, classes, area=low).total
    permuted = (logits[order], deltas[order], mask, clean_logits[order], clean_deltas[order], classes[order])
    torch.testing.assert_close(box_attribution_loss(*permuted, area=low).total, base)
    assert box_attribution_loss(*inputs, classes, area=low + more).total >= base


def test_a_probability_that_rises_is_penalised_too_and_clean_detections_are_constant() -> None:
    _, _, mask, clean_logits, clean_deltas = case()
    surer = clean_logits + torch.tensor([0.0, 9.0, 0.0, 0.0], dtype=torch.float64)
    constant = [x.requires_grad_() for x in (clean_logits, clean_deltas)]
    moved = surer.detach().requires_grad_()
    terms = box_attribution_loss(moved, clean_deltas.detach(), mask, *constant, torch.tensor(1), area=0.0, tv=0.0)
    assert terms.total > 0
    terms.total.backward()
    assert all(x.grad is None for x in constant)


def seeds() -> tuple[Tensor, Tensor]:
    strict, loose = torch.zeros(2, 2, 7, 7, dtype=torch.float64)
    strict[:, 2:4, 2:5], loose[:, 1:6, 1:6] = 1, 1
    return strict, loose


def reference_mask_loss(logits: Tensor, labels: Tensor, strict: Tensor, loose: Tensor, threshold: float) -> Tensor:
    """Pixel by pixel."""
    costs: dict[bool, list[Tensor]] = {True: [], False: []}
    for n, label in enumerate(labels.tolist()):
        if label == 0:
            continue
        z, (height, width) = logits[n, label], strict.shape[1:]
        kind = {}
        for y in range(height):
            for x in range(width):
                q = z[y, x].sigmoid()
                front = (strict[n, y, x] == 1 or q > threshold) and loose[n, y, x] != 0
                back = (loose[n, y, x] == 0 or q < 1 - threshold) and strict[n, y, x] != 1
                kind[y, x] = (front, back)
        for (y, x), found in kind.items():
            near = [(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
            for side, is_object in enumerate((True, False)):
                if found[side] and any(kind.get(place, (False, False))[side] for place in near):
                    costs[is_object].append(F.softplus(-z[y, x] if is_object else z[y, x]))
    if not all(costs.values()):
        return 0 * logits.sum()
    return sum(torch.stack(own).mean() for own in costs.values()) / 2


@given(st.integers(0, 99), st.sampled_from([0.6, 0.9, 1.0]))
def test_mask_loss_equals_the_loop_over_pixels(seed: int, threshold: float) -> None:
    logits = (3 * random(2, 3, 7, 7, seed=seed)).requires_grad_()
    labels = torch.tensor([[2, 1], [0, 2], [1, 0]][seed % 3])
    found = seed_growing_mask_loss(logits, labels, *seeds(), threshold=threshold)
    expected = reference_mask_loss(logits, labels, *seeds(), threshold)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits))


def test_only_chosen_pixels_have_a_gradient() -> None:
    strict, loose = seeds()
    logits = torch.zeros(2, 3, 7, 7, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(seed_growing_mask_loss(logits, torch.tensor([2, 0]), strict, loose), logits)
    assert torch.equal(grad[0, 2] < 0, strict[0] == 1)
    assert torch.equal(grad[0, 2] > 0, loose[0] == 0)
    assert not grad[0, :2].any()
    assert not grad[1].any()


def test_a_lonely_pixel_is_no_seed() -> None:
    strict, loose = torch.zeros(1, 5, 5), torch.ones(1, 5, 5)
    strict[0, 2, 2], loose[0, 0] = 1, 0
    logits, label = torch.full((1, 2, 5, 5), -2.0), torch.tensor([1])
    assert seed_growing_mask_loss(logits, label, strict, loose) == 0
    strict[0, 3, 3] = 1
    pair = seed_growing_mask_loss(logits, label, strict, loose)
    torch.testing.assert_close(pair, (F.softplus(torch.tensor(2.0)) + F.softplus(torch.tensor(-2.0))) / 2)


@pytest.mark.parametrize("kind", ["only object", "only background"])
def test_seeds_of_one_side_alone_cost_nothing(kind: str) -> None:
    strict, loose = seeds()
    strict, loose = (strict, torch.ones_like(loose)) if kind == "only object" else (torch.zeros_like(strict), loose)
    logits = torch.zeros(2, 3, 7, 7, dtype=torch.float64, requires_grad=True)
    loss = seed_growing_mask_loss(logits, torch.tensor([2, 1]), strict, loose)
    assert loss == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_without_loose_masks_all_else_is_background_and_an_empty_half_is_0() -> None:
    strict, _ = seeds()
    logits, labels = random(2, 3, 7, 7), torch.tensor([1, 2])
    own = torch.stack([logits[0, 1], logits[1, 2]])
    halves = F.softplus(-own[strict == 1]).mean(), F.softplus(own[strict == 0]).mean()
    torch.testing.assert_close(SeedGrowingMaskLoss()(logits, labels, strict), sum(halves) / 2)
    leaf = logits.requires_grad_()
    empty = seed_growing_mask_loss(leaf, labels, torch.zeros_like(strict))
    torch.testing.assert_close(empty, F.softplus(own).mean() / 2)
    assert torch.autograd.grad(empty, leaf)[0].isfinite().all()


LOGITS, DELTAS, MASK, CLEAN_LOGITS, CLEAN_DELTAS = case()
STRICT, LOOSE = seeds()
HEAD, LABELS = random(2, 3, 7, 7), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mask_total_variation(MASK.long()), TypeError, r"mask: expected a floating"),
        (lambda: mask_total_variation(MASK, reduction="none"), ValueError, r'reduction: expected "sum" or "mean"'),
        (lambda: MaskTotalVariation(beta=0), ValueError, r"beta: expected above 0, got 0"),
        (lambda: mask_total_variation(MASK[0, 0]), ValueError, r"mask: expected shape \(\.\.\., h, w\)"),
        (
            lambda: box_attribution_loss(LOGITS, DELTAS[:, :4], MASK, CLEAN_LOGITS, CLEAN_DELTAS, LABELS[0]),
            ValueError,
            r"deltas: expected shape \(3, 16\) to match logits",
        ),
        (
            lambda: box_attribution_loss(LOGITS, DELTAS, MASK[0], CLEAN_LOGITS, CLEAN_DELTAS, LABELS[0]),
            ValueError,
            r"mask: expected shape \(1, \*, \*\) of one object",
        ),
        (
            lambda: box_attribution_loss(LOGITS, DELTAS, MASK, CLEAN_LOGITS, CLEAN_DELTAS, LABELS),
            ValueError,
            r"classes: expected shape \(3,\) to match logits",
        ),
        (lambda: BoxAttributionLoss(area=-1), ValueError, r"area: expected at least 0, got -1"),
        (lambda: BoxAttributionLoss(tv_beta=0), ValueError, r"tv_beta: expected above 0, got 0"),
        (lambda: seed_growing_mask_loss(HEAD, LABELS, STRICT[:1]), ValueError, r"strict: expected shape \(2, 7, 7\)"),
        (lambda: seed_growing_mask_loss(HEAD, LABELS[:1], STRICT), ValueError, r"labels: expected shape \(2,\)"),
        (lambda: seed_growing_mask_loss(HEAD[0], LABELS, STRICT), ValueError, r"logits: expected shape \(n, C, m, m\)"),
        (lambda: SeedGrowingMaskLoss(threshold=2), ValueError, r"threshold: expected a number in \[0, 1\], got 2"),
    ],
)
def test_messages_name_argument_expected_and_given(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
