import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.modules import reference_aeft
from wsss_losses import (
    AEFTLoss,
    ErasingAttractionLoss,
    ErasingRepulsionLoss,
    ErasingRepulsionTerms,
    aeft_loss,
    erasing_attraction_loss,
    erasing_repulsion_loss,
)
from wsss_modules import GatedPyramidPooling, SoftErase, sample_disjoint_negatives

LABELS = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]])
NEGATIVES = torch.tensor([1, 2, 3, 4, 5, 0])


def random_map(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps(seed: int = 0) -> tuple[Tensor, Tensor]:
    return random_map(6, 3, 4, 5, seed=seed), random_map(6, 3, 4, 5, seed=seed + 1000)


def near_and_far(near: int, value: float = 0.1) -> tuple[Tensor, Tensor]:
    """Pyramids of six images of which the first ``near`` are hard anchors, and maps that leave nothing out."""
    gpp = torch.full((6, 3, 2, 2), -value, dtype=torch.float64)
    gpp[..., 0, 0] = 1.0  # the maximum, on which the others are scaled
    gpp[near:] = 1.0
    return gpp, torch.zeros_like(gpp)


def test_attraction_is_the_mean_difference_of_rectified_means() -> None:
    gpp, masked = maps()
    cost = torch.zeros(6, 3, dtype=torch.float64)
    for i in range(6):
        for k in range(3):
            if LABELS[i, k]:
                responses = [sum(max(v, 0.0) for v in x[i, k].flatten().tolist()) / 20 for x in (gpp, masked)]
                cost[i, k] = abs(responses[0] - responses[1])
    torch.testing.assert_close(erasing_attraction_loss(gpp, masked, LABELS, reduction="none"), cost)
    torch.testing.assert_close(erasing_attraction_loss(gpp, masked, LABELS), cost.mean())
    torch.testing.assert_close(erasing_attraction_loss(gpp, masked, LABELS, reduction="sum"), cost.sum())
    present = erasing_attraction_loss(gpp, masked, LABELS, reduction="present")
    torch.testing.assert_close(present, cost.sum() / LABELS.sum())


@given(st.integers(0, 99))
def test_attraction_is_symmetric_and_zero_only_for_equal_responses(seed: int) -> None:
    gpp, masked = maps(seed)
    loss = erasing_attraction_loss(gpp, masked, LABELS)
    assert loss > 0
    torch.testing.assert_close(erasing_attraction_loss(masked, gpp, LABELS), loss, rtol=0, atol=0)
    assert erasing_attraction_loss(gpp, gpp, LABELS) == 0
    moved = gpp.flip(3)  # other places, same means
    assert not torch.equal(moved, gpp)
    torch.testing.assert_close(erasing_attraction_loss(gpp, moved, LABELS), loss * 0, rtol=0, atol=1e-15)


def test_mean_shrinks_with_absent_classes_and_present_does_not() -> None:
    gpp, masked = maps()
    more = [torch.cat([x, random_map(6, 7, 4, 5)], 1) for x in (gpp, masked)]
    labels = torch.cat([LABELS, torch.zeros(6, 7, dtype=torch.int64)], 1)
    for reduction, ratio in (("mean", 0.3), ("present", 1.0), ("sum", 1.0)):
        few = erasing_attraction_loss(gpp, masked, LABELS, reduction=reduction)
        torch.testing.assert_close(erasing_attraction_loss(*more, labels, reduction=reduction), ratio * few)


def test_attraction_takes_nothing_from_absent_classes() -> None:
    gpp, masked = maps()
    absent = (LABELS == 0)[:, :, None, None]
    spoilt = torch.where(absent, float("nan"), gpp).requires_grad_()
    loss = erasing_attraction_loss(spoilt, masked, LABELS)
    torch.testing.assert_close(loss, erasing_attraction_loss(gpp, masked, LABELS), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(loss, spoilt)
    assert not grad[absent.expand_as(grad)].nan_to_num().any()


def test_attraction_accepts_a_copy_of_another_size_and_teaches_both_sides() -> None:
    gpp, masked = random_map(6, 3, 4, 5).requires_grad_(), random_map(6, 3, 7, 3, seed=1).requires_grad_()
    grads = torch.autograd.grad(erasing_attraction_loss(gpp, masked, LABELS), (gpp, masked))
    assert all(grad.any() for grad in grads)


@given(st.integers(0, 20))
def test_repulsion_equals_the_form_with_loops(seed: int) -> None:
    gpp, cam = maps(seed)
    terms = erasing_repulsion_loss(gpp, cam, LABELS, NEGATIVES, margin=0.1, threshold=0.3, min_hard=1)
    distances, hard, mean = reference_aeft.repulsion(gpp, cam, LABELS, NEGATIVES.tolist(), 0.1, (0.3, 1.0))
    torch.testing.assert_close(terms.distance, torch.tensor(distances, dtype=torch.float64))
    assert terms.hard == hard
    torch.testing.assert_close(terms.total, torch.tensor(mean, dtype=torch.float64))


@given(st.integers(0, 99), st.floats(0.01, 2.0))
def test_repulsion_lies_between_zero_and_the_margin(seed: int, margin: float) -> None:
    gpp, cam = maps(seed)
    total, distance, hard = erasing_repulsion_loss(gpp, cam, LABELS, NEGATIVES, margin=margin, min_hard=1)
    assert 0 <= total <= margin
    assert hard == (distance < margin).sum()


def test_distance_to_an_image_without_a_common_class_is_the_sum_of_both_squares() -> None:
    gpp, cam = maps()

    def distance_of_image_1(silent: int | None) -> Tensor:
        quiet = gpp.clone()
        if silent is not None:
            quiet[silent] = 0
        return erasing_repulsion_loss(quiet, cam, LABELS, NEGATIVES).distance[1]

    of_anchor, of_negative = distance_of_image_1(silent=2), distance_of_image_1(silent=1)
    assert of_anchor > 0
    assert of_negative > 0
    torch.testing.assert_close(of_anchor + of_negative, distance_of_image_1(silent=None))


@pytest.mark.parametrize(("near", "expected"), [(0, 0), (4, 0), (5, 1), (6, 1)])
def test_repulsion_starts_at_five_hard_anchors(near: int, expected: int) -> None:
    negatives = torch.tensor([1, 0, 1, 0, 1, 2])  # near anchors have near negatives
    gpp, cam = near_and_far(max(near, 3))
    gpp.requires_grad_()
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]])
    valid = torch.arange(6) < near if near < 3 else None
    terms = erasing_repulsion_loss(gpp, cam, labels, negatives, valid)
    assert terms.hard == near
    assert (terms.total > 0) == bool(expected)
    (grad,) = torch.autograd.grad(terms.total, gpp)
    assert grad.any() == bool(expected)


