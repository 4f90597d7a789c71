import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.losses import reference_c2am as reference
from wsss_losses import C2AMLoss, SimMaxLoss, SimMinLoss, c2am_loss, sim_max_loss, sim_min_loss
from wsss_modules import Disentangler, pool_two_regions

rows = st.integers(1, 24)
seeds = st.integers(0, 99)


def random_rows(count: int, seed: int = 0, channels: int = 12, signed: bool = False) -> Tensor:
    """Features as after a ReLU: about half of them 0, or signed ones with many similarities below the clamp."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, generator=generator, dtype=torch.float64)
    return x if signed else x.relu() + 0.01


@given(rows, rows, seeds, st.booleans())
def test_sim_min_equals_the_released_form_and_is_symmetric(n: int, m: int, seed: int, signed: bool) -> None:
    bg, fg = random_rows(n, seed, signed=signed), random_rows(m, seed + 1, signed=signed)
    torch.testing.assert_close(sim_min_loss(bg, fg), reference.sim_min(bg, fg))
    torch.testing.assert_close(sim_min_loss(bg, fg), sim_min_loss(fg, bg))


@given(rows, seeds, st.sampled_from([0.0, 0.05, 0.25, 1.0, 4.0]), st.booleans())
def test_sim_max_equals_the_double_sort_of_the_released_form(n: int, seed: int, alpha: float, signed: bool) -> None:
    features = random_rows(n, seed, signed=signed).requires_grad_()
    loss, released = sim_max_loss(features, alpha=alpha, min_weight=0), reference.sim_max(features, alpha)
    torch.testing.assert_close(loss, released)
    torch.testing.assert_close(*(torch.autograd.grad(value, features)[0] for value in (loss, released)))


@given(seeds, st.integers(1, 4))
def test_sim_max_with_ties_equals_the_released_form(seed: int, copies: int) -> None:
    features = random_rows(5, seed).repeat(copies, 1)
    torch.testing.assert_close(sim_max_loss(features, min_weight=0), reference.sim_max(features, 0.25))


@given(st.integers(2, 24), seeds)
def test_losses_do_not_depend_on_the_order_or_the_length_of_rows(n: int, seed: int) -> None:
    fg, bg = random_rows(n, seed), random_rows(n, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    lengths = torch.rand(n, 1, generator=generator, dtype=torch.float64) * 100 + 1e-3
    expected = c2am_loss(fg, bg)
    torch.testing.assert_close(c2am_loss(fg[order], bg[order]), expected)
    torch.testing.assert_close(c2am_loss(fg * lengths, bg * lengths.flip(0)), expected)


@given(st.integers(2, 24), seeds)
def test_alpha_0_is_the_plain_mean(n: int, seed: int) -> None:
    features = random_rows(n, seed)
    cost = -torch.log(reference.clamped_cosine(features, features))
    torch.testing.assert_close(sim_max_loss(features, alpha=0), cost.mean())
    others = cost[~torch.eye(n, dtype=torch.bool)]
    torch.testing.assert_close(sim_max_loss(features, alpha=0, normalize="pairs"), others.mean())
    torch.testing.assert_close(sim_max_loss(features, alpha=0, normalize="weights"), others.mean())


@given(st.integers(2, 24), seeds, st.floats(0, 2), st.floats(0.01, 1))
def test_pull_of_other_rows_falls_with_alpha(n: int, seed: int, alpha: float, step: float) -> None:
    features = random_rows(n, seed)
    lower, higher = (sim_max_loss(features, alpha=a, normalize="pairs", min_weight=0) for a in (alpha + step, alpha))
    assert lower <= higher * (1 + 1e-12)


@given(st.integers(1, 24), seeds, st.floats(0.01, 2))
def test_large_weights_meet_small_costs(n: int, seed: int, alpha: float) -> None:
    features = random_rows(n, seed)
    weighted = sim_max_loss(features, alpha=alpha, reduction="none", min_weight=0)
    cost = -torch.log(reference.clamped_cosine(features, features)).sum(1)
    mean_weight = torch.exp(-alpha * (torch.arange(n) - 1.0)).mean()
    assert bool((weighted <= mean_weight * cost * (1 + 1e-6)).all())


@given(st.integers(70, 140), seeds)
def test_leaving_out_small_weights_changes_nothing_that_counts(n: int, seed: int) -> None:
    features = random_rows(n, seed).requires_grad_()
    loss, full = sim_max_loss(features), sim_max_loss(features, min_weight=0)
    torch.testing.assert_close(loss, full, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(value, features)[0] for value in (loss, full)]
    # measured 1.7e-6: the slope 1/s of a far pair lifts its weight of 1e-7
    torch.testing.assert_close(*grads, rtol=0, atol=1e-5 * grads[1].abs().max().item())


@pytest.mark.parametrize("neighbours", [2, 5, 20])
def test_min_weight_keeps_exactly_the_ranks_that_weigh_as_much(neighbours: int) -> None:
    features, weight = random_rows(40), math.exp(-0.25 * (neighbours - 1))
    for factor, kept in ((0.999, neighbours), (1.001, neighbours - 1)):
        by_count = sim_max_loss(features, topk=kept, min_weight=0)
        assert torch.equal(sim_max_loss(features, min_weight=factor * weight), by_count)


def test_topk_pulls_the_nearest_only() -> None:
    a = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.3, 0.0], [0.0, 0.4, 1.0]], dtype=torch.float64, requires_grad=True)
    similarity = reference.clamped_cosine(a, a)
    nearest = torch.stack([similarity[0, 1], similarity[1, 0], similarity[2, 1]])
    loss = sim_max_loss(a, topk=1, normalize="weights")
    torch.testing.assert_close(loss, -nearest.log().mean())


@pytest.mark.parametrize("normalize", ["n2", "pairs", "weights"])
def test_reductions_of_the_pull_belong_together(normalize: str) -> None:
    features, n = random_rows(9), 9
    options = {"normalize": normalize, "min_weight": 0}
    each = sim_max_loss(features, reduction="none", **options)
    assert each.shape == (n,)
    torch.testing.assert_close(sim_max_loss(features, reduction="sum", **options), each.sum())
    weights = sum(math.exp(-0.25 * (rank - 1)) for rank in range(1, n))
    divisor = {"n2": n * n, "pairs": n * (n - 1), "weights": n * weights}[normalize]
    torch.testing.assert_close(sim_max_loss(features, **options), each.sum() / divisor)


def test_reductions_of_the_push_belong_together() -> None:
    bg, fg = random_rows(4), random_rows(6, seed=1)
    each = sim_min_loss(bg, fg, reduction="none")
    torch.testing.assert_close(each, -torch.log(1 - reference.clamped_cosine(bg, fg)).sum(1))
    torch.testing.assert_close(sim_min_loss(bg, fg, reduction="sum"), each.sum())
    torch.testing.assert_close(sim_min_loss(bg, fg), each.sum() / 24)


def test_released_mean_and_that_over_pairs_differ_by_the_rows_themselves() -> None:
    features, n, alpha = random_rows(11), 11, 0.25
    itself = math.exp(alpha) * -math.log(0.9995) / n
    pairs = sim_max_loss(features, normalize="pairs")
    torch.testing.assert_close(sim_max_loss(features), pairs * (n - 1) / n + itself)


def test_pull_shrinks_with_the_batch_but_not_its_weighted_mean() -> None:
    # what every row sees: one cosine to all others, whatever their number
    def even(n: int) -> Tensor:
        return torch.eye(n, dtype=torch.float64) + 0.2

    balance = {}
    for n in (16, 32, 64, 128, 256):
        features, alpha = even(n), 0.25
        cost = -torch.log(reference.clamped_cosine(features, features)[0, 1])
        torch.testing.assert_close(sim_max_loss(features, normalize="weights"), cost, rtol=1e-6, atol=0)
        constant = math.exp(alpha) * -math.log(0.9995) / n
        balance[n] = ((sim_max_loss(features) - constant) / cost).item()
    assert balance == pytest.approx({16: 0.276, 32: 0.141, 64: 0.071, 128: 0.035, 256: 0.018}, abs=5e-4)


def test_weighted_mean_with_its_weight_is_the_released_objective_at_128() -> None:
    fg, bg = random_rows(128), random_rows(128, seed=1)
    released, ours = c2am_loss(fg, bg), c2am_loss(fg, bg, normalize="weights", pull_weight=0.0353)
    torch.testing.assert_close(ours.total - ours.push, released.total - released.push, rtol=2e-3, atol=1e-5)


def islands(members: int) -> Tensor:
    """Two groups of like rows: similarity about 0.98 within, about 0.3 across."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.zeros(2, 16, dtype=torch.float64)
    centres[0, :8], centres[1, 6:14] = 1, 1
    noise = 0.15 * torch.rand(2 * members, 16, generator=generator, dtype=torch.float64)
    return centres.repeat_interleave(members, 0) + noise


