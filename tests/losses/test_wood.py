"""What W-OoD's losses do to images, clusters and logits; `test_common.py` has what holds for every loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.losses.reference_wood import metric_loss_loop
from wsss_losses import OoDMetricLoss, OoDNegativeLoss, WOoDLoss, ood_metric_loss, ood_negative_loss, wood_loss
from wsss_modules import FeatureCentreBank, closest_pairs

seeds = st.integers(0, 10_000)


def draw(seed: int, batch: int = 5, classes: int = 4, clusters: int = 12, channels: int = 6) -> tuple[Tensor, ...]:
    """Features, labels, class centres and OoD centres in float64."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    labels = (torch.rand(batch, classes, **options) < 0.4).double()
    features, of_classes, of_clusters = (torch.randn(n, channels, **options) for n in (batch, classes, clusters))
    return features, labels, of_classes, of_clusters


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


@given(seeds, st.integers(2, 9), st.integers(2, 15), st.sampled_from([0.1, 0.2, 0.35, 0.5]))
def test_ood_metric_loss_equals_the_released_loop(seed: int, batch: int, clusters: int, topk: float) -> None:
    features, *rest = draw(seed, batch, clusters=clusters)
    features.requires_grad_()
    ours, loop = ood_metric_loss(features, *rest, topk=topk), metric_loss_loop(features, *rest, topk)
    torch.testing.assert_close(ours, loop)
    torch.testing.assert_close(gradient(ours, features), gradient(loop, features))


@given(seeds, st.integers(1, 20), st.sampled_from(["batch", "image"]))
def test_missing_centres_contribute_nothing_whatever_they_hold(seed: int, batch: int, selection: str) -> None:
    features, labels, of_classes, of_clusters = draw(seed, batch)
    features.requires_grad_()
    class_there, ood_there = torch.tensor([True, False, True, True]), torch.arange(12) % 3 > 0
    ours = ood_metric_loss(
        features,
        labels,
        of_classes.masked_fill(~class_there[:, None], torch.nan),
        of_clusters.masked_fill(~ood_there[:, None], torch.inf),
        class_there,
        ood_there,
        selection=selection,
    )
    without = (labels[:, class_there], of_classes[class_there], of_clusters[ood_there])
    expected = ood_metric_loss(features, *without, selection=selection) * 8 / 12  # Q counts all clusters
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradient(ours, features), gradient(expected, features))


def test_a_missing_centre_acts_as_a_row_of_zeros_does_in_the_released_loop() -> None:
    features, labels, of_classes, of_clusters = draw(0, 16)
    of_classes[1], of_clusters[5] = 0, 0
    ours = ood_metric_loss(features, labels, of_classes, of_clusters, of_classes.any(1), of_clusters.any(1))
    torch.testing.assert_close(ours, metric_loss_loop(features, labels, of_classes, of_clusters))


@given(seeds)
def test_ood_metric_loss_moves_and_grows_with_features_and_centres(seed: int) -> None:
    features, labels, of_classes, of_clusters = draw(seed)
    shift = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss = ood_metric_loss(features, labels, of_classes, of_clusters)
    torch.testing.assert_close(ood_metric_loss(features + shift, labels, of_classes + shift, of_clusters + shift), loss)
    torch.testing.assert_close(ood_metric_loss(3 * features, labels, 3 * of_classes, 3 * of_clusters), 3 * loss)


@given(seeds, st.sampled_from(["batch", "image"]))
def test_the_order_of_images_classes_and_clusters_does_not_matter(seed: int, selection: str) -> None:
    features, labels, of_classes, of_clusters = draw(seed)
    generator = torch.Generator().manual_seed(seed)
    images, classes, clusters = (torch.randperm(n, generator=generator) for n in (5, 4, 12))
    loss = ood_metric_loss(features, labels, of_classes, of_clusters, selection=selection, reduction="none")
    shuffled = ood_metric_loss(
        features[images],
        labels[images][:, classes],
        of_classes[classes],
        of_clusters[clusters],
        selection=selection,
        reduction="none",
    )
    torch.testing.assert_close(shuffled, loss[images])


@given(seeds, st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]))
def test_batch_and_image_selection_agree_on_one_image(seed: int, topk: float) -> None:
    inputs = draw(seed, 1)
    by_batch, by_image = (ood_metric_loss(*inputs, topk=topk, selection=name) for name in ("batch", "image"))
    torch.testing.assert_close(by_batch, by_image, rtol=0, atol=0)


def test_image_selection_also_pushes_images_that_are_far_from_all_clusters() -> None:
    features, labels, *centres = draw(0)
    features[0] += 50
    by_batch, by_image = (
        ood_metric_loss(features, labels * 0, *centres, topk=0.25, selection=name, reduction="none")
        for name in ("batch", "image")
    )
    assert by_batch[0] == 0
    assert by_batch[1:].sum() < 0
    assert (by_image < 0).all()


