import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from wsss_losses import ReCAMLoss, recam_loss, sce_reactivation_loss
from wsss_modules import ReCAMHead, class_masked_pooling, pool_present_classes

LABELS = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]])


def case(seed: int = 0, labels: Tensor = LABELS) -> tuple[Tensor, Tensor, Tensor]:
    """Class features, labels and second classifier, float64."""
    generator = torch.Generator().manual_seed(seed)
    class_features = torch.randn(*labels.shape, 5, generator=generator, dtype=torch.float64)
    return class_features, labels, torch.randn(labels.shape[1], 5, generator=generator, dtype=torch.float64)


def reference(class_features: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    """Sample by sample, as the definition says."""
    total, right, count = class_features.new_zeros(()), 0, 0
    for z, label in zip(class_features, labels, strict=True):
        present = [k for k, value in enumerate(label.tolist()) if value > 0]
        for k in present:
            scores = weight @ z[k]
            total = total + (scores.exp().sum().log() - scores[k]) / len(present)
            right += int(scores.argmax() == k)
            count += 1
    return total / len(labels), right / count


@given(st.integers(0, 99))
def test_loss_and_accuracy_equal_the_loop_over_samples(seed: int) -> None:
    inputs = case(seed)
    terms = sce_reactivation_loss(*inputs)
    loss, accuracy = reference(*inputs)
    torch.testing.assert_close(terms.total, loss)
    assert terms.accuracy == pytest.approx(accuracy)
    assert not terms.accuracy.requires_grad


@given(st.integers(0, 99), st.sampled_from(["mean", "sum", "none"]))
def test_features_of_the_present_classes_give_the_same_loss(seed: int, reduction: str) -> None:
    class_features, labels, weight = case(seed)
    leaves = [class_features.requires_grad_(), weight.requires_grad_()]
    dense = sce_reactivation_loss(class_features, labels, weight, reduction=reduction)
    gathered = sce_reactivation_loss(class_features[labels > 0], labels, weight, reduction=reduction)
    torch.testing.assert_close(gathered, dense)
    ours, theirs = (torch.autograd.grad(terms.total.square().sum(), leaves) for terms in (gathered, dense))
    torch.testing.assert_close(ours, theirs)


def test_images_with_one_class_make_it_an_ordinary_cross_entropy() -> None:
    classes = torch.tensor([2, 0, 3])
    class_features, labels, weight = case(labels=F.one_hot(classes, 4))
    logits = class_features[torch.arange(3), classes] @ weight.T
    torch.testing.assert_close(
        sce_reactivation_loss(class_features, labels, weight).total, F.cross_entropy(logits, classes)
    )


@given(st.permutations(range(4)))
def test_order_of_images_and_a_vector_common_to_all_classes_change_nothing(order: list[int]) -> None:
    class_features, labels, weight = case()
    base = sce_reactivation_loss(class_features, labels, weight)
    torch.testing.assert_close(sce_reactivation_loss(class_features[order], labels[order], weight), base)
    common = torch.randn(1, 5, dtype=torch.float64)
    torch.testing.assert_close(sce_reactivation_loss(class_features, labels, weight + common), base)


@given(st.permutations(range(4)))
def test_order_of_classes_changes_nothing(order: list[int]) -> None:
    class_features, labels, weight = case()
    permuted = sce_reactivation_loss(class_features[:, order], labels[:, order], weight[order])
    torch.testing.assert_close(permuted, sce_reactivation_loss(class_features, labels, weight))


def test_one_class_alone_is_certain() -> None:
    terms = sce_reactivation_loss(*case(labels=torch.ones(2, 1)))
    assert terms.total == 0
    assert terms.accuracy == 1


def test_absent_classes_compete_though_their_features_are_never_read() -> None:
    class_features, labels, weight = case()
    absent = labels[:, :, None] == 0
    leaf = torch.where(absent, float("nan"), class_features).requires_grad_()
    terms = sce_reactivation_loss(leaf, labels, weight)
    torch.testing.assert_close(terms, sce_reactivation_loss(class_features, labels, weight), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(terms.total, leaf)
    assert not grad[absent.expand_as(grad)].any()
    only_class_1 = torch.tensor([[1, 0, 0, 0]])
    longer = torch.cat([weight[:3], 10 * weight[3:]])  # of a class that no image has
    first, second = (sce_reactivation_loss(class_features[:1], only_class_1, w).total for w in (weight, longer))
    assert not torch.isclose(first, second)


def test_reductions_are_over_the_images() -> None:
    inputs = case()
    each = sce_reactivation_loss(*inputs, reduction="none").total
    assert each.shape == (4,)
    assert each[1] == 0, "an image without a label costs nothing"
    torch.testing.assert_close(sce_reactivation_loss(*inputs, reduction="sum").total, each.sum())
    torch.testing.assert_close(sce_reactivation_loss(*inputs).total, each.sum() / 4)
    for i in range(4):
        alone = sce_reactivation_loss(inputs[0][i : i + 1], LABELS[i : i + 1], inputs[2]).total
        torch.testing.assert_close(alone, each[i])


@pytest.mark.parametrize("gathered", [False, True])
def test_batch_without_a_label_costs_0_and_stays_attached(gathered: bool) -> None:
    class_features, labels, weight = case(labels=torch.zeros(3, 4))
    if gathered:
        class_features = class_features[labels > 0]
    leaves = [class_features.requires_grad_(), weight.requires_grad_()]
    terms = sce_reactivation_loss(class_features, labels, weight)
    assert terms.total == 0
    assert terms.accuracy == 0
    assert all(not grad.any() for grad in torch.autograd.grad(terms.total, leaves))
    assert sce_reactivation_loss(class_features, labels, weight, empty_accuracy=math.nan).accuracy.isnan()


def test_empty_accuracy_is_only_for_batches_without_a_label() -> None:
    inputs = case()
    plain = sce_reactivation_loss(*inputs)
    torch.testing.assert_close(sce_reactivation_loss(*inputs, empty_accuracy=math.nan), plain, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch_is_finite(reduction: str) -> None:
    class_features, labels, weight = case(labels=torch.zeros(0, 4))
    logits = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    terms = recam_loss(logits, class_features, labels, weight, reduction=reduction)
    assert terms.total.shape == ((0,) if reduction == "none" else ())
    assert all(bool(term.isfinite().all()) for term in terms)
    terms.total.sum().backward()


def test_gradcheck_of_the_second_classifier() -> None:
    class_features, labels, weight = case()
    leaves = [class_features.requires_grad_(), weight.requires_grad_()]
    assert gradcheck(lambda z, w: sce_reactivation_loss(z, labels, w).total, leaves)
    assert gradcheck(lambda z, w: sce_reactivation_loss(z[labels > 0], labels, w, reduction="none").total, leaves)
    rows = weight.detach()[:, :, None, None]
    assert torch.equal(
        sce_reactivation_loss(class_features, labels, rows).total,
        sce_reactivation_loss(class_features, labels, weight).total,
    )


def test_objective_is_the_multi_label_loss_plus_the_weighted_softmax_loss() -> None:
    class_features, labels, weight = case()
    logits = torch.randn(4, 4, dtype=torch.float64)
    terms = recam_loss(logits, class_features, labels, weight, sce_weight=0.1)
    torch.testing.assert_close(terms.multi_label, F.multilabel_soft_margin_loss(logits, labels.double()))
    sce = sce_reactivation_loss(class_features, labels, weight)
    torch.testing.assert_close((terms.reactivation, terms.accuracy), (sce.total, sce.accuracy))
    torch.testing.assert_close(terms.total, terms.multi_label + 0.1 * terms.reactivation)
    each = recam_loss(logits, class_features, labels, weight, sce_weight=0.1, reduction="none")
    torch.testing.assert_close(each.total.mean(), terms.total)


def test_saturated_logits_keep_a_live_gradient() -> None:
    class_features, labels, weight = (
        torch.tensor([[[1.0], [1.0]]]),
        torch.tensor([[1, 0]]),
        torch.tensor([[-1e4], [1e4]]),
    )
    class_features.requires_grad_()
    terms = sce_reactivation_loss(class_features, labels, weight)
    assert terms.total == 2e4
    (grad,) = torch.autograd.grad(terms.total, class_features)
    assert grad[0, 0] == 2e4
    assert grad[0, 1] == 0, "of a class that is absent"


def test_mass_pooling_raises_the_gradient_that_a_small_object_gives_the_second_classifier() -> None:
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :1, :1], mask[1, :, :6, :6] = 1, 1
    features = mask * torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    labels, cam = torch.tensor([[1, 0], [1, 0]]), mask.expand(2, 2, 8, 8)

    def norms(pool: str) -> Tensor:
        weight = torch.zeros(2, 2, requires_grad=True)
        each = sce_reactivation_loss(class_masked_pooling(features, cam, pool=pool), labels, weight, reduction="none")
        return torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in each.total])

    small, large = norms("mean")
    torch.testing.assert_close(36 * small, large)
    small, large = norms("mass")
    torch.testing.assert_close(small, large, rtol=1e-4, atol=0)


