import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.losses import reference_spatial_bce as reference
from wsss_losses import (
    SpatialBCELoss,
    SpatialBCEThresholdLoss,
    foreground_ratio_kl_loss,
    spatial_bce_loss,
    spatial_bce_threshold_loss,
)
from wsss_modules import mean_threshold, rank_threshold

seeds = st.integers(0, 2**16)
probabilities = st.floats(0.01, 0.99)


def random_case(seed: int, batch: int = 2, classes: int = 3, height: int = 4, width: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, classes, height, width, generator=generator, dtype=torch.float64)
    labels = torch.rand(batch, classes, generator=generator) < 0.5
    labels[0, 0] = True
    return logits, labels


def one_map(*logits: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(logits, dtype=dtype).view(1, 1, 1, -1)


def level(*t: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([t], dtype=dtype)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


PRESENT = torch.ones(1, 1)


@given(seeds)
def test_losses_equal_the_loops_over_pixels(seed: int) -> None:
    logits, labels = random_case(seed)
    branch, _ = random_case(seed + 1, height=2, width=3)
    ratio = 0.05 + 0.9 * torch.rand(labels.shape, dtype=torch.float64)
    t = rank_threshold(logits.sigmoid(), ratio)
    close = {"rel": 1e-9, "abs": 1e-12}
    assert spatial_bce_loss(logits, labels, t).item() == pytest.approx(
        reference.spatial_bce_loss(logits, labels, t), **close
    )
    assert spatial_bce_threshold_loss(branch, labels, logits).item() == pytest.approx(
        reference.spatial_bce_threshold_loss(branch, labels, logits), **close
    )
    assert foreground_ratio_kl_loss(logits, labels, ratio).item() == pytest.approx(
        reference.foreground_ratio_kl_loss(logits, labels, ratio), rel=1e-7, abs=1e-9
    )


@given(st.floats(-20, 20), probabilities)
def test_cost_of_a_present_pixel_lies_between_0_and_1_and_peaks_at_the_threshold(x: float, t: float) -> None:
    cost = spatial_bce_loss(one_map(x), PRESENT, level(t), reduction="none")
    assert 0 <= cost.item() <= 1
    at_threshold = spatial_bce_loss(one_map(math.log(t / (1 - t))), PRESENT, level(t), reduction="none")
    torch.testing.assert_close(at_threshold, torch.ones_like(at_threshold))
    assert cost.item() <= at_threshold.item() + 1e-12


def test_cost_is_0_at_both_ends() -> None:
    cost = spatial_bce_loss(one_map(-60, 60), PRESENT, level(0.3), reduction="none")
    torch.testing.assert_close(cost, torch.zeros_like(cost), rtol=0, atol=1e-20)


@given(seeds)
def test_descent_lowers_what_is_below_the_threshold_and_raises_what_is_above(seed: int) -> None:
    logits, labels = random_case(seed)
    leaf = logits.requires_grad_()
    t = torch.rand(labels.shape, dtype=torch.float64)
    grad = gradient(spatial_bce_loss(leaf, labels, t), leaf)
    present = labels[:, :, None, None].expand_as(grad)
    above = leaf.sigmoid() > t[:, :, None, None]
    assert (grad[present & above] < 0).all()
    assert (grad[present & ~above] > 0).all()
    assert (grad[~present] > 0).all()


def test_force_on_a_probability_grows_linearly_with_its_distance_from_the_threshold() -> None:
    prob = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8], dtype=torch.float64)
    leaf = torch.logit(prob).view(1, 1, 1, -1).requires_grad_()
    loss = spatial_bce_loss(leaf, PRESENT, level(0.4), reduction="sum")
    by_prob = gradient(loss, leaf).flatten() / (prob * (1 - prob))
    wanted = torch.where(prob <= 0.4, 2 * (0.4 - prob) / 0.4**2, -2 * (prob - 0.4) / 0.6**2)
    torch.testing.assert_close(by_prob, wanted, rtol=1e-6, atol=1e-6)


