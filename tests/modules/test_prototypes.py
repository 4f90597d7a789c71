"""k-means, class means, distances and closest pairs against loops, and what holds for any data."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from wsss_modules import (
    FeatureCentreBank,
    centre_distances,
    class_feature_centres,
    closest_pairs,
    kmeans,
)
from wsss_modules.prototypes import centres as implementation


def blobs(n: int = 40, channels: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, channels, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_kmeans(x: Tensor, k: int, iters: int, cosine: bool) -> tuple[list[int], Tensor]:
    """One sample and one cluster at a time, by direct differences."""
    centres = [x[q] / x[q].norm() if cosine else x[q] for q in range(k)]
    for _ in range(iters):
        distance = [[-(row @ c) if cosine else (row - c).square().sum() for c in centres] for row in x]
        labels = [min(range(k), key=lambda q, d=d: d[q].item()) for d in distance]
        for q in range(k):
            members = [row for row, label in zip(x, labels, strict=True) if label == q]
            if members:
                total = torch.stack(members).sum(0)
                centres[q] = total / total.norm() if cosine else total / len(members)
    return labels, torch.stack(centres)


def inertia(x: Tensor, k: int, iters: int) -> float:
    labels, centres = kmeans(x, k, iters)
    return (x - centres[labels]).square().sum().item()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("iters", [1, 10])
@pytest.mark.parametrize("k", [1, 7])
def test_kmeans_equals_a_loop(metric: str, iters: int, k: int) -> None:
    x = blobs()
    labels, centres = kmeans(x, k, iters, metric=metric)
    expected_labels, expected = slow_kmeans(x, k, iters, metric == "cosine")
    assert labels.tolist() == expected_labels
    torch.testing.assert_close(centres, expected)


def test_kmeans_module_equals_kmeans_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = blobs(120).view(3, 40, 5)
    whole = kmeans(x, 4)
    monkeypatch.setattr(implementation, "_TABLE", 3 * 4 * 7)  # seven samples at a time, the last five alone
    assert [(s.start, s.stop) for s in implementation._chunks(x.shape, 4)][:2] == [(0, 7), (7, 14)]
    torch.testing.assert_close(kmeans(x, 4), whole)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_batched_kmeans_with_a_mask_equals_one_by_one_without_the_rest(metric: str) -> None:
    x = blobs(90).view(3, 30, 5)
    valid = torch.rand(3, 30, generator=torch.Generator().manual_seed(1)) < 0.6
    labels, centres = kmeans(x.masked_fill(~valid[:, :, None], torch.nan), 4, metric=metric, valid=valid)
    for g in range(3):
        alone = kmeans(x[g][valid[g]], 4, metric=metric)
        assert torch.equal(labels[g][valid[g]], alone.labels)
        torch.testing.assert_close(centres[g], alone.centres)
    assert bool((labels[~valid] == -1).all())


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 10_000))
def test_kmeans_converges_to_nearest_centres_and_never_climbs(n: int, k: int, seed: int) -> None:
    x = blobs(n, 3, seed)
    course = [inertia(x, k, iters) for iters in range(1, 7)]
    assert all(after <= before + 1e-9 for before, after in pairwise(course))
    labels, centres = kmeans(x, k, 30)
    distance = torch.cdist(x, centres, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(distance.gather(1, labels[:, None])[:, 0], distance.min(1).values)


@given(st.integers(0, 10_000))
def test_kmeans_moves_and_turns_with_the_samples(seed: int) -> None:
    x = blobs(30, 4, seed)
    turn = torch.linalg.qr(blobs(4, 4, seed + 1)).Q
    shift = 1e3 * blobs(1, 4, seed + 2)
    plain, moved = kmeans(x, 5), kmeans(x @ turn + shift, 5)
    assert torch.equal(plain.labels, moved.labels)
    torch.testing.assert_close(moved.centres, plain.centres @ turn + shift)


def test_kmeans_keeps_its_digits_far_from_the_origin() -> None:
    x = blobs(60, 6, dtype=torch.float32)
    assert torch.equal(kmeans(x + 1000, 5).labels, kmeans((x + 1000).double(), 5).labels)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("init", ["first", "kmeans++"])
@pytest.mark.parametrize("case", ["duplicates", "fewer", "zeros", "none_valid"])
def test_kmeans_is_finite_where_clusters_are_empty(metric: str, init: str, case: str) -> None:
    x = {"duplicates": blobs(2).repeat(5, 1), "fewer": blobs(3), "zeros": torch.zeros(8, 5), "none_valid": blobs(8)}[
        case
    ]
    valid = torch.zeros(len(x), dtype=torch.bool) if case == "none_valid" else None
    labels, centres = kmeans(x, 6, metric=metric, init=init, valid=valid)
    assert centres.isfinite().all()
    assert labels.tolist() == [-1] * 8 if case == "none_valid" else labels.min() >= 0
    if case == "none_valid" and init == "first":
        assert not centres.any()
    if case == "fewer" and metric == "euclidean" and init == "first":
        assert torch.equal(labels, torch.arange(3))
        torch.testing.assert_close(centres, x.repeat(2, 1))


def test_kmeans_an_empty_cluster_keeps_its_centre() -> None:
    start = torch.tensor([[0.0], [100.0], [10.0]])
    labels, centres = kmeans(torch.tensor([[1.0], [2.0], [9.0]]), 3, init=start)
    assert labels.tolist() == [0, 0, 2]
    assert centres[:, 0].tolist() == [1.5, 100.0, 9.0]


def test_kmeans_plus_plus_never_draws_a_sample_twice_and_follows_its_generator() -> None:
    x = blobs(6, 2).repeat(4, 1)  # six distinct points: a second draw of one has probability 0

    def draw(seed: int) -> Tensor:
        return kmeans(x, 6, init="kmeans++", generator=torch.Generator().manual_seed(seed)).centres

    assert all(len(draw(seed).unique(dim=0)) == 6 for seed in range(5))
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_kmeans_plus_plus_draws_by_squared_distance() -> None:
    sets = 20_000
    samples, keep = torch.tensor([[0.0], [1.0], [3.0]]).repeat(sets, 1, 1), torch.ones(sets, 3, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    first, second = implementation._spread(samples, keep, 2, False, generator)[:, :, 0].unbind(1)
    for start in (0, 1, 3):
        assert ((first == start).double().mean() - 1 / 3).abs() < 0.015  # 4.5 standard deviations
    after_zero = second[first == 0]
    assert ((after_zero == 3).double().mean() - 9 / 10).abs() < 0.015
    assert not (after_zero == 0).any()


def test_kmeans_plus_plus_leaves_invalid_samples_alone() -> None:
    x, valid = blobs(12).view(2, 6, 5), torch.tensor([[True] * 2 + [False] * 4, [False] * 6])
    for _ in range(5):
        centres = kmeans(x, 2, 1, init="kmeans++", valid=valid).centres
        torch.testing.assert_close(centres[0].sort(0).values, x[0, :2].sort(0).values)
        assert not centres[1].any()


def test_kmeans_goes_on_from_given_centres() -> None:
    x = blobs(50).view(2, 25, 5)
    torch.testing.assert_close(kmeans(x, 4, 3, init=kmeans(x, 4, 2).centres), kmeans(x, 4, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kmeans_of_half_precision_is_the_rounded_float64_result(dtype: torch.dtype) -> None:
    x = blobs(200, 8).to(dtype)
    labels, centres = kmeans(x, 5)
    exact = kmeans(x.double(), 5)
    assert centres.dtype == dtype
    assert torch.equal(labels, exact.labels)
    torch.testing.assert_close(centres, exact.centres.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_kmeans_ignores_autocast_and_compiles() -> None:
    x, valid = blobs(dtype=torch.float32), torch.arange(40) % 3 > 0
    plain = kmeans(x, 4, valid=valid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(kmeans(x, 4, valid=valid), plain, rtol=0, atol=0)
    compiled = torch.compile(kmeans, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, 4, valid=valid), plain)
    assert not kmeans(x.requires_grad_(), 4).centres.requires_grad


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "x: expected a floating-point tensor", {"x": torch.ones(3, 2, dtype=torch.int64)}),
        (
            ValueError,
            r"x: expected shape \(N, C\) or \(G, N, C\) with at least one sample, got \(0, 2\)",
            {"x": blobs(0)[:, :2]},
        ),
        (ValueError, "k, iters: expected at least 1, got 0 and 10", {"k": 0}),
        (ValueError, "metric: expected", {"metric": "manhattan"}),
        (ValueError, "init: expected", {"init": "random"}),
        (ValueError, r"init: expected shape \(2, 2\)", {"init": torch.zeros(3, 2)}),
        (ValueError, r"valid: expected shape \(3,\) to match x", {"valid": torch.ones(4)}),
    ],
)
def test_kmeans_names_the_wrong_argument(error: type[Exception], message: str, arguments: dict[str, object]) -> None:
    with pytest.raises(error, match=message):
        kmeans(**{"x": torch.ones(3, 2), "k": 2, **arguments})


@given(st.integers(1, 12), st.integers(0, 10_000))
def test_class_feature_centres_equal_a_loop_of_means(n: int, seed: int) -> None:
    features = blobs(n, 4, seed)
    labels = blobs(n, 6, seed + 1) > 0.5
    centres, valid = class_feature_centres(features, labels.float())
    for k in range(6):
        assert valid[k] == labels[:, k].any()
        mean = features[labels[:, k]].mean(0) if labels[:, k].any() else torch.zeros(4, dtype=torch.float64)
        torch.testing.assert_close(centres[k], mean)


def test_class_feature_centres_without_images_or_labels_are_not_valid() -> None:
    for features, labels in [(blobs(0)[:, :3], torch.zeros(0, 2)), (blobs(4), torch.zeros(4, 2))]:
        centres, valid = class_feature_centres(features, labels)
        assert not centres.any()
        assert not valid.any()


def test_class_feature_centres_in_half_precision_are_averaged_in_float32() -> None:
    features = torch.full((4000, 2), 0.1, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        centres = class_feature_centres(features, torch.ones(4000, 1)).centres
    assert centres.dtype == torch.float16
    assert torch.equal(centres, features[:1])


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 10_000))
def test_centre_distances_equal_a_loop(batch: int, clusters: int, seed: int) -> None:
    features, centres = blobs(batch, 3, seed), blobs(clusters, 3, seed + 1)
    expected = torch.tensor([[(z - c).square().sum().sqrt() for c in centres] for z in features], dtype=torch.float64)
    torch.testing.assert_close(centre_distances(features, centres), expected)


def test_centre_distances_keep_their_digits_far_from_the_origin() -> None:
    features, centres = 1000 + blobs(4, 64, dtype=torch.float32), 1000 + blobs(3, 64, 1, dtype=torch.float32)
    exact = centre_distances(features.double(), centres.double())
    torch.testing.assert_close(centre_distances(features, centres).double(), exact, rtol=1e-6, atol=0)


def test_centre_distances_have_a_gradient_of_length_one_or_zero() -> None:
    features = blobs(3, 4).requires_grad_()
    centres = torch.cat([blobs(2, 4, 1), features.detach()[1:2], torch.full((1, 4), torch.nan)])
    valid = torch.tensor([True, True, True, False])
    distances = centre_distances(features, centres, valid)
    assert not distances[:, 3].any()
    for (b, q), length in {(0, 0): 1.0, (1, 1): 1.0, (1, 2): 0.0, (2, 3): 0.0}.items():
        (grad,) = torch.autograd.grad(distances[b, q], features, retain_graph=True)
        torch.testing.assert_close(grad[b].norm().item(), length)
        assert not grad[[i for i in range(3) if i != b]].any()
    assert torch.autograd.gradcheck(lambda x: centre_distances(x, centres[:2]), features)


@given(
    st.integers(1, 5),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.1, 0.2, 1 / 3, 0.7, 1.0]),
    st.integers(0, 10_000),
    st.sampled_from(["batch", "image"]),
)
def test_closest_pairs_are_the_released_rule_on_each_pool(
    batch: int, clusters: int, fraction: float, seed: int, scope: str
) -> None:
    distances, valid = blobs(batch, clusters, seed).abs(), blobs(clusters, 1, seed + 1)[:, 0] > -0.5
    selected, threshold = closest_pairs(distances, fraction, valid=valid, scope=scope)
    pools = [torch.ones(batch, dtype=torch.bool)] if scope == "batch" else list(torch.eye(batch, dtype=torch.bool))
    for number, rows in enumerate(pools):
        pool = sorted((d for d in distances[rows][:, valid].flatten().tolist()), reverse=True)
        apart = int(len(pool) * (1 - fraction))
        limit = pool[apart - 1] if apart else torch.inf
        assert threshold.flatten()[number] == limit
        assert torch.equal(selected[rows], (distances[rows] < limit) & valid)
        assert selected[rows].sum() == len(pool) - apart


def test_closest_pairs_at_distance_zero_are_selected_and_not_counted() -> None:
    distances = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    selected, threshold = closest_pairs(distances, 0.2)
    assert threshold == 2  # the smallest of the four largest of five
    assert selected.tolist() == [[True, True, False, False, False, False]]


def test_closest_pairs_compiles_and_takes_half_precision() -> None:
    distances = blobs(4, 9).abs()
    compiled = torch.compile(closest_pairs, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(distances), closest_pairs(distances))
    half = distances.half()
    assert torch.equal(closest_pairs(half).selected, closest_pairs(half.double()).selected)
    assert closest_pairs(distances[:, :0]).selected.shape == (4, 0)


def filled_bank() -> FeatureCentreBank:
    labels = torch.tensor([[1, 0, 1]] * 5 + [[0, 0, 1]] * 5)
    return FeatureCentreBank(3, 4, 6).fit(blobs(10, 6).float(), labels, blobs(20, 6, 1).float())


def test_bank_holds_class_means_and_cluster_centres() -> None:
    bank = filled_bank()
    torch.testing.assert_close(bank.class_centres[0], blobs(10, 6).float()[:5].mean(0))
    assert bank.class_valid.tolist() == [True, False, True]
    torch.testing.assert_close(bank.ood_centres, kmeans(blobs(20, 6, 1).float(), 4).centres)
    assert bank.ood_valid.all()


def test_bank_round_trips_through_its_state_and_moves_with_the_module() -> None:
    bank, other = filled_bank(), FeatureCentreBank(3, 4, 6)
    assert not any(buffer.any() for buffer in other.buffers())
    other.load_state_dict(bank.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(bank.buffers(), other.buffers(), strict=True))
    assert len(bank.state_dict()) == 4
    assert not list(bank.parameters())
    assert nn.Sequential(bank).double()[0].class_centres.dtype == torch.float64
    assert repr(bank) == "FeatureCentreBank(num_classes=3, num_clusters=4, dim=6)"


def test_bank_can_be_refreshed_and_takes_fewer_images_than_clusters() -> None:
    bank = filled_bank()
    bank.fit(blobs(2, 6, 5).float(), torch.eye(3)[:2], blobs(3, 6, 6).float(), init="kmeans++")
    assert bank.class_valid.tolist() == [True, True, False]
    assert not bank.class_centres[2].any()
    assert bank.ood_centres.isfinite().all()
    assert len(bank.ood_centres.unique(dim=0)) == 3


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"features: expected shape \(N, C\)", lambda: class_feature_centres(blobs().view(2, 20, 5), torch.ones(2, 1))),
        (r"labels: expected shape \(40, \*\)", lambda: class_feature_centres(blobs(), torch.ones(39, 1))),
        (r"centres: expected shape \(\*, 5\) to match features", lambda: centre_distances(blobs(), blobs(3, 4))),
        (r"valid: expected shape \(3,\)", lambda: centre_distances(blobs(), blobs(3), torch.ones(2))),
        (r"distances: expected shape \(B, Q\)", lambda: closest_pairs(blobs()[0])),
        (r"fraction: expected a number in \[0, 1\], got 2", lambda: closest_pairs(blobs(), 2)),
        ("scope: expected", lambda: closest_pairs(blobs(), scope="class")),
        (r"valid: expected shape \(5,\) to match distances", lambda: closest_pairs(blobs(), valid=torch.ones(4))),
        ("num_classes, num_clusters, dim: expected at least 1, got 3, 0 and 6", lambda: FeatureCentreBank(3, 0, 6)),
        (
            r"features: expected shape \(\*, 6\) for this bank",
            lambda: FeatureCentreBank(3, 4, 6).fit(blobs(), torch.ones(40, 3), blobs()),
        ),
        (
            r"labels: expected shape \(40, 2\) for this bank",
            lambda: FeatureCentreBank(2, 4, 5).fit(blobs(), torch.ones(40, 3), blobs()),
        ),
        (
            r"ood_features: expected shape \(\*, 5\) for this bank",
            lambda: FeatureCentreBank(3, 4, 5).fit(blobs(), torch.ones(40, 3), blobs(9, 4)),
        ),
    ],
)
def test_centres_name_the_wrong_argument(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()