def test_training_turns_the_maps_of_two_classes_to_their_own_halves() -> None:
    torch.manual_seed(0)
    halves = torch.zeros(2, 6, 6)
    halves[0, :3], halves[1, 3:] = 1, 1
    labels = torch.tensor([[1, 1]] * 8 + [[1, 0]] * 4 + [[0, 1]] * 4)  # mostly together
    appearance = torch.eye(2).repeat_interleave(4, 1)  # channels of their own
    features = torch.einsum("bk,khw,kd->bdhw", labels.float(), halves, appearance) + 0.1 * torch.rand(16, 8, 6, 6)
    head, criterion = ReCAMHead(8, 2), ReCAMLoss()
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    history = []
    for _ in range(200):
        out = head(features)
        terms = criterion(out.logits, out.class_features, labels, out.recam_weight)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        history.append(terms)
    assert history[-1].total < 0.5 * history[0].total
    assert history[-1].accuracy == 1

    def share_on_own_half(**options: bool) -> Tensor:
        maps = head.reactivated_cam(features, **options)[:8]
        return (maps * halves).sum((0, 2, 3)) / maps.sum((0, 2, 3))

    assert (share_on_own_half(clamp_negative=True) > 0.95).all()
    # what speaks against a class in both classifiers, here the other half, multiplies to evidence for it
    assert (share_on_own_half() < share_on_own_half(clamp_negative=True)).all()


