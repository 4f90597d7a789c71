import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.modules.reference_instances import centroid_of, centroids_numpy, detections, flood_fill
from wsss_modules import cluster_centroids, connected_components, detect_instances, find_centroids


@st.composite
def label_maps(draw: st.DrawFn) -> Tensor:
    height, width, labels = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 3))
    values = draw(st.lists(st.integers(0, labels), min_size=height * width, max_size=height * width))
    return torch.tensor(values).reshape(height, width)


@given(label_maps())
def test_components_equal_a_flood_fill(labels: Tensor) -> None:
    assert torch.equal(connected_components(labels), flood_fill(labels))
    assert torch.equal(connected_components(labels > 0), flood_fill((labels > 0).long()))


@pytest.mark.parametrize("density", [0.3, 0.5, 0.59, 0.8])
def test_components_of_large_noise_equal_a_flood_fill(density: float) -> None:
    mask = torch.rand(97, 131) < density
    assert torch.equal(connected_components(mask), flood_fill(mask.long()))


def snake(size: int) -> Tensor:
    """One component that winds: the worst case for propagation from neighbour to neighbour."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[::2] = True
    mask[1::4, -1] = True
    mask[3::4, 0] = True
    return mask


@pytest.mark.parametrize("turned", range(4))
def test_components_of_winding_shapes(turned: int) -> None:
    mask = snake(33).rot90(turned)
    assert torch.equal(connected_components(mask), mask.long())
    comb = torch.zeros(20, 21, dtype=torch.bool)
    comb[:, ::2], comb[-1] = True, True
    comb = comb.rot90(turned)
    assert torch.equal(connected_components(comb), comb.long())
    assert torch.equal(connected_components(~comb), flood_fill((~comb).long()))


def test_components_of_a_batch_are_numbered_anew_for_each_map() -> None:
    maps = (torch.rand(2, 3, 9, 11) * 3).long()
    maps[0, 1], maps[1, 0] = 0, 7
    out = connected_components(maps)
    assert out.shape == maps.shape
    for b in range(2):
        for k in range(3):
            assert torch.equal(out[b, k], flood_fill(maps[b, k]))


@pytest.mark.parametrize("shape", [(5, 6), (1, 1), (1, 8), (8, 1), (3, 4, 4)])
def test_components_of_empty_and_full_masks(shape: tuple[int, ...]) -> None:
    assert not connected_components(torch.zeros(shape, dtype=torch.bool)).any()
    assert torch.equal(connected_components(torch.ones(shape, dtype=torch.bool)), torch.ones(shape, dtype=torch.int64))


def test_components_of_nothing() -> None:
    assert connected_components(torch.zeros(0, 4, 4, dtype=torch.bool)).shape == (0, 4, 4)
    assert connected_components(torch.zeros(3, 0, dtype=torch.bool)).shape == (3, 0)


def grid(h: int, w: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.stack(torch.meshgrid(torch.arange(h, dtype=dtype), torch.arange(w, dtype=dtype), indexing="ij"))


def smooth_field(h: int, w: int) -> Tensor:
    """Two wells, a little noise."""
    position = grid(h, w)
    centres = torch.tensor([[0.3 * h, 0.25 * w], [0.6 * h, 0.75 * w]])[:, :, None, None]
    nearer = (position - centres).square().sum(1).argmin(0)
    return 0.4 * (torch.where(nearer == 0, centres[0], centres[1]) - position) + 0.05 * torch.randn(2, h, w)


@pytest.mark.parametrize(("iterations", "gain"), [(1, 1.0), (7, 1.0), (100, 1.0), (50, 6.0)])
def test_centroids_equal_the_loop_over_cells(iterations: int, gain: float) -> None:
    field = (gain * smooth_field(9, 11)).double()
    out = find_centroids(field, iterations)
    expected = torch.tensor([[centroid_of(field, y, x, iterations) for x in range(11)] for y in range(9)])
    assert out.dtype == torch.int64
    # cycles amplify the rounding of the two orders of summation, so that single cells may differ
    assert (out.permute(1, 2, 0) == expected).double().mean() >= (1.0 if gain == 1.0 else 0.98)


@pytest.mark.parametrize("iterations", [1, 100])
def test_centroids_equal_the_released_form_on_large_fields(iterations: int) -> None:
    field = 2.5 * smooth_field(32, 40)
    expected = torch.from_numpy(centroids_numpy(field.numpy(), iterations))
    assert (find_centroids(field, iterations) == expected).double().mean() >= 0.99  # float32 rounding at .5


def test_centroids_of_a_zero_field_are_the_cells_themselves() -> None:
    assert torch.equal(find_centroids(torch.zeros(2, 5, 7)), grid(5, 7).long())


@pytest.mark.parametrize("sign", [1, -1])
def test_centroids_of_a_strong_constant_field_lie_in_the_corner(sign: int) -> None:
    out = find_centroids(torch.full((2, 5, 7), sign * 1e6))
    corner = torch.tensor([4, 6]) if sign > 0 else torch.tensor([0, 0])
    assert torch.equal(out, corner[:, None, None].expand(2, 5, 7))


def test_centroids_of_a_perfect_field_are_its_centre() -> None:
    field = torch.tensor([2.0, 4.0])[:, None, None] - grid(6, 9)
    out = find_centroids(field)
    assert torch.equal(out, torch.tensor([2, 4])[:, None, None].expand(2, 6, 9))
    assert cluster_centroids(out, field).shape == (1, 6, 9)


def test_centroids_round_half_to_even() -> None:
    field = torch.tensor([1.5, 2.5])[:, None, None] - grid(5, 5)
    assert find_centroids(field)[:, 0, 0].tolist() == [2, 2]


def test_centroids_stop_early_without_a_difference() -> None:
    field = smooth_field(12, 14)
    assert torch.equal(find_centroids(field, 400), find_centroids(field, 4000))


def test_centroids_of_a_batch_equal_those_of_its_fields() -> None:
    fields = torch.stack([smooth_field(7, 8), torch.zeros(2, 7, 8), -smooth_field(7, 8)])
    out = find_centroids(fields)
    assert torch.equal(out, torch.stack([find_centroids(field) for field in fields]))
    assert torch.equal(find_centroids(fields.reshape(3, 1, 2, 7, 8)), out[:, None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_centroids_of_a_half_precision_field_are_computed_in_float32(dtype: torch.dtype) -> None:
    field = smooth_field(12, 14).to(dtype)
    assert torch.equal(find_centroids(field), find_centroids(field.float()))


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (6, 1)])
def test_centroids_of_thin_fields(size: tuple[int, int]) -> None:
    out = find_centroids(torch.randn(2, *size))
    assert bool((out >= 0).all())
    assert int(out[0].max()) < size[0]
    assert int(out[1].max()) < size[1]


def test_clusters_are_a_partition_ordered_by_their_areas() -> None:
    field = 2.5 * smooth_field(16, 20)
    masks = cluster_centroids(find_centroids(field), field)
    assert masks.dtype == torch.bool
    assert torch.equal(masks.sum(0), torch.ones(16, 20, dtype=torch.int64))
    assert len(masks) == 2
    assert bool(masks[0, 4, 5])
    assert bool(masks[1, 10, 15])


def test_cells_that_lead_to_no_centroid_form_the_first_group() -> None:
    field = torch.full((2, 6, 6), 3.0)  # everything runs into the corner, where it is still strong
    field[:, 0, 0] = 0
    masks = cluster_centroids(find_centroids(field), field)
    assert masks.sum((1, 2)).tolist() == [35, 1]
    assert bool(masks[1, 0, 0])


def test_clusters_follow_the_rule_cell_by_cell() -> None:
    field = 2 * torch.randn(2, 10, 12)
    centroids = find_centroids(field)
    areas = flood_fill((field.norm(dim=0) < 1.5).long())
    owner = areas[centroids[0], centroids[1]]
    expected = torch.stack([owner == number for number in owner.unique()])
    assert torch.equal(cluster_centroids(centroids, field, 1.5), expected)


@given(st.integers(0, 1000), st.integers(1, 4), st.sampled_from([0.0, 0.05, 0.3]))
def test_detections_equal_the_loop_over_channels(seed: int, maps: int, min_area: float) -> None:
    scores = torch.rand(maps, 7, 9, generator=torch.Generator().manual_seed(seed))
    classes = torch.randint(1, 21, (maps,), generator=torch.Generator().manual_seed(seed))
    found = detect_instances(scores, classes, threshold=0.6, min_area=min_area)
    expected = detections(scores, classes.tolist(), 0.6, min_area)
    assert len(found.mask) == len(found.classes) == len(found.score) == len(expected)
    for mask, label, score, one in zip(*found, expected, strict=True):
        assert torch.equal(mask, one[0])
        assert (int(label), float(score)) == one[1:]


def test_an_area_of_just_the_least_size_keeps_its_score() -> None:
    scores = torch.zeros(1, 4, 10)
    scores[0, 0, :4], scores[0, 2, :3] = 0.8, 0.9
    assert detect_instances(scores, torch.tensor([1]), min_area=0.1).score.tolist() == [pytest.approx(0.8), 0.0]


@pytest.mark.parametrize("scores", [torch.zeros(2, 5, 6), torch.full((2, 5, 6), float("nan")), torch.zeros(0, 5, 6)])
def test_nothing_found_gives_empty_arrays(scores: Tensor) -> None:
    found = detect_instances(scores, torch.ones(len(scores), dtype=torch.int64))
    assert found.mask.shape == (0, 5, 6)
    assert found.classes.shape == found.score.shape == (0,)
    assert found.mask.dtype == torch.bool


def test_at_threshold_one_only_more_than_the_maximum_could_survive() -> None:
    scores = torch.rand(2, 5, 6)
    scores = scores / scores.max()
    assert len(detect_instances(scores, torch.tensor([1, 2]), threshold=1.0).mask) == 0
    below = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
    found = detect_instances(scores, torch.tensor([1, 2]), threshold=below)
    assert found.mask.sum().item() == 1
    assert found.score.tolist() == [0.0 if 1 < 0.01 * 30 else 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_detections_keep_the_dtype_of_the_scores(dtype: torch.dtype) -> None:
    scores = torch.rand(2, 5, 6).to(dtype)
    found = detect_instances(scores, torch.tensor([3, 4]))
    assert found.score.dtype == dtype
    assert float(found.score.max()) == float(scores.max())


FIELD = torch.zeros(2, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: find_centroids(FIELD[:1]),
            ValueError,
            r"displacement: expected shape \(\.\.\., 2, h, w\), got \(1, 4, 4\)",
        ),
        (lambda: find_centroids(FIELD.long()), TypeError, r"displacement: expected a floating-point tensor"),
        (lambda: find_centroids(FIELD + float("nan")), ValueError, r"displacement: expected finite values"),
        (lambda: find_centroids(FIELD + float("inf")), ValueError, r"displacement: expected finite values"),
        (lambda: connected_components(FIELD), TypeError, r"labels: expected an integer tensor, got torch.float32"),
        (lambda: connected_components(torch.ones(3).bool()), ValueError, r"labels: expected shape \(\.\.\., H, W\)"),
        (
            lambda: cluster_centroids(FIELD.long(), FIELD[None]),
            ValueError,
            r"displacement: expected shape \(2, \*, \*\)",
        ),
        (lambda: cluster_centroids(FIELD[:, 1:].long(), FIELD), ValueError, r"centroids: expected shape \(2, 4, 4\)"),
        (lambda: cluster_centroids(FIELD, FIELD), TypeError, r"centroids: .*; find_centroids gives them"),
        (lambda: detect_instances(FIELD[0], torch.ones(4).long()), ValueError, r"scores: expected shape \(M, H, W\)"),
        (lambda: detect_instances(FIELD, torch.ones(3).long()), ValueError, r"classes: expected shape \(2,\) to match"),
        (lambda: detect_instances(FIELD, torch.ones(2)), TypeError, r"classes: expected an integer tensor"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_instance_messages(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
