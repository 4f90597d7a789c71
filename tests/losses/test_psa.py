import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wsss_losses import AffinityLoss, affinity_loss
from wsss_modules import AffinityHead, AffinityLabels, affinity_labels


def labels_of(*groups: list[float]) -> AffinityLabels:
    return AffinityLabels(*(torch.tensor(group).view(1, 1, -1) for group in groups))


def random_case(seed: int = 0, batch: int = 2) -> tuple[Tensor, AffinityLabels]:
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(0, 4, (batch, 5, 7), generator=generator)
    affinity = torch.rand(batch, 5, 7, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    return affinity, AffinityLabels(*(group == k for k in range(3)))


def test_affinity_loss_is_the_balanced_mean_of_three_costs() -> None:
    affinity = torch.tensor([0.5, 0.25, 0.125, 0.75, 0.9], dtype=torch.float64).view(1, 1, 5)
    labels = labels_of([1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0])
    terms = affinity_loss(affinity, labels, eps=0)
    two = torch.tensor(2.0, dtype=torch.float64).log()
    torch.testing.assert_close(terms.bg, 1.5 * two)
    torch.testing.assert_close(terms.fg, 3 * two)
    torch.testing.assert_close(terms.neg, 2 * two)
    torch.testing.assert_close(terms.total, terms.bg / 4 + terms.fg / 4 + terms.neg / 2)
    paper = terms.bg + terms.fg + 2 * terms.neg
    torch.testing.assert_close(paper, 4 * terms.total)


@given(st.integers(0, 99), st.floats(0.01, 0.05))
def test_affinity_loss_falls_with_positives_and_rises_with_negatives(seed: int, step: float) -> None:
    affinity, labels = random_case(seed)
    base = affinity_loss(affinity, labels)
    higher = affinity_loss(affinity + step, labels)
    assert higher.bg < base.bg
    assert higher.fg < base.fg
    assert higher.neg > base.neg


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_saturated_affinities_keep_a_finite_live_gradient(dtype: torch.dtype) -> None:
    affinity = torch.tensor([[[0.0, 0.0, 1.0]]], dtype=dtype, requires_grad=True)
    terms = affinity_loss(affinity, labels_of([1, 0, 0], [0, 1, 0], [0, 0, 1]))
    (grad,) = torch.autograd.grad(terms.total, affinity)
    assert terms.total.isfinite()
    assert grad.isfinite().all()
    assert torch.equal(grad.sign(), torch.tensor([[[-1, -1, 1]]], dtype=dtype))


def test_empty_group_costs_exactly_0() -> None:
    affinity, labels = random_case()
    nothing = torch.zeros_like(labels.fg_pos)
    leaf = affinity.clone().requires_grad_()
    terms = affinity_loss(leaf, labels._replace(fg_pos=nothing))
    assert terms.fg == 0
    (grad,) = torch.autograd.grad(terms.fg, leaf, retain_graph=True)
    assert not grad.any()
    torch.testing.assert_close(
        terms.total, affinity_loss(affinity, labels).total - affinity_loss(affinity, labels).fg / 4
    )


def test_unlabelled_affinities_may_be_anything() -> None:
    affinity, labels = random_case()
    free = ~torch.stack(labels).any(0)
    assert free.any()
    for garbage in (float("nan"), float("inf"), -1.0):
        leaf = torch.where(free, garbage, affinity).requires_grad_()
        terms = affinity_loss(leaf, labels)
        torch.testing.assert_close(terms, affinity_loss(affinity, labels), rtol=0, atol=0)
        (grad,) = torch.autograd.grad(terms.total, leaf)
        assert grad.isfinite().all()
        assert not grad[free].any()


def test_soft_labels_weigh_pairs() -> None:
    affinity, labels = random_case()
    doubled = AffinityLabels(*(2 * label.double() for label in labels))
    torch.testing.assert_close(
        affinity_loss(affinity, doubled, eps=1e-12), affinity_loss(affinity, labels, eps=1e-12), rtol=1e-10, atol=0
    )


def test_loss_of_a_batch_is_not_the_mean_over_its_images() -> None:
    affinity, labels = random_case()
    whole = affinity_loss(affinity, labels)
    parts = [affinity_loss(affinity[i], AffinityLabels(*(label[i] for label in labels))) for i in range(2)]
    mean = (parts[0].neg + parts[1].neg) / 2
    assert not torch.isclose(whole.neg, mean, rtol=1e-3)
    counts = torch.stack([labels.neg[i].sum() for i in range(2)])
    weighted = (parts[0].neg * counts[0] + parts[1].neg * counts[1]) / counts.sum()
    torch.testing.assert_close(whole.neg, weighted, rtol=1e-5, atol=0)  # up to eps in the denominators


def test_training_the_head_separates_two_classes() -> None:
    torch.manual_seed(0)
    mask = torch.zeros(2, 8, 12, dtype=torch.int64)
    mask[:, 2:6, 3:9] = 1
    maps = [torch.randn(2, 6, 8, 12) + mask[:, None] for _ in range(3)]
    head = AffinityHead((6, 6, 6), widths=(8, 8, 8), radius=3)
    labels, criterion = affinity_labels(mask, 3), AffinityLoss()
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    costs = []
    for _ in range(30):
        terms = criterion(head(*maps), labels)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        costs.append(terms.total.item())
    assert costs[-1] < 0.5 * costs[0]


def test_messages_name_argument_expected_and_given() -> None:
    affinity, labels = random_case()
    with pytest.raises(
        ValueError, match=r"labels.fg_pos: expected shape \(2, 5, 7\) to match affinity, got \(1, 5, 7\)"
    ):
        affinity_loss(affinity, labels._replace(fg_pos=labels.fg_pos[:1]))
    with pytest.raises(TypeError, match=r"affinity: expected a floating-point tensor, got torch.int64"):
        affinity_loss(affinity.long(), labels)