def test_far_anchors_are_not_counted_and_get_no_gradient_as_anchors() -> None:
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]])
    gpp, cam = near_and_far(5)
    gpp.requires_grad_()
    terms = erasing_repulsion_loss(gpp, cam, labels, torch.tensor([1, 0, 1, 0, 1, 0]))
    assert terms.distance[5] >= 0.5
    assert (terms.distance[:5] < 0.5).all()
    torch.testing.assert_close(terms.total, (0.5 - terms.distance[:5]).mean())
    (grad,) = torch.autograd.grad(terms.total, gpp)
    assert not grad[5].any()
    assert grad[0].any()


def test_repulsion_gives_the_maps_that_exclude_no_gradient() -> None:
    gpp, cam = (x.requires_grad_() for x in maps())
    total = erasing_repulsion_loss(gpp, cam, LABELS, NEGATIVES).total
    assert total > 0
    assert torch.autograd.grad(total, cam, allow_unused=True) == (None,)


def test_strongly_activated_cells_are_left_out_of_the_anchor_only() -> None:
    gpp, cam = maps()
    base = erasing_repulsion_loss(gpp, cam, LABELS, NEGATIVES).distance
    top = (cam == cam.amax((2, 3), keepdim=True)) & (gpp.abs() < gpp.abs().amax((2, 3), keepdim=True))
    moved = torch.where(top, -gpp, gpp)  # the peak's response changes, the scale does not
    anchors_only = erasing_repulsion_loss(moved, cam, LABELS, NEGATIVES, negative_threshold=0.9).distance
    torch.testing.assert_close(
        anchors_only, erasing_repulsion_loss(gpp, cam, LABELS, NEGATIVES, negative_threshold=0.9).distance
    )
    assert not torch.allclose(erasing_repulsion_loss(moved, cam, LABELS, NEGATIVES).distance, base), "a negative's peak"


def test_repulsion_does_not_depend_on_the_scale_of_an_image() -> None:
    gpp, cam = maps()
    gain = torch.tensor([1e-1, 1.0, 10.0, 1e2, 1.0, 5.0], dtype=torch.float64).view(-1, 1, 1, 1)
    options = {"eps": 1e-12}
    torch.testing.assert_close(
        erasing_repulsion_loss(gain * gpp, cam, LABELS, NEGATIVES, **options),
        erasing_repulsion_loss(gpp, cam, LABELS, NEGATIVES, **options),
    )