def test_without_labels_only_the_push_is_left_and_with_topk_zero_only_the_pull() -> None:
    features, labels, *centres = draw(3)
    push = ood_metric_loss(features, labels * 0, *centres)
    pull = ood_metric_loss(features, labels, *centres, topk=0.0)
    assert push < 0 < pull
    torch.testing.assert_close(ood_metric_loss(features, labels, *centres), push + pull)


def test_gradient_is_that_of_the_selected_pairs_alone() -> None:
    features, labels, *centres = draw(4)
    features.requires_grad_()
    distances = torch.cdist(features, centres[1])
    chosen = closest_pairs(distances.detach()).selected
    expected = -distances[chosen].sum() / distances.numel()
    loss = ood_metric_loss(features, labels * 0, *centres)
    assert 0 < chosen.sum() < chosen.numel()
    torch.testing.assert_close(gradient(loss, features), gradient(expected, features))


def test_centres_get_no_gradient() -> None:
    features, labels, *centres = draw(4)
    leaves = [features.requires_grad_(), *(centre.requires_grad_() for centre in centres)]
    grads = torch.autograd.grad(ood_metric_loss(features, labels, *centres), leaves, allow_unused=True)
    assert grads[0].any()
    assert grads[1:] == (None, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_gradient_is_finite_where_a_feature_lies_on_centres(dtype: torch.dtype) -> None:
    features, labels, of_classes, of_clusters = (x.to(dtype) for x in draw(5))
    labels[:2] = 1
    features[0], of_clusters[3] = of_classes[1], of_classes[1]
    features.requires_grad_()
    loss = ood_metric_loss(features, labels, of_classes, of_clusters)
    assert loss.isfinite()
    assert gradient(loss, features).isfinite().all()


def test_a_margin_bounds_the_loss_and_keeps_the_gradient_below_it() -> None:
    features, labels, *centres = draw(6)
    features.requires_grad_()
    farthest = torch.cdist(features, centres[1]).max().item()
    plain, wide, narrow = (
        ood_metric_loss(features, labels * 0, *centres, margin=margin) for margin in (None, farthest, 0.01)
    )
    assert plain < 0 <= narrow < wide
    torch.testing.assert_close(gradient(plain, features), gradient(wide, features))
    assert not gradient(narrow, features).any()


def test_an_empty_bank_gives_zero() -> None:
    bank, features = FeatureCentreBank(4, 7, 6), torch.randn(3, 6, requires_grad=True)
    centres = (bank.class_centres, bank.ood_centres, bank.class_valid, bank.ood_valid)
    loss = ood_metric_loss(features, torch.ones(3, 4), *centres)
    loss.backward()
    assert loss == 0
    assert not features.grad.any()


@given(seeds, st.integers(1, 6))
def test_ood_negative_loss_is_the_cross_entropy_with_zeros_and_grows_with_every_logit(seed: int, batch: int) -> None:
    logits = 5 * torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits.requires_grad_()
    loss = ood_negative_loss(logits)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)))
    assert (gradient(loss, logits) > 0).all()


def test_images_of_an_ignored_class_have_no_gradient_and_still_count() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 0.0, 4.0]], requires_grad=True)
    losses = ood_negative_loss(logits, ignore_top=(0, 2), reduction="none")
    assert losses.gt(0).tolist() == [False, True, False]
    loss = ood_negative_loss(logits, ignore_top=(0, 2))
    torch.testing.assert_close(loss, losses[1] / 3)
    assert gradient(loss, logits).any(1).tolist() == [False, True, False]


def test_all_images_ignored_gives_zero() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    loss = ood_negative_loss(logits, ignore_top=(0, 1, 2))
    assert loss == 0
    assert not gradient(loss, logits).any()


def test_saturated_logits_keep_their_gradient() -> None:
    logits = torch.tensor([[-40.0, 40.0]], dtype=torch.float64, requires_grad=True)
    assert (gradient(ood_negative_loss(logits), logits) > 0).all()


def test_wood_loss_is_the_weighted_sum_of_its_terms() -> None:
    features, labels, *centres = draw(7)
    logits, ood_logits = features[:, :4] * 2, features[:3, 2:]
    terms = wood_loss(logits, features, ood_logits, labels, *centres, distance_weight=0.5, ood_weight=2.0)
    torch.testing.assert_close(terms.classification, F.binary_cross_entropy_with_logits(logits, labels))
    torch.testing.assert_close(terms.distance, ood_metric_loss(features, labels, *centres))
    torch.testing.assert_close(terms.ood, ood_negative_loss(ood_logits, reduction="sum") / 5)  # images with labels
    torch.testing.assert_close(terms.total, terms.classification + 0.5 * terms.distance + 2 * terms.ood)


