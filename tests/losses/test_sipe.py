import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from wsss_losses import GeneralSpecificConsistencyLoss, SIPELoss, general_specific_consistency_loss, sipe_loss
from wsss_modules import CAMHead, ImageSpecificPrototypeExploration, normalize_cam

LABELS = torch.tensor([[1.0, 0, 1], [0, 1, 0]])


def maps(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(2, 4, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))


@given(st.integers(0, 99))
def test_consistency_is_a_symmetric_distance_of_at_most_1(seed: int) -> None:
    scores, is_cam = maps(seed)
    each = general_specific_consistency_loss(scores, is_cam, reduction="none")
    assert each.shape == (2,)
    assert ((each > 0) & (each <= 1)).all()
    torch.testing.assert_close(each, general_specific_consistency_loss(is_cam, scores, reduction="none"))
    assert general_specific_consistency_loss(scores, scores) == 0
    assert general_specific_consistency_loss(torch.ones_like(scores), torch.zeros_like(scores)) == 1
    torch.testing.assert_close(general_specific_consistency_loss(scores, is_cam), F.l1_loss(scores, is_cam))


def test_absent_classes_stay_in_the_divisor() -> None:
    scores, is_cam = maps()
    base = general_specific_consistency_loss(scores, is_cam)
    more = [F.pad(x, (0, 0, 0, 0, 0, 4)) for x in (scores, is_cam)]
    torch.testing.assert_close(general_specific_consistency_loss(*more), base / 2)


def test_padding_counts_only_without_valid() -> None:
    scores, is_cam = maps()
    valid = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    valid[:, :, :, 3:] = False
    scores = scores * valid
    inside = general_specific_consistency_loss(scores, is_cam, valid)
    torch.testing.assert_close(inside, F.l1_loss(scores[..., :3], is_cam[..., :3]) * 3 / 5)
    pulled = general_specific_consistency_loss(scores, is_cam)
    torch.testing.assert_close(pulled - inside, is_cam[..., 3:].mean() * 2 / 5)
    per_class = valid.double().expand(-1, 4, -1, -1)
    torch.testing.assert_close(general_specific_consistency_loss(scores, is_cam, per_class), inside)
    unknown = torch.where(valid, is_cam, float("nan")).requires_grad_()
    loss = general_specific_consistency_loss(scores, unknown, valid)
    (grad,) = torch.autograd.grad(loss, unknown)
    assert loss.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize(("detach", "learning"), [(None, (0, 1)), ("cam", (1,)), ("is_cam", (0,))])
def test_detach_keeps_the_gradient_from_one_side(detach: str | None, learning: tuple[int, ...]) -> None:
    leaves = [x.requires_grad_() for x in maps()]
    loss = general_specific_consistency_loss(*leaves, detach=detach)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert tuple(i for i, grad in enumerate(grads) if grad is not None) == learning
    assert loss == general_specific_consistency_loss(*leaves)


def test_objective_is_the_multi_label_loss_plus_the_weighted_consistency() -> None:
    scores, is_cam = maps()
    logits = torch.randn(2, 3, dtype=torch.float64)
    terms = sipe_loss(logits, scores, is_cam, LABELS, gsc_weight=0.3)
    torch.testing.assert_close(terms.classification, F.multilabel_soft_margin_loss(logits, LABELS.double()))
    torch.testing.assert_close(terms.consistency, F.l1_loss(scores, is_cam))
    torch.testing.assert_close(terms.total, terms.classification + 0.3 * terms.consistency)
    each = sipe_loss(logits, scores, is_cam, LABELS, gsc_weight=0.3, reduction="none")
    torch.testing.assert_close(each.total.mean(), terms.total)