@pytest.mark.parametrize(("members", "alpha", "meet"), [(40, 0.25, False), (4, 0.25, True), (40, 0.03, True)])
def test_islands_larger_than_the_neighbourhood_never_meet(members: int, alpha: float, meet: bool) -> None:
    x = islands(members)

    def across(x: Tensor) -> float:
        return reference.clamped_cosine(x[:members], x[members:]).mean().item()

    start = across(x)
    x.requires_grad_()
    for _ in range(150):
        (grad,) = torch.autograd.grad(sim_max_loss(x, alpha=alpha, normalize="weights"), x)
        with torch.no_grad():  # the same pace whatever the number of rows
            x -= 0.5 * members * grad
            x.clamp_(min=0)
    assert start < 0.4
    assert (across(x.detach()) > 0.9) is meet
    assert meet or across(x.detach()) < start + 0.1


def test_objective_is_the_sum_of_its_terms() -> None:
    fg, bg = random_rows(10), random_rows(10, seed=1)
    terms = c2am_loss(fg, bg, alpha=0.1, pull_weight=0.5)
    torch.testing.assert_close(terms.pull_fg, sim_max_loss(fg, alpha=0.1))
    torch.testing.assert_close(terms.pull_bg, sim_max_loss(bg, alpha=0.1))
    torch.testing.assert_close(terms.push, sim_min_loss(bg, fg))
    torch.testing.assert_close(terms.total, terms.push + 0.5 * (terms.pull_fg + terms.pull_bg))


