import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F

from wsss_losses import (
    PatchEquivarianceLoss,
    PooledProbabilityBCELoss,
    multi_label_soft_margin_loss,
    patch_equivariance_loss,
    pooled_probability_bce_loss,
)
from wsss_modules import PatchClassifierGMP, PatchTransform, equivariance_target

seeds = st.integers(0, 1000)


def probabilities(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1)


@given(seeds)
def test_pooled_loss_is_plain_cross_entropy_away_from_the_ends(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pooled = 0.01 + 0.98 * torch.rand(3, 4, generator=generator)
    labels = (torch.rand(3, 4, generator=generator) > 0.5).float()
    expected = F.binary_cross_entropy(pooled, labels)
    torch.testing.assert_close(pooled_probability_bce_loss(pooled, labels), expected, rtol=1e-5, atol=1e-5)


def test_pooled_loss_is_finite_at_the_ends_and_clipped_scores_get_no_gradient() -> None:
    pooled = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.5]], requires_grad=True)
    loss = pooled_probability_bce_loss(pooled, torch.tensor([[0, 1, 1, 0, 1]]))
    loss.backward()
    # 0 and 1 count as 1e-7 and 1 - 1.2e-7, the float32 number nearest to 1 - 1e-7
    wrong = -torch.log(torch.tensor([2e-7, 2.192e-7])).sum() / 5
    assert loss.item() == pytest.approx(wrong.item() + 0.6931 / 5, rel=1e-3)
    assert pooled.grad[0, :4].abs().max() == 0
    assert pooled.grad[0, 4] != 0


def test_log_odds_keep_the_gradient_that_clipping_loses() -> None:
    head = PatchClassifierGMP(2, 3, dropout=0.0)
    features = torch.zeros(1, 2, 1, 1)
    features[0, 0] = 1.0
    with torch.no_grad():
        head.classifier.weight[:] = torch.tensor([60.0, 0.0, 0.0])[:, None, None, None]  # surely background
    labels = torch.tensor([[0.0, 1.0, 0.0]])
    grads = {}
    for name in ("clipped", "exact"):
        out = head(features)
        loss = {
            "clipped": lambda out: pooled_probability_bce_loss(out.pooled, labels),
            "exact": lambda out: multi_label_soft_margin_loss(out.pooled_logits, labels),
        }[name](out)
        (grads[name],) = torch.autograd.grad(loss, head.classifier.weight)
    assert not grads["clipped"].any()
    assert grads["exact"][1].sum() < -0.3  # the class that is there goes up


@given(seeds)
def test_log_odds_give_the_same_loss_where_nothing_is_clipped(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    out = PatchClassifierGMP(4, 3, dropout=0.0)(torch.randn(2, 4, 3, 5, generator=generator))
    labels = (torch.rand(2, 3, generator=generator) > 0.5).float()
    expected = pooled_probability_bce_loss(out.pooled, labels)
    torch.testing.assert_close(multi_label_soft_margin_loss(out.pooled_logits, labels), expected, rtol=1e-5, atol=1e-6)


@given(seeds)
def test_equivariance_loss_is_lowest_where_views_meet_the_target(seed: int) -> None:
    target, views = probabilities(2, 3, 2, 2, seed=seed), probabilities(2, 3, 2, 2, seed=seed + 1)
    assert patch_equivariance_loss(target, target) <= patch_equivariance_loss(views, target)
    views = target.clone().requires_grad_()
    patch_equivariance_loss(views, target).backward()
    assert views.grad.abs().max() < 1e-12  # the sum over classes is divided out
    assert gradcheck(lambda x: patch_equivariance_loss(x, target), probabilities(2, 3, 2, 2).requires_grad_())


def test_no_gradient_reaches_the_target_branch() -> None:
    probs, views = (probabilities(4, 3, 4, 4, seed=seed).requires_grad_() for seed in (0, 1))
    first, second = PatchTransform.draw(4), PatchTransform.draw(4)
    target = equivariance_target(probs, torch.ones(4, 3), first, second)
    (grad,) = torch.autograd.grad(patch_equivariance_loss(views, target), probs, allow_unused=True)
    assert grad is None
    weighted = probs * 1.0
    (grad,) = torch.autograd.grad(patch_equivariance_loss(views, weighted), probs, allow_unused=True)
    assert grad is None


@given(seeds)
def test_a_further_transform_of_both_sides_changes_nothing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    target, views = probabilities(4, 3, 4, 4, seed=seed), probabilities(4, 3, 4, 4, seed=seed + 1)
    turn = PatchTransform.draw(4, generator=generator)
    torch.testing.assert_close(
        patch_equivariance_loss(turn.apply(views), turn.apply(target)), patch_equivariance_loss(views, target)
    )


def test_an_empty_target_costs_nothing() -> None:
    views = torch.zeros(2, 3, 2, 2, requires_grad=True)
    loss = patch_equivariance_loss(views, torch.zeros(2, 3, 2, 2))
    loss.backward()
    assert loss == 0
    assert not views.grad.any()


def test_bfloat16_autocast_agrees_to_a_hundredth() -> None:
    head, features = PatchClassifierGMP(8, 4, dropout=0.0), torch.randn(2, 8, 5, 5)
    labels = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]])
    exact = pooled_probability_bce_loss(head(features).pooled, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = pooled_probability_bce_loss(head(features).pooled, labels)
    torch.testing.assert_close(rounded.float(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PooledProbabilityBCELoss(eps=0), ValueError, "eps: expected a number between 0 and 0.5, got 0"),
        (lambda: PatchEquivarianceLoss(reduction="all"), ValueError, "reduction: expected"),
        (
            lambda: pooled_probability_bce_loss(torch.zeros(2, 3), torch.zeros(2, 2)),
            ValueError,
            r"labels: expected shape \(2, 3\) to match pooled, got \(2, 2\)",
        ),
        (
            lambda: patch_equivariance_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4)),
            ValueError,
            r"target: expected shape \(1, 2, 3, 3\) to match view_probs",
        ),
        (
            lambda: patch_equivariance_loss(torch.zeros(1, 2, 3, 3, dtype=torch.int64), torch.zeros(1, 2, 3, 3)),
            TypeError,
            "view_probs: expected a floating-point tensor",
        ),
    ],
)
def test_messages(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