@given(seeds)
def test_order_of_pixels_does_not_matter_and_classes_move_together(seed: int) -> None:
    logits, labels = random_case(seed)
    branch, ratio = logits.flip(0, 2), 0.5 * torch.rand(labels.shape, dtype=torch.float64)
    t = rank_threshold(logits.sigmoid(), ratio)
    pixels = torch.randperm(20)
    moved = logits.flatten(2)[..., pixels].view_as(logits)
    classes = torch.randperm(3)
    for same in (
        (spatial_bce_loss(x, y, u) for x, y, u in ((logits, labels, t), (moved, labels, t))),
        (spatial_bce_loss(x[:, c], labels[:, c], t[:, c]) for x, c in ((logits, slice(None)), (logits, classes))),
        (spatial_bce_threshold_loss(branch, labels, x) for x in (logits, moved)),
        (spatial_bce_threshold_loss(branch[:, c], labels[:, c], logits[:, c]) for c in (slice(None), classes)),
        (foreground_ratio_kl_loss(x, labels, ratio) for x in (logits, moved)),
        (foreground_ratio_kl_loss(logits[:, c], labels[:, c], ratio[:, c]) for c in (slice(None), classes)),
    ):
        first, second = same
        torch.testing.assert_close(first, second)
    probabilities = logits.sigmoid().flatten(2)[..., pixels].view_as(logits)  # a moved logit's can be a bit off
    torch.testing.assert_close(rank_threshold(probabilities, ratio), t, rtol=0, atol=0)


def test_network_step_gives_the_threshold_no_gradient_and_the_threshold_step_none_to_the_network() -> None:
    logits, labels = random_case(0)
    logits.requires_grad_()
    branch = torch.zeros(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    network = spatial_bce_loss(logits, labels, mean_threshold(branch))
    assert torch.autograd.grad(network, (logits, branch), allow_unused=True)[1] is None
    threshold = spatial_bce_threshold_loss(branch, labels, logits)
    to_branch, to_logits = torch.autograd.grad(threshold, (branch, logits), allow_unused=True)
    assert to_branch.any()
    assert to_logits is None


def test_threshold_settles_where_the_forces_of_both_sides_balance() -> None:
    logits = one_map(-3, -2.5, -2, 1, 2)
    branch = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64, requires_grad=True)
    for _ in range(300):
        branch.data -= gradient(spatial_bce_threshold_loss(branch, PRESENT, logits), branch)
    t, p = branch.sigmoid().item(), logits.sigmoid().flatten()
    low, high = p[p <= t], p[p > t]
    assert len(low) == 3
    upwards = (2 * low * (t - low) / t**3).mean()  # mean of -dh/dt below
    downwards = (2 * (high - t) * (1 - high) / (1 - t) ** 3).mean()  # mean of dh/dt above
    torch.testing.assert_close(upwards, downwards, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("threshold_logit", "side"), [(8.0, "below"), (-8.0, "above")])
def test_side_without_a_pixel_costs_nothing_and_the_threshold_leaves_the_other(
    threshold_logit: float, side: str
) -> None:
    logits = one_map(-1, 0, 1)
    branch = torch.full((1, 1, 1, 1), threshold_logit, dtype=torch.float64, requires_grad=True)
    t, p = branch.sigmoid().item(), logits.sigmoid().flatten().tolist()
    assert all((x <= t) == (side == "below") for x in p)
    loss = spatial_bce_threshold_loss(branch, PRESENT, logits)
    assert loss.item() == pytest.approx(sum(reference.distance(x, t) for x in p) / 3)
    grad = gradient(loss, branch)
    assert grad.isfinite().all()
    assert (grad < 0).all() if side == "below" else (grad > 0).all()


