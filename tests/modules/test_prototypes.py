"""k-means against a loop over samples and clusters, and what holds for any data."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wsss_modules import kmeans, prototypes


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


def test_kmeans_in_chunks_equals_kmeans_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = blobs(120).view(3, 40, 5)
    whole = kmeans(x, 4)
    monkeypatch.setattr(prototypes, "_TABLE", 3 * 4 * 7)  # seven samples at a time, the last five alone
    assert [(s.start, s.stop) for s in prototypes._chunks(x.shape, 4)][:2] == [(0, 7), (7, 14)]
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