@pytest.mark.parametrize("normalize", ["n2", "pairs", "weights"])
def test_single_image_has_no_pull(normalize: str) -> None:
    features = random_rows(1).requires_grad_()
    loss = sim_max_loss(features, normalize=normalize)
    (grad,) = torch.autograd.grad(loss, features)
    assert not grad.any()
    expected = math.exp(0.25) * -math.log(0.9995) if normalize == "n2" else 0.0
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("normalize", ["n2", "pairs", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch_costs_nothing(normalize: str, reduction: str) -> None:
    features = torch.zeros(0, 6, requires_grad=True)
    for loss in (
        sim_max_loss(features, normalize=normalize, reduction=reduction),
        sim_min_loss(features, features, reduction=reduction),
    ):
        assert loss.sum() == 0
        assert torch.autograd.grad(loss.sum(), features)[0].shape == (0, 6)


def test_image_without_features_is_as_far_as_can_be_and_learns_nothing() -> None:
    features = random_rows(5)
    features[2] = 0
    features.requires_grad_()
    rows = sim_max_loss(features, reduction="none")
    weights = torch.exp(-0.25 * (torch.arange(5.0) - 1)).sum()
    assert rows[2].item() == pytest.approx(-math.log(0.0005) * weights.item())
    grads = torch.autograd.grad(rows.sum() + sim_min_loss(features, random_rows(5, seed=1)), features)[0]
    assert grads.isfinite().all()
    assert not grads[2].any()
    assert bool(grads[[0, 1, 3, 4]].any(1).all())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_map_that_has_all_or_nothing_leaves_a_finite_objective(value: float) -> None:
    features = random_rows(4 * 9).view(4, 9, 12).mT.reshape(4, 12, 3, 3).requires_grad_()
    terms = c2am_loss(*pool_two_regions(features, torch.full((4, 1, 3, 3), value, dtype=torch.float64)))
    assert all(term.isfinite() for term in terms)
    (grad,) = torch.autograd.grad(terms.total, features)
    assert grad.isfinite().all()
    assert grad.any(), "of the region that has the features"


def test_duplicates_share_a_finite_gradient() -> None:
    features = random_rows(6).repeat(3, 1).requires_grad_()
    (grad,) = torch.autograd.grad(sim_max_loss(features), features)
    (released,) = torch.autograd.grad(reference.sim_max(features, 0.25), features)
    assert grad.isfinite().all()
    # which of the twins a tie gives the weight to is open, what they get together is not
    torch.testing.assert_close(grad.view(3, 6, -1).sum(0), released.view(3, 6, -1).sum(0))


def test_clamped_pairs_send_nothing_back() -> None:
    alike = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    assert not torch.autograd.grad(sim_max_loss(alike), alike)[0].any()
    apart = torch.eye(2, dtype=torch.float64, requires_grad=True)
    assert not torch.autograd.grad(sim_min_loss(apart[:1], apart[1:]), apart)[0].any()


@pytest.mark.parametrize("normalize", ["n2", "pairs", "weights"])
def test_gradcheck_of_more_than_two_images(normalize: str) -> None:
    fg, bg = (random_rows(n, seed=n, channels=5).requires_grad_() for n in (6, 6))
    options = {"normalize": normalize, "alpha": 0.5, "topk": 4}
    assert gradcheck(lambda fg, bg: c2am_loss(fg, bg, **options), (fg, bg))
    assert gradgradcheck(lambda fg: sim_max_loss(fg, **options), (fg,))


def test_training_the_head_finds_the_object() -> None:
    torch.manual_seed(0)
    # objects at any place on backgrounds, each image with its own strength
    mask = torch.zeros(24, 1, 10, 10)
    for image, (y, x) in zip(mask, torch.randint(2, 5, (24, 2)).tolist(), strict=True):
        image[0, y : y + 4, x : x + 4] = 1
    object_like, ground_like = torch.rand(2, 8).relu()
    features = mask * object_like[:, None, None] + (1 - mask) * ground_like[:, None, None]
    features = (features * (0.5 + torch.rand(24, 1, 1, 1)) + 0.1 * torch.rand(24, 8, 10, 10)).relu()
    head, criterion = Disentangler(8), C2AMLoss(normalize="weights", pull_weight=0.1)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    costs = []
    for _ in range(60):
        out = head(features)
        terms = criterion(out.fg, out.bg)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        costs.append(terms.total.item())
    inside, outside = (out.probability[mask.bool()], out.probability[~mask.bool()])
    assert costs[-1] < 0.8 * costs[0]
    assert abs(inside.mean() - outside.mean()) > 0.5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: sim_max_loss(x[0]), ValueError, r"features: expected shape \(N, D\), got \(12,\)"),
        (lambda x: sim_max_loss(x.long()), TypeError, r"features: expected a floating-point tensor, got torch.int64"),
        (lambda x: sim_max_loss(x, alpha=-1), ValueError, r"alpha: expected at least 0, got -1"),
        (lambda x: sim_max_loss(x, topk=0), ValueError, r"topk: expected at least 1, got 0"),
        (lambda x: sim_max_loss(x, min_weight=1), ValueError, r"min_weight: expected at least 0 and below 1, got 1"),
        (lambda x: sim_max_loss(x, normalize="n"), ValueError, r"normalize: expected 'n2', 'pairs' or 'weights'"),
        (lambda x: sim_max_loss(x, reduction="max"), ValueError, r"reduction: expected .mean., .sum. or .none."),
        (lambda x: sim_min_loss(x, x[:, 1:]), ValueError, r"fg: expected shape \(\*, 12\) to match bg, got \(4, 11\)"),
        (lambda x: sim_min_loss(x, x.long()), TypeError, r"fg: expected a floating-point tensor"),
        (lambda x: c2am_loss(x, x[1:]), ValueError, r"bg: expected shape \(4, 12\) to match fg, got \(3, 12\)"),
        (lambda x: c2am_loss(x, x, pull_weight=-1), ValueError, r"pull_weight: expected at least 0, got -1"),
        (lambda x: C2AMLoss(pull_weight=-1), ValueError, r"pull_weight: expected at least 0, got -1"),
        (lambda x: C2AMLoss(alpha=-0.1), ValueError, r"alpha: expected at least 0, got -0.1"),
        (lambda x: SimMaxLoss(normalize="none"), ValueError, r"normalize: expected"),
        (lambda x: SimMinLoss(reduction="all"), ValueError, r"reduction: expected"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_messages(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(random_rows(4))