def test_predicted_threshold_below_the_least_one_is_read_as_that() -> None:
    branch = torch.full((1, 1, 1, 1), -30.0, requires_grad=True)
    logits = one_map(-1, 0, 1, dtype=torch.float32)
    loss = spatial_bce_threshold_loss(branch, PRESENT, logits)
    raised = torch.full((1, 1, 1, 1), math.log(1e-4 / (1 - 1e-4)))
    torch.testing.assert_close(loss, spatial_bce_threshold_loss(raised, PRESENT, logits))
    assert not gradient(loss, branch).any()


@pytest.mark.parametrize("loss", [spatial_bce_threshold_loss, foreground_ratio_kl_loss])
def test_batch_without_a_present_class_gives_an_attached_0(loss) -> None:
    logits, labels = random_case(0)
    leaf, third = logits.requires_grad_(), logits.detach() if loss is spatial_bce_threshold_loss else labels.double()
    result = loss(leaf, torch.zeros_like(labels), third)
    assert result == 0
    assert not gradient(result, leaf).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_certain_pixels_of_an_absent_class_are_pushed_down_with_full_force(dtype: torch.dtype) -> None:
    leaf = one_map(30, 50, dtype=dtype).requires_grad_()
    loss = spatial_bce_loss(leaf, torch.zeros(1, 1), level(0.5), reduction="none")
    torch.testing.assert_close(loss, leaf.detach())  # with the released log_floor: 18.42, and no gradient
    torch.testing.assert_close(gradient(loss.sum(), leaf), torch.ones_like(leaf))


@given(seeds, st.sampled_from([1.0, 3.0, 20.0]), st.sampled_from([1e-8, 1e-3]))
def test_log_floor_is_the_released_logarithm_with_its_dead_gradient(seed: int, gain: float, floor: float) -> None:
    logits, labels = random_case(seed)
    leaf, t = (gain * logits).requires_grad_(), torch.full(labels.shape, 0.4, dtype=torch.float64)
    loss = spatial_bce_loss(leaf, labels, t, log_floor=floor, reduction="none")
    exact = spatial_bce_loss(leaf, labels, t, reduction="none").detach()
    absent = ~labels[:, :, None, None].expand_as(loss)
    for value, x in zip(loss[absent].tolist(), leaf[absent].tolist(), strict=True):
        # below 1e-12 measured
        assert value == pytest.approx(-math.log(max(1 - reference.sigmoid(x), floor)), rel=1e-10, abs=1e-12)
    torch.testing.assert_close(loss[~absent], exact[~absent], rtol=0, atol=0)
    grad = gradient(loss.sum(), leaf)
    below = absent & (1 - leaf.sigmoid() < floor)
    assert not grad[below].any()
    assert grad[absent & ~below].all()


def test_pixel_whose_probability_rounds_to_1_is_still_raised() -> None:
    leaf = one_map(20, 40, dtype=torch.float32).requires_grad_()
    assert (leaf.sigmoid() == 1).all()
    grad = gradient(spatial_bce_loss(leaf, PRESENT, level(0.5), reduction="sum"), leaf)
    p = -leaf.detach().double()
    torch.testing.assert_close(grad.double(), -4 * p.exp(), rtol=1e-6, atol=0)  # -2 (p - t) / (1 - t)^2 * p (1 - p)


@given(st.floats(-50, 50), st.sampled_from([0.0, 1e-5, 0.5, 0.99995, 1.0]))
def test_extreme_logits_and_thresholds_stay_finite(x: float, t: float) -> None:
    leaf = one_map(x, -x, dtype=torch.float32).requires_grad_()
    loss = spatial_bce_loss(leaf, PRESENT, level(t, dtype=torch.float32))
    assert loss.isfinite()
    assert gradient(loss, leaf).isfinite().all()


def test_above_a_threshold_near_1_the_cost_is_the_product_form() -> None:
    t, x = 0.99999, 14.0
    p = reference.sigmoid(x)
    cost = spatial_bce_loss(one_map(x), PRESENT, level(t), reduction="none").item()
    assert p > t
    assert cost == pytest.approx((1 - p) * (1 - 2 * t + p) / 1e-8, rel=1e-6)
    assert cost < 0.02  # the square form would give 0.99