@pytest.mark.parametrize("missing", [-1, 6, 99])
def test_an_anchor_without_a_negative_is_left_out_however_that_is_said(missing: int) -> None:
    gpp, cam = maps()
    valid = torch.tensor([True, True, False, True, True, True])
    told = erasing_repulsion_loss(gpp, cam, LABELS, NEGATIVES, valid)
    marked = erasing_repulsion_loss(gpp, cam, LABELS, torch.where(valid, NEGATIVES, missing))
    assert told.hard == marked.hard == 5
    assert told.total == marked.total
    assert told.total != erasing_repulsion_loss(gpp, cam, LABELS, NEGATIVES).total


@pytest.mark.parametrize("empty", [0, 1])
def test_an_image_without_a_label_is_neither_anchor_nor_negative(empty: int) -> None:
    gpp, cam = maps()
    labels = LABELS.clone()
    labels[empty] = 0
    terms = erasing_repulsion_loss(gpp, cam, labels, NEGATIVES, min_hard=1)
    assert terms.hard == 4
    with_it = erasing_repulsion_loss(gpp, cam, LABELS, NEGATIVES)
    kept = [i for i in range(6) if i != empty and NEGATIVES[i] != empty]
    torch.testing.assert_close(terms.total, (0.5 - with_it.distance[kept]).mean())


@pytest.mark.parametrize("classified", [None, 1, 4, 6, 99])
def test_the_objective_weighs_three_terms_of_which_one_sees_the_first_images_only(classified: int | None) -> None:
    (gpp, cam), masked, logits = maps(), random_map(6, 3, 7, 3, seed=5), random_map(6, 3, seed=6)
    terms = aeft_loss(logits, gpp, masked, cam, LABELS, NEGATIVES, classified=classified)
    costs = [
        math.log1p(math.exp(-score if tag else score))
        for scores, tags in list(zip(logits.tolist(), LABELS.tolist(), strict=True))[:classified]
        for score, tag in zip(scores, tags, strict=True)
    ]
    assert terms.classification.item() == pytest.approx(sum(costs) / len(costs))
    torch.testing.assert_close(terms.attraction, erasing_attraction_loss(gpp, masked, LABELS))
    repulsion = erasing_repulsion_loss(gpp, cam, LABELS, NEGATIVES)
    torch.testing.assert_close((terms.repulsion, terms.hard), (repulsion.total, repulsion.hard))
    assert terms.repulsion > 0
    weighted = terms.classification + 0.2 * terms.attraction + 0.15 * terms.repulsion
    torch.testing.assert_close(terms.total, weighted)


def test_sampled_negatives_fit_the_loss() -> None:
    gpp, cam = maps()
    generator = torch.Generator().manual_seed(0)
    negatives = sample_disjoint_negatives(LABELS, generator=generator)
    terms = ErasingRepulsionLoss()(gpp, cam, LABELS, *negatives)
    assert isinstance(terms, ErasingRepulsionTerms)
    assert terms.hard == 6


def test_images_without_any_partner_leave_an_attached_zero() -> None:
    gpp, cam = maps()
    labels = torch.ones(6, 3)
    gpp.requires_grad_()
    terms = erasing_repulsion_loss(gpp, cam, labels, *sample_disjoint_negatives(labels), min_hard=0)
    assert (terms.total, terms.hard) == (0, 0)
    (grad,) = torch.autograd.grad(terms.total, gpp)
    assert not grad.any()


def test_repulsion_without_images() -> None:
    empty = torch.zeros(0, 3, 4, 4, requires_grad=True)
    index = torch.zeros(0, dtype=torch.int64)
    assert erasing_repulsion_loss(empty, empty, torch.zeros(0, 3), index).total == 0
    assert erasing_attraction_loss(empty, empty, torch.zeros(0, 3)) == 0