def test_head_with_labels_feeds_the_loss() -> None:
    head, features = ReCAMHead(6, 4).double(), torch.rand(4, 6, 3, 3, dtype=torch.float64)
    terms = [
        recam_loss(out.logits, out.class_features, LABELS, out.recam_weight)
        for out in (head(features), head(features, LABELS))
    ]
    torch.testing.assert_close(terms[0], terms[1])
    pooled = pool_present_classes(features, head(features).cam, LABELS)
    assert len(pooled.features) == int(LABELS.sum())


FEATURES, _, WEIGHT = (x.float() for x in case())
LOGITS = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: sce_reactivation_loss(FEATURES, LABELS[0], WEIGHT),
            ValueError,
            r"labels: expected shape \(B, K\), got",
        ),
        (
            lambda: sce_reactivation_loss(FEATURES[:, :3], LABELS, WEIGHT),
            ValueError,
            r"class_features: expected shape \(4, 4, 5\) to match labels, recam_weight, got \(4, 3, 5\)",
        ),
        (
            lambda: sce_reactivation_loss(FEATURES[:, 0], LABELS, WEIGHT),
            ValueError,
            r"class_features: expected shape \(7, 5\) for the present classes of labels, got \(4, 5\)",
        ),
        (
            lambda: sce_reactivation_loss(FEATURES, LABELS, WEIGHT[:3]),
            ValueError,
            r"recam_weight: expected shape \(4, \*\) to match labels, got \(3, 5\)",
        ),
        (
            lambda: sce_reactivation_loss(FEATURES, LABELS, WEIGHT[:, :, None, None].expand(4, 5, 3, 3)),
            ValueError,
            r"recam_weight: expected shape \(4, \*, 1, 1\) to match labels, got \(4, 5, 3, 3\)",
        ),
        (
            lambda: sce_reactivation_loss(FEATURES.long(), LABELS, WEIGHT),
            TypeError,
            r"class_features: expected a float",
        ),
        (lambda: sce_reactivation_loss(FEATURES, LABELS, WEIGHT.long()), TypeError, r"recam_weight: expected a float"),
        (
            lambda: sce_reactivation_loss(FEATURES, LABELS, WEIGHT, reduction="max"),
            ValueError,
            r'reduction: expected "mean", "sum" or "none", got \'max\'',
        ),
        (lambda: recam_loss(LOGITS[0], FEATURES, LABELS, WEIGHT), ValueError, r"logits: expected shape \(B, K\), got"),
        (
            lambda: recam_loss(LOGITS, FEATURES, LABELS[:2], WEIGHT),
            ValueError,
            r"labels: expected shape \(4, 4\) to match logits, got \(2, 4\)",
        ),
        (lambda: ReCAMLoss(sce_weight=-1), ValueError, r"sce_weight: expected at least 0, got -1"),
    ],
    ids=[
        *("labels", "dense", "gathered", "classes", "convolution", "integer", "integer-weight", "reduction"),
        *("logits", "objective-labels", "sce_weight"),
    ],
)
def test_messages_name_argument_expected_and_given(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_no_class_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"labels: expected at least one class, got shape \(2, 0\)"):
        sce_reactivation_loss(torch.zeros(2, 0, 3), torch.zeros(2, 0), torch.zeros(0, 3))