def test_gradients_go_where_the_paper_sends_them() -> None:
    """The consistency moves the classifier and the last stage by the scores, and the projections by the IS-CAM."""
    torch.manual_seed(0)
    levels = [torch.randn(2, c, 6, 5, dtype=torch.float64).requires_grad_() for c in (4, 6, 8)]
    explore = ImageSpecificPrototypeExploration((4, 6, 8), (2, 3, 4)).double()
    head = CAMHead(8, 3).double()
    found = explore(head.class_maps(levels[-1]), levels, LABELS)
    loss = general_specific_consistency_loss(found.scores, normalize_cam(found.is_cam))
    wanted = [*levels, head.classifier.weight, *explore.parameters()]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    assert [grad is not None and bool(grad.any()) for grad in grads] == [False, False, True, True, True, True, True]


def test_training_spreads_the_map_of_a_part_over_the_object() -> None:
    torch.manual_seed(0)
    # an object of two parts that look partly alike, on a background; the classifier starts on the first part alone
    looks = torch.tensor([[1.0, 0.2, 1, 0], [0.2, 1, 1, 0], [0, 0, 0, 1]])
    region = torch.full((6, 8), 2)
    region[1:4, 1:4], region[1:5, 4:7] = 0, 1
    features = (looks[region].movedim(-1, 0) + 0.02 * torch.randn(4, 6, 8)).clamp(min=0)[None].repeat(2, 1, 1, 1)
    features[1, :] = features[1].flip(-1)
    labels, head = torch.ones(2, 1), CAMHead(4, 1)
    head.classifier.weight.data = torch.tensor([3.0, -1, 0, -1]).view(1, 4, 1, 1)
    explore = ImageSpecificPrototypeExploration((4, 4), (8, 8))

    def share_of_body() -> float:
        cam = head(features).cam[0, 0].detach()
        return float(cam[region == 1].mean() / cam[region == 0].mean())

    before = share_of_body()
    optimizer = torch.optim.SGD([*head.parameters(), *explore.parameters()], lr=0.2, momentum=0.9)
    for _ in range(60):
        logits, class_maps = head(features).logits, head.class_maps(features)
        found = explore(class_maps, [features, features], labels)
        terms = sipe_loss(logits, found.scores, normalize_cam(found.is_cam), labels)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
    assert before < 0.1
    assert share_of_body() > 0.5


SCORES, IS_CAM = maps()
LOGITS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: general_specific_consistency_loss(SCORES[0], IS_CAM), ValueError, r"scores: expected shape \(B, 1\+K"),
        (
            lambda: general_specific_consistency_loss(SCORES, IS_CAM[:, :3]),
            ValueError,
            r"is_cam: expected shape \(2, 4, 3, 5\) to match scores, got \(2, 3, 3, 5\)",
        ),
        (lambda: general_specific_consistency_loss(SCORES.long(), IS_CAM), TypeError, r"scores: expected a floating"),
        (lambda: general_specific_consistency_loss(SCORES, IS_CAM.long()), TypeError, r"is_cam: expected a floating"),
        (
            lambda: general_specific_consistency_loss(SCORES, IS_CAM, IS_CAM[:, :2]),
            ValueError,
            r"valid: expected shape \(2, 4, 3, 5\) to match scores, or one channel, got \(2, 2, 3, 5\)",
        ),
        (lambda: GeneralSpecificConsistencyLoss(detach="both"), ValueError, r'detach: expected "cam", "is_cam" or Non'),
        (lambda: GeneralSpecificConsistencyLoss(reduction="max"), ValueError, r'reduction: expected "mean", "sum" or'),
        (lambda: SIPELoss(gsc_weight=-1), ValueError, r"gsc_weight: expected at least 0, got -1"),
        (lambda: sipe_loss(LOGITS[0], SCORES, IS_CAM, LABELS), ValueError, r"logits: expected shape \(B, K\), got"),
        (
            lambda: sipe_loss(LOGITS, SCORES, IS_CAM, LABELS[:1]),
            ValueError,
            r"labels: expected shape \(2, 3\) to match logits, got \(1, 3\)",
        ),
        (
            lambda: sipe_loss(LOGITS, SCORES[:, :3], IS_CAM[:, :3], LABELS),
            ValueError,
            r"scores: expected shape \(2, 4, \*, \*\) to match logits, got \(2, 3, 3, 5\)",
        ),
    ],
)
def test_messages_name_argument_expected_and_given(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