def test_training_with_triplets_spreads_the_response() -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 4, 12, 12) * 0.1
    labels = torch.eye(2).repeat(4, 1)
    for k in range(2):
        images[labels[:, k] > 0, 2 * k, 2:10, 2:10] += 0.5  # a plain body
        images[labels[:, k] > 0, 2 * k + 1, 3:5, 3:5] += 3.0  # a telling part
    model, pooling = nn.Conv2d(4, 2, 1, bias=False), GatedPyramidPooling(2)
    parameters = [*model.parameters(), *pooling.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    erase, attract, repel = SoftErase(), ErasingAttractionLoss(), ErasingRepulsionLoss()
    seen = []
    for step in range(60):
        cam = model(images)
        logits, gpp = pooling(cam)
        copy = pooling(model(images * erase(cam, labels, images.shape[2:]))).gpp
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        attraction, repulsion = attract(gpp, copy, labels), repel(gpp, cam, labels, *sample_disjoint_negatives(labels))
        if step >= 30:
            seen.append(repulsion.distance.mean().item())
            loss = loss + 0.2 * attraction + 0.15 * repulsion.total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[-1] > seen[0], "anchors and negatives move apart"
    assert torch.equal(logits > 0, labels > 0)


def test_messages_name_argument_expected_and_given() -> None:
    gpp, cam = maps()
    with pytest.raises(ValueError, match=r"reduction: expected \"mean\", \"present\", \"sum\" or \"none\", got 'max'"):
        erasing_attraction_loss(gpp, cam, LABELS, reduction="max")
    with pytest.raises(ValueError, match=r"reduction: expected .* got 'max'"):
        ErasingAttractionLoss(reduction="max")
    with pytest.raises(ValueError, match=r"gpp_masked: expected shape \(6, 3, \*, \*\) to match gpp, got \(6, 2"):
        erasing_attraction_loss(gpp, cam[:, :2], LABELS)
    with pytest.raises(ValueError, match=r"labels: expected shape \(6, 3\) to match gpp, got \(5, 3\)"):
        erasing_attraction_loss(gpp, cam, LABELS[:5])
    with pytest.raises(TypeError, match=r"gpp_masked: expected a floating-point tensor, got torch.int64"):
        erasing_attraction_loss(gpp, cam.long(), LABELS)
    with pytest.raises(ValueError, match=r"cam: expected shape \(6, 3, 4, 5\) to match gpp, got \(6, 3, 4, 4\)"):
        erasing_repulsion_loss(gpp, cam[..., :4], LABELS, NEGATIVES)
    with pytest.raises(ValueError, match=r"negative_index: expected shape \(6,\) to match gpp, got \(5,\)"):
        erasing_repulsion_loss(gpp, cam, LABELS, NEGATIVES[:5])
    with pytest.raises(TypeError, match=r"negative_index: expected an integer tensor, got torch.float32; sample_disj"):
        erasing_repulsion_loss(gpp, cam, LABELS, NEGATIVES.float())
    with pytest.raises(TypeError, match=r"valid: expected a bool tensor, got torch.int64"):
        erasing_repulsion_loss(gpp, cam, LABELS, NEGATIVES, NEGATIVES)
    with pytest.raises(ValueError, match=r"valid: expected shape \(6,\) to match gpp, got \(3,\)"):
        erasing_repulsion_loss(gpp, cam, LABELS, NEGATIVES, NEGATIVES[:3] > 0)


@pytest.mark.parametrize(
    ("option", "message"), [({"margin": -0.1}, r"margin: .* -0\.1"), ({"min_hard": -1}, r"min_hard: .* -1")]
)
def test_repulsion_rejects_options_out_of_range(option: dict[str, float], message: str) -> None:
    gpp = torch.zeros(2, 2, 3, 3)
    with pytest.raises(ValueError, match=message):
        erasing_repulsion_loss(gpp, gpp, torch.eye(2), torch.tensor([1, 0]), **option)
    for criterion in (ErasingRepulsionLoss, AEFTLoss):
        with pytest.raises(ValueError, match=message):
            criterion(**option)


def test_no_image_to_classify_is_refused() -> None:
    gpp, message = torch.zeros(2, 2, 3, 3), "classified: expected at least 1, got 0"
    with pytest.raises(ValueError, match=message):
        aeft_loss(torch.zeros(2, 2), gpp, gpp, gpp, torch.eye(2), torch.tensor([1, 0]), classified=0)
    with pytest.raises(ValueError, match=message):
        AEFTLoss(classified=0)


def test_repulsion_of_empty_maps_is_finite_without_eps() -> None:
    gpp = torch.zeros(2, 2, 3, 3, requires_grad=True)
    terms = erasing_repulsion_loss(gpp, gpp, torch.eye(2), torch.tensor([1, 0]), min_hard=1, eps=1e-12)
    terms.total.backward()
    assert terms.distance.eq(0).all()
    assert gpp.grad.isfinite().all()