def test_pixel_at_the_threshold_is_on_the_low_side_and_feels_no_force() -> None:
    leaf = one_map(0.3, 0.3, 0.3).requires_grad_()  # a constant map: all pixels are the threshold
    t = rank_threshold(leaf.sigmoid(), level(0.5))
    loss = spatial_bce_loss(leaf, PRESENT, t)
    torch.testing.assert_close(loss, torch.ones_like(loss))
    torch.testing.assert_close(gradient(loss, leaf), torch.zeros_like(leaf), rtol=0, atol=1e-15)
    # of two pixels at t and none above, the threshold step sees two below
    branch = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64)
    assert spatial_bce_threshold_loss(branch, PRESENT, leaf).item() == pytest.approx(1.0)


def test_one_pixel_is_enough() -> None:
    leaf = one_map(0.2).requires_grad_()
    t = rank_threshold(leaf.sigmoid(), level(0.7))
    assert t == leaf.sigmoid().view(1, 1)
    for loss in (
        spatial_bce_loss(leaf, PRESENT, t),
        spatial_bce_threshold_loss(leaf, PRESENT, leaf),
        foreground_ratio_kl_loss(leaf, PRESENT, level(0.7)),
    ):
        assert gradient(loss, leaf).isfinite().all()


@given(seeds, probabilities)
def test_divergence_is_positive_and_0_only_where_the_mean_is_the_prior(seed: int, q: float) -> None:
    logits, _ = random_case(seed, 1, 1)
    assert foreground_ratio_kl_loss(logits, PRESENT, level(q)) >= -1e-9
    mean = logits.sigmoid().mean((2, 3))
    torch.testing.assert_close(
        foreground_ratio_kl_loss(logits, PRESENT, mean), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-9
    )
    if (mean - q).abs() > 1e-3:
        assert foreground_ratio_kl_loss(logits, PRESENT, level(q)) > 1e-7


def test_divergence_from_a_prior_of_0_or_1_is_finite_and_points_there() -> None:
    for q, sign in ((0.0, 1), (1.0, -1)):
        leaf = one_map(0, 1).requires_grad_()
        loss = foreground_ratio_kl_loss(leaf, PRESENT, level(q))
        share = leaf.sigmoid().mean().item()
        share = share if q == 0 else 1 - share
        entropy = share * math.log(share) + (1 - share) * math.log(1 - share)
        assert loss.item() == pytest.approx(10 * math.log(10) * share + entropy)  # log 1e10 = 23
        assert (gradient(loss, leaf).sign() == sign).all()


def test_divergence_of_certain_maps_keeps_its_gradient() -> None:
    leaf = one_map(25, 30, dtype=torch.float32).requires_grad_()
    assert (leaf.sigmoid() == 1).all()
    assert (gradient(foreground_ratio_kl_loss(leaf, PRESENT, level(0.2, dtype=torch.float32)), leaf) > 0).all()


def test_absent_classes_may_hold_anything_in_the_threshold_and_ratio_terms() -> None:
    logits, labels = random_case(3)
    branch, ratio = logits.flip(1), 0.3 * labels.double()
    hidden = torch.where(labels[:, :, None, None], logits, float("inf"))
    for loss, changed in (
        (spatial_bce_threshold_loss(branch, labels, logits), spatial_bce_threshold_loss(branch, labels, hidden)),
        (foreground_ratio_kl_loss(logits, labels, ratio), foreground_ratio_kl_loss(hidden, labels, ratio)),
    ):
        torch.testing.assert_close(loss, changed, rtol=0, atol=0)


