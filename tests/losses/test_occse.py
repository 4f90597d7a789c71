import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from wsss_losses import ClassSpecificErasingLoss, class_specific_erasing_loss
from wsss_modules import FrozenClassifier, class_specific_erase, sample_erase_class


def scene(seed: int = 0, batch: int = 3, classes: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, erased_logits = (4 * torch.randn(2, batch, classes, generator=generator, dtype=torch.float64)).unbind()
    labels = (torch.rand(batch, classes, generator=generator) < 0.5).double()
    labels[:, seed % classes] = 1
    return logits, erased_logits, labels, sample_erase_class(labels, generator=generator).remaining


def cost(logits: Tensor, targets: Tensor) -> float:
    """Mean of ``log(1 + exp(-x))`` of what is there and ``log(1 + exp(x))`` of what is not, number by number."""
    pairs = list(zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True))
    return sum(math.log1p(math.exp(-x if y else x)) for x, y in pairs) / len(pairs)


@given(st.integers(0, 99), st.floats(0, 2))
def test_the_loss_is_the_sum_of_two_cross_entropies(seed: int, weight: float) -> None:
    logits, erased_logits, labels, remaining = scene(seed)
    terms = class_specific_erasing_loss(logits, erased_logits, labels, remaining, weight=weight)
    assert terms.classification.item() == pytest.approx(cost(logits, labels))
    assert terms.erasing.item() == pytest.approx(cost(erased_logits, remaining))
    assert terms.total.item() == pytest.approx(cost(logits, labels) + weight * cost(erased_logits, remaining))


@given(st.integers(0, 99))
def test_reductions_agree(seed: int) -> None:
    inputs = scene(seed)
    each, total, mean = (class_specific_erasing_loss(*inputs, reduction=r) for r in ("none", "sum", "mean"))
    for one, added, averaged in zip(each, total, mean, strict=True):
        assert one.shape == (3,)
        torch.testing.assert_close(one.sum(), added)
        torch.testing.assert_close(one.mean(), averaged)


def test_the_judge_must_miss_the_erased_class_and_see_the_others() -> None:
    logits, erased_logits, labels, remaining = scene()
    erased_logits.requires_grad_()
    terms = class_specific_erasing_loss(logits, erased_logits, labels, remaining)
    (grad,) = torch.autograd.grad(terms.erasing, erased_logits)
    assert bool((grad[labels > remaining] > 0).all()), "less of the erased class lowers the loss"
    assert bool((grad[remaining > 0] < 0).all()), "more of the others lowers it"


def test_nothing_is_left_to_see_of_an_image_of_one_class() -> None:
    labels = torch.tensor([[0.0, 1, 0]])
    remaining = sample_erase_class(labels).remaining
    blind, seeing = (
        class_specific_erasing_loss(torch.zeros(1, 3), torch.full((1, 3), x), labels, remaining).erasing
        for x in (-9.0, 9.0)
    )
    assert blind < 1e-3
    assert seeing > 8


def test_an_image_without_a_label_learns_from_its_own_logits_alone() -> None:
    logits, erased_logits, labels, _ = scene()
    labels[1] = 0
    remaining = sample_erase_class(labels).remaining
    erased_logits.requires_grad_()
    terms = class_specific_erasing_loss(logits, erased_logits, labels, remaining)
    (grad,) = torch.autograd.grad(terms.erasing, erased_logits)
    rest = [0, 2]
    labelled = class_specific_erasing_loss(*(x[rest] for x in (logits, erased_logits, labels, remaining)))
    torch.testing.assert_close(terms.erasing, labelled.erasing)
    assert terms.classification.item() == pytest.approx(cost(logits, labels))
    assert not grad[1].any()
    each = class_specific_erasing_loss(logits, erased_logits, labels, remaining, reduction="none")
    assert each.erasing[1] == 0


def test_without_any_label_the_erasing_term_is_zero_and_attached() -> None:
    logits, erased_logits = torch.randn(2, 3), torch.randn(2, 3, requires_grad=True)
    terms = class_specific_erasing_loss(logits, erased_logits, torch.zeros(2, 3), torch.zeros(2, 3))
    terms.erasing.backward()
    assert terms.erasing == 0
    assert not erased_logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float16])
def test_labels_may_have_any_dtype(dtype: torch.dtype) -> None:
    logits, erased_logits, labels, remaining = scene()
    expected = class_specific_erasing_loss(logits, erased_logits, labels, remaining)
    out = class_specific_erasing_loss(logits, erased_logits, labels.to(dtype), remaining.to(dtype))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_a_step_teaches_the_network_whose_maps_erase_and_not_the_judge() -> None:
    """The judge sees one bright class in the left half; the learner's map must grow over it."""
    images = torch.zeros(2, 3, 8, 8)
    images[..., :4] = 2.0
    labels = torch.tensor([[1.0], [1.0]])
    judge_net = nn.Conv2d(3, 1, 1)
    nn.init.ones_(judge_net.weight)
    nn.init.constant_(judge_net.bias, -1.0)
    judge = FrozenClassifier(judge_net)
    cam = torch.full((2, 1, 8, 8), 0.1)
    cam[..., 0, 0] = 1.0  # the telling part
    cam.requires_grad_()
    picked = sample_erase_class(labels)
    erased = class_specific_erase(cam, picked.erased, images)
    logits = judge(erased.images).mean((2, 3))
    loss = ClassSpecificErasingLoss(weight=1.0)(cam.mean((2, 3)), logits, labels, picked.remaining)
    (grad,) = torch.autograd.grad(loss.erasing, cam)
    object_cells = grad[..., :4].flatten(2)[..., 1:]
    assert bool((object_cells < 0).all()), "the rest of the object is to be erased as well"
    assert not grad[..., 4:].any(), "nothing is to be gained on the background"


def test_weight_may_grow_in_the_course_of_a_training() -> None:
    criterion, inputs = ClassSpecificErasingLoss(), scene()
    totals = []
    for criterion.weight in (0.3, 0.65, 1.0):
        totals.append(criterion(*inputs).total)
    torch.testing.assert_close(totals[1] - totals[0], totals[2] - totals[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.rand(3)}, r"logits: expected shape \(B, K\), got \(3,\)"),
        ({"logits": torch.ones(3, 5, dtype=torch.int64)}, "logits: expected a floating-point tensor"),
        ({"erased_logits": torch.rand(3, 4)}, r"erased_logits: expected shape \(3, 5\) to match logits, got \(3, 4\)"),
        ({"labels": torch.ones(3, 6)}, r"labels: expected shape \(3, 5\) to match logits, got \(3, 6\)"),
        ({"remaining": torch.ones(1, 5)}, r"remaining: expected shape \(3, 5\) to match logits, got \(1, 5\)"),
        ({"weight": -1.0}, "weight: expected at least 0, got -1.0"),
        ({"reduction": "avg"}, 'reduction: expected "mean", "sum" or "none", got \'avg\''),
    ],
)
def test_the_loss_says_what_is_wrong(change: dict[str, object], message: str) -> None:
    inputs = dict(zip(("logits", "erased_logits", "labels", "remaining"), scene(), strict=True))
    with pytest.raises((ValueError, TypeError), match=message):
        class_specific_erasing_loss(**{**inputs, **change})
