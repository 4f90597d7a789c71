import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wsss_losses import AttentionRegressionLoss, attention_regression_loss


def maps(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.rand(shape, generator=generator, dtype=torch.float64)
    return logits, torch.where(target < 0.6, 0.0, target)


@given(st.integers(0, 10**6))
def test_loss_is_a_mean_over_cells_with_and_one_over_cells_without_attention(seed: int) -> None:
    logits, target = maps(seed, 2, 3, 2, 4)
    raised, lowered = [], []
    for x, t in zip(logits.flatten().tolist(), target.flatten().tolist(), strict=True):
        if t > 0:
            raised.append(t * math.log1p(math.exp(-x)))
        else:
            lowered.append(math.log1p(math.exp(x)))
    expected = sum(sum(costs) / len(costs) for costs in (raised, lowered) if costs)
    assert attention_regression_loss(logits, target).item() == pytest.approx(expected, rel=1e-9)
    assert attention_regression_loss(logits, target, saturate=True).item() == pytest.approx(expected, abs=2e-3)


def test_an_empty_set_drops_its_term() -> None:
    logits, target = maps(0, 2, 3, 4, 4)
    softplus = torch.nn.functional.softplus
    without = attention_regression_loss(logits, torch.zeros_like(target))
    torch.testing.assert_close(without, softplus(logits).mean())
    everywhere = attention_regression_loss(logits, torch.full_like(target, 0.25))
    torch.testing.assert_close(everywhere, 0.25 * softplus(-logits).mean())
    nothing = attention_regression_loss(logits[:0].requires_grad_(), target[:0])
    assert nothing == 0
    assert nothing.requires_grad


def test_loss_falls_where_attention_is_and_rises_elsewhere() -> None:
    logits, target = maps(1, 2, 3, 4, 4)
    (gradient,) = torch.autograd.grad(attention_regression_loss(logits.requires_grad_(), target), logits)
    assert bool((gradient[target > 0] < 0).all())
    assert bool((gradient[target == 0] > 0).all())


@pytest.mark.parametrize("saturate", [False, True])
def test_large_logits_are_finite_and_only_the_released_form_loses_their_gradient(saturate: bool) -> None:
    logits = torch.tensor([-1e4, -89.0, 30.0, 1e4]).view(1, 1, 1, 4).requires_grad_()
    target = torch.tensor([1.0, 0.5, 0.0, 0.0]).view(1, 1, 1, 4)
    loss = attention_regression_loss(logits, target, saturate=saturate)
    (gradient,) = torch.autograd.grad(loss, logits)
    lowered = 2 * -math.log(1e-8) if saturate else 30 + 1e4
    assert loss.item() == pytest.approx((1e4 + 0.5 * 89 + lowered) / 2, rel=1e-6)
    falling, rising = gradient.flatten()[:2], gradient.flatten()[2:]
    torch.testing.assert_close(falling, torch.tensor([-0.5, -0.25]))
    torch.testing.assert_close(rising, torch.zeros(2) if saturate else torch.full((2,), 0.5), rtol=1e-5, atol=1e-5)


def test_gradients_of_unlikely_cells_are_exact_in_double_precision() -> None:
    logits = torch.tensor([-24.0, 24.0], dtype=torch.float64).view(1, 1, 1, 2).requires_grad_()
    target = torch.tensor([0.5, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    (gradient,) = torch.autograd.grad(attention_regression_loss(logits, target), logits)
    sigmoid = 1 / (1 + math.exp(-24))
    assert gradient.flatten().tolist() == pytest.approx([-0.5 * sigmoid, sigmoid], rel=1e-14)


LOGITS, TARGET = maps(2, 2, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: attention_regression_loss(LOGITS, TARGET[:, 1:]),
            ValueError,
            r"target: expected shape \(2, 3, 4, 4\) to match logits, got \(2, 2, 4, 4\)",
        ),
        (lambda: attention_regression_loss(LOGITS[0], TARGET), ValueError, r"logits: expected shape \(B, K, H, W\)"),
        (lambda: AttentionRegressionLoss()(LOGITS.int(), TARGET), TypeError, r"logits: expected a floating-point"),
    ],
)
def test_messages(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
