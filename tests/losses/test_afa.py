import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from wsss_losses import (
    AFALoss,
    AttentionAffinityLoss,
    BalancedCrossEntropyLoss,
    afa_loss,
    attention_affinity_loss,
    balanced_cross_entropy_loss,
    multi_label_soft_margin_loss,
)
from wsss_modules import labels_to_affinity

seeds = st.integers(0, 1000)


def pairs(seed: int, batch: int = 2, cells: tuple[int, int] = (3, 4)) -> tuple[Tensor, Tensor]:
    """Affinities in (0, 1) and targets, with unknown pairs."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 4, (batch, *cells), generator=generator)
    target = labels_to_affinity(torch.where(mask == 3, 255, mask), radius=2, stride=1)
    return torch.rand(target.shape, generator=generator, dtype=torch.float64), target


def naive_affinity_loss(affinity: Tensor, target: Tensor) -> float:
    """Pair by pair."""
    sums = {0: [0.0, 0], 1: [0.0, 0]}
    for p, label in zip(affinity.flatten().tolist(), target.flatten().tolist(), strict=True):
        if label in sums:
            sums[label][0] += 1 - p if label else p
            sums[label][1] += 1
    return sum(cost / (count + 1) for cost, count in sums.values()) / 2


@given(seeds)
def test_affinity_loss_is_the_sum_over_pairs(seed: int) -> None:
    affinity, target = pairs(seed)
    loss = attention_affinity_loss(affinity, target)
    assert loss.item() == pytest.approx(naive_affinity_loss(affinity, target), abs=1e-12)
    assert 0 <= loss <= 1
    each = attention_affinity_loss(affinity, target, reduction="none")
    expected = [naive_affinity_loss(*one) for one in zip(affinity, target, strict=True)]
    assert each.tolist() == pytest.approx(expected, abs=1e-12)
    assert attention_affinity_loss(affinity, target, reduction="mean").item() == pytest.approx(sum(expected) / 2)


@pytest.mark.parametrize("form", ["linear", "log"])
def test_affinity_loss_is_zero_for_right_affinities_and_one_for_inverted_ones(form: str) -> None:
    target = labels_to_affinity(torch.arange(900).view(1, 30, 30) // 450, radius=None, stride=1)
    right = (target == 1).double()
    perfect = attention_affinity_loss(right, target, form=form)
    assert abs(perfect.item()) <= (0 if form == "linear" else 2e-5)  # -log(1 + eps)
    inverted = attention_affinity_loss(1 - right, target, form=form)
    # 405,000 pairs of either kind, and one more in the denominator; log: both cost -log(eps)
    assert inverted.item() == pytest.approx(1.0 if form == "linear" else -math.log(1e-5), rel=1e-5)


def test_affinity_loss_of_unknown_pairs_is_zero_without_gradient() -> None:
    affinity = torch.full((2, 4, 4), 0.3, requires_grad=True)
    loss = attention_affinity_loss(affinity, torch.full((2, 4, 4), 255, dtype=torch.uint8))
    loss.backward()
    assert loss == 0
    assert not affinity.grad.any()


def test_affinity_loss_of_one_image_depends_on_the_others_only_in_the_pooled_form() -> None:
    affinity, target = pairs(0)
    for reduction, alone in (("batch", False), ("sum", True)):
        x = affinity.clone().requires_grad_()
        attention_affinity_loss(x, target, reduction=reduction).backward()
        one = affinity[:1].clone().requires_grad_()
        attention_affinity_loss(one, target[:1], reduction=reduction).backward()
        assert torch.allclose(x.grad[:1], one.grad) == alone


def naive_balanced(logits: Tensor, mask: Tensor) -> Tensor:
    halves = []
    for group in (mask == 0, (mask > 0) & (mask < 255)):
        if group.any():
            halves.append(F.cross_entropy(logits.movedim(1, -1)[group], mask[group]) / 2)
    return sum(halves, logits.new_zeros(()))


@given(seeds)
def test_balanced_cross_entropy_is_the_mean_of_both_means(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    mask = torch.randint(0, 4, (2, 4, 5), generator=generator)
    mask = torch.where(mask == 3, 255, mask)
    torch.testing.assert_close(balanced_cross_entropy_loss(logits, mask), naive_balanced(logits, mask))
    twice = balanced_cross_entropy_loss(logits.repeat(2, 1, 1, 1), mask.repeat(2, 1, 1))
    torch.testing.assert_close(twice, naive_balanced(logits, mask))


@pytest.mark.parametrize("mask", [[0, 0], [1, 2], [255, 255], [0, 255], [1, 255]], ids=str)
def test_balanced_cross_entropy_without_a_group_is_finite(mask: list[int]) -> None:
    labels = torch.tensor(mask).view(1, 1, 2)
    logits = torch.randn(1, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    loss = balanced_cross_entropy_loss(logits, labels)
    loss.backward()
    torch.testing.assert_close(loss, naive_balanced(logits, labels))
    assert logits.grad.isfinite().all()
    assert (loss == 0) == all(label == 255 for label in mask)


def test_balanced_cross_entropy_enlarges_the_logits() -> None:
    logits, mask = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 16, 20))
    large = F.interpolate(logits, (16, 20), mode="bilinear", align_corners=False)
    torch.testing.assert_close(balanced_cross_entropy_loss(logits, mask), naive_balanced(large, mask))


def test_soft_margin_loss_is_torchs_and_positive() -> None:
    logits, labels = torch.randn(4, 5), (torch.rand(4, 5) > 0.5).float()
    expected = F.multilabel_soft_margin_loss(logits, labels)
    torch.testing.assert_close(multi_label_soft_margin_loss(logits, labels), expected)
    assert multi_label_soft_margin_loss(50 * (2 * labels - 1), labels) < 1e-6  # lowest where labels are met
    assert expected > 0


def objective(seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 3, (2, 64, 64), generator=generator)
    shapes = (2, 2), (2, 3, 16, 16)
    logits, seg_logits = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    affinity = torch.rand(2, 16, 16, generator=generator, dtype=torch.float64)
    return logits, seg_logits, affinity, torch.tensor([[1, 0], [1, 1]]), mask, labels_to_affinity(mask)


def test_objective_is_the_weighted_sum() -> None:
    logits, seg_logits, affinity, labels, mask, target = objective()
    terms = afa_loss(logits, seg_logits, affinity, labels, mask, target, seg_weight=0.3, affinity_weight=0.2)
    torch.testing.assert_close(terms.classification, multi_label_soft_margin_loss(logits, labels))
    torch.testing.assert_close(terms.segmentation, balanced_cross_entropy_loss(seg_logits, mask))
    torch.testing.assert_close(terms.affinity, attention_affinity_loss(affinity, target))
    torch.testing.assert_close(terms.total, terms.classification + 0.3 * terms.segmentation + 0.2 * terms.affinity)


def test_terms_of_weight_zero_are_not_evaluated() -> None:
    logits, seg_logits, affinity, labels, mask, target = objective()
    bad = torch.full_like(seg_logits, math.nan)
    terms = afa_loss(logits, bad, affinity, labels, mask, target, seg_weight=0)
    assert terms.total.isfinite()
    assert terms.segmentation == 0
    with pytest.raises(ValueError, match="seg_logits, mask: expected tensors unless seg_weight is 0, got None"):
        afa_loss(logits, None, affinity, labels, mask, target)
    with pytest.raises(ValueError, match="affinity, target: expected tensors unless affinity_weight is 0, got None"):
        afa_loss(logits, seg_logits, affinity, labels, mask, None)


def test_gradcheck_of_the_objective() -> None:
    logits, seg_logits, affinity, labels, mask, target = objective()
    leaves = [x.requires_grad_() for x in (logits, seg_logits[:, :, :4, :4].contiguous(), affinity)]
    assert gradcheck(lambda *x: afa_loss(*x, labels, mask[:, :8, :8], target).total, leaves)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: multi_label_soft_margin_loss(torch.zeros(2, 3), torch.zeros(2, 4)), ValueError, r"labels: expected"),
        (lambda: multi_label_soft_margin_loss(torch.zeros(2), torch.zeros(2)), ValueError, r"logits: expected shape"),
        (
            lambda: attention_affinity_loss(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)),
            TypeError,
            "target: expected an integer tensor",
        ),
        (
            lambda: attention_affinity_loss(torch.zeros(1, 4, 4), torch.zeros(1, 4, 5, dtype=torch.uint8)),
            ValueError,
            r"target: expected shape \(1, 4, 4\) to match affinity",
        ),
        (lambda: AttentionAffinityLoss(form="square"), ValueError, 'form: expected "linear" or "log", got \'square\''),
        (lambda: AttentionAffinityLoss(reduction="all"), ValueError, 'reduction: expected "batch", "mean", "sum"'),
        (
            lambda: BalancedCrossEntropyLoss()(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2)),
            TypeError,
            "mask: expected an integer tensor, got torch.float32; did you pass scores",
        ),
        (lambda: AFALoss(seg_weight=-1), ValueError, "seg_weight: expected at least 0, got -1"),
    ],
)
def test_messages(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