def test_counts_of_the_threshold_step_are_those_of_the_batch() -> None:
    logits = torch.cat([one_map(-2, -2, -2, 1), one_map(-1, 1, 1, 1)])
    branch, labels = torch.zeros(2, 1, 1, 1, dtype=torch.float64), torch.ones(2, 1)
    whole = spatial_bce_threshold_loss(branch, labels, logits)
    far, near = (reference.distance(reference.sigmoid(x), 0.5) for x in (-2, -1))
    high = reference.distance(reference.sigmoid(1), 0.5)
    assert whole.item() == pytest.approx((3 * far + near) / 4 + high)
    parts = [spatial_bce_threshold_loss(branch[i : i + 1], PRESENT, logits[i : i + 1]).item() for i in range(2)]
    assert whole.item() != pytest.approx(sum(parts) / 2)


def test_training_parts_the_pixels_at_the_prior() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 10, 10, requires_grad=True)
    labels, ratio = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.3, 0.0]])
    branch = torch.zeros(1, 2, 1, 1, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [logits], "lr": 20.0}, {"params": [branch], "lr": 0.5}])
    network, threshold = SpatialBCELoss(), SpatialBCEThresholdLoss()
    for step in range(100):
        if step % 5 < 4:
            loss = network(logits, labels, rank_threshold(logits.sigmoid(), ratio))
        else:
            loss = threshold(branch, labels, logits)
        optimizer.zero_grad()
        (loss + foreground_ratio_kl_loss(logits, labels, ratio)).backward()
        optimizer.step()
    foreground = logits.sigmoid() > mean_threshold(branch)[:, :, None, None]
    assert foreground[0, 0].float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert not foreground[0, 1].any()
    clear = (logits[0, 0].sigmoid() - 0.5).abs() > 0.3
    assert clear.float().mean() > 0.95


def test_messages_name_argument_expected_and_given() -> None:
    logits, labels = torch.zeros(2, 3, 4, 4), torch.ones(2, 3)
    t = torch.full((2, 3), 0.5)
    with pytest.raises(ValueError, match=r"logits: expected shape \(B, K, H, W\), got \(2, 3\)"):
        spatial_bce_loss(t, labels, t)
    with pytest.raises(ValueError, match=r"labels: expected shape \(2, 3\) to match logits, got \(2, 4\)"):
        spatial_bce_loss(logits, torch.ones(2, 4), t)
    with pytest.raises(ValueError, match=r"threshold: expected shape \(2, 3\) to match logits, got \(2,\)"):
        spatial_bce_loss(logits, labels, t[:, 0])
    with pytest.raises(TypeError, match=r"threshold: expected a floating-point tensor, got torch.int64"):
        spatial_bce_loss(logits, labels, t.long())
    with pytest.raises(TypeError, match=r"logits: expected a floating-point tensor, got torch.int64"):
        spatial_bce_loss(logits.long(), labels, t)
    with pytest.raises(ValueError, match=r"reduction: expected .mean., .sum. or .none., got 'max'"):
        spatial_bce_loss(logits, labels, t, reduction="max")
    with pytest.raises(ValueError, match=r"log_floor: expected a positive number or None, got 0"):
        spatial_bce_loss(logits, labels, t, log_floor=0)
    with pytest.raises(ValueError, match=r"threshold_logits: expected shape \(B, K, h, w\), got \(2, 3\)"):
        spatial_bce_threshold_loss(t, labels, logits)
    with pytest.raises(
        ValueError, match=r"threshold_logits: expected shape \(2, 3, \*, \*\) to match logits, got \(2, 2, 4, 4\)"
    ):
        spatial_bce_threshold_loss(logits[:, :2], labels, logits)
    with pytest.raises(ValueError, match=r"foreground_ratio: expected shape \(2, 3\) to match logits, got \(1, 3\)"):
        foreground_ratio_kl_loss(logits, labels, t[:1])
    with pytest.raises(TypeError, match=r"foreground_ratio: expected a floating-point tensor, got torch.bool"):
        foreground_ratio_kl_loss(logits, labels, t > 0)