def test_wood_loss_without_images_from_outside() -> None:
    features, labels, *centres = draw(7)
    terms = wood_loss(features[:, :4], features, features[:0, :4], labels, *centres)
    assert terms.ood == 0


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "features: expected a floating-point tensor", {"features": torch.ones(2, 3, dtype=torch.int64)}),
        (ValueError, r"features: expected shape \(B, C\)", {"features": torch.ones(2, 3, 1)}),
        (ValueError, r"labels: expected shape \(2, \*\) to match features", {"labels": torch.ones(3, 4)}),
        (ValueError, r"class_centres: expected shape \(4, 3\)", {"class_centres": torch.ones(5, 3)}),
        (ValueError, r"ood_centres: expected shape \(\*, 3\)", {"ood_centres": torch.ones(5, 4)}),
        (ValueError, r"class_valid: expected shape \(4,\) to match class_centres", {"class_valid": torch.ones(5)}),
        (ValueError, r"ood_valid: expected shape \(5,\) to match ood_centres", {"ood_valid": torch.ones(4)}),
        (ValueError, r"topk: expected a number in \[0, 1\], got 20", {"topk": 20}),
        (ValueError, "selection: expected", {"selection": "class"}),
        (ValueError, "reduction: expected", {"reduction": "max"}),
    ],
)
def test_ood_metric_loss_names_the_wrong_argument(
    error: type[Exception], message: str, arguments: dict[str, object]
) -> None:
    sound = {"labels": torch.ones(2, 4), "class_centres": torch.ones(4, 3), "ood_centres": torch.ones(5, 3)}
    with pytest.raises(error, match=message):
        ood_metric_loss(**{"features": torch.ones(2, 3), **sound, **arguments})


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "logits: expected a floating-point tensor", {"logits": torch.ones(2, 3, dtype=torch.int64)}),
        (ValueError, r"logits: expected shape \(B, K\)", {"logits": torch.ones(2, 3, 1)}),
        (ValueError, r"ignore_top: expected classes in 0..2, got \[3, -1\]", {"ignore_top": (0, 3, -1)}),
        (ValueError, "reduction: expected", {"reduction": "max"}),
    ],
)
def test_ood_negative_loss_names_the_wrong_argument(
    error: type[Exception], message: str, arguments: dict[str, object]
) -> None:
    with pytest.raises(error, match=message):
        ood_negative_loss(**{"logits": torch.ones(2, 3), **arguments})


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"labels: expected shape \(2, 4\) to match logits", {"labels": torch.ones(2, 5)}),
        (ValueError, r"features: expected shape \(2, \*\) to match logits", {"features": torch.ones(3, 3)}),
        (ValueError, r"ood_logits: expected shape \(\*, 4\) to match logits", {"ood_logits": torch.ones(2, 3)}),
        (TypeError, "ood_logits: expected a floating-point", {"ood_logits": torch.ones(2, 4, dtype=torch.int64)}),
        (ValueError, "ood_weight: expected at least 0, got -1", {"ood_weight": -1}),
    ],
)
def test_wood_loss_names_the_wrong_argument(error: type[Exception], message: str, arguments: dict[str, object]) -> None:
    sound = {"logits": torch.ones(2, 4), "features": torch.ones(2, 3), "ood_logits": torch.ones(2, 4)}
    centres = {"class_centres": torch.ones(4, 3), "ood_centres": torch.ones(5, 3)}
    with pytest.raises(error, match=message):
        wood_loss(**{**sound, "labels": torch.ones(2, 4), **centres, **arguments})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OoDMetricLoss(topk=20), r"topk: expected a number in \[0, 1\], got 20"),
        (lambda: OoDMetricLoss(selection="class"), "selection: expected"),
        (lambda: OoDMetricLoss(reduction="max"), "reduction: expected"),
        (lambda: OoDNegativeLoss(reduction="max"), "reduction: expected"),
        (lambda: WOoDLoss(topk=-1), r"topk: expected a number in \[0, 1\], got -1"),
        (lambda: WOoDLoss(selection="class"), "selection: expected"),
        (lambda: WOoDLoss(distance_weight=-1), "distance_weight: expected at least 0, got -1"),
        (lambda: WOoDLoss(ood_weight=-0.5), "ood_weight: expected at least 0, got -0.5"),
    ],
    ids=[
        *("topk", "selection", "reduction", "negatives", "objective-topk", "objective-selection"),
        *("distance_weight", "ood_weight"),
    ],
)
def test_options_are_checked_when_a_loss_is_made(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
