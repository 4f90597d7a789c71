import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from tests.modules import reference_affinity as reference
from wsss_modules import (
    AffinityHead,
    EdgeToAffinity,
    LocalAffinity,
    affinity_labels,
    affinity_offsets,
    edge_to_affinity,
    feature_affinity,
    pair_displacement,
    pair_index,
    path_offsets,
)
from wsss_modules.affinity import head as head_module
from wsss_modules.affinity import path_maxima as maxima_module

opcheck_reads_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
radii = st.integers(2, 6)
sides = st.integers(1, 8)


def distinct(*shape: int, seed: int = 0) -> torch.Tensor:
    """float64 in (0, 1), no two values alike, so that a maximum is attained once."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    return ((torch.randperm(count, generator=generator) + 1) / (count + 1)).double().view(shape)


def local_affinity(size: tuple[int, int], radius: int, batch: int = 1) -> LocalAffinity:
    return EdgeToAffinity(radius)(distinct(batch, 1, *size))


# offsets, paths, indices


@given(radii)
def test_offsets_hold_one_of_each_opposite_pair_inside_the_disc(radius: int) -> None:
    offsets = affinity_offsets(radius)
    assert list(offsets) == reference.disc(radius)
    both = set(offsets) | {(-dy, -dx) for dy, dx in offsets}
    square = itertools.product(range(-radius, radius + 1), repeat=2)
    assert both == {(dy, dx) for dy, dx in square if 0 < dy * dy + dx * dx < radius * radius}
    assert len(both) == 2 * len(offsets)


@pytest.mark.parametrize(("radius", "pairs", "points", "longest"), [(5, 34, 242, 11), (10, 152, 2134, 22)])
def test_path_offsets_have_the_published_counts(radius: int, pairs: int, points: int, longest: int) -> None:
    paths = path_offsets(radius).paths
    assert (len(paths), sum(map(len, paths)), max(map(len, paths))) == (pairs, points, longest)


@given(radii)
def test_paths_join_their_ends(radius: int) -> None:
    offsets, paths = path_offsets(radius)
    assert sorted(offsets) == sorted(affinity_offsets(radius))
    assert list(offsets) == reference.path_order(radius)
    for (dy, dx), path in zip(offsets, paths, strict=True):
        points = set(path)
        assert sorted(points) == sorted(reference.line(dy, dx))
        assert len(points) == len(path)
        assert path[0] == (dy, dx)
        assert path[-1] == (0, 0)
        assert all(0 <= y <= dy and min(0, dx) <= x <= max(0, dx) for y, x in path)
        assert points == {(dy - y, dx - x) for y, x in path}  # symmetric about its centre
        reached, frontier = {(0, 0)}, {(0, 0)}
        while frontier:
            near = {(y + a, x + b) for y, x in frontier for a in (-1, 0, 1) for b in (-1, 0, 1)}
            frontier = (near & points) - reached
            reached |= frontier
        assert reached == points


@given(radii)
def test_path_cover_joins_shorter_paths_to_each_path(radius: int) -> None:
    offsets, paths = path_offsets(radius)
    for p, pieces in enumerate(maxima_module.path_cover(radius)):
        covered = set()
        for piece in pieces:
            assert piece.path < p
            corner = (0, min(0, offsets[p][1]))
            inner = [(0, 0)] if piece.path < 0 else paths[piece.path]
            left = 0 if piece.path < 0 else min(0, offsets[piece.path][1])
            covered |= {(y + piece.down + corner[0], x - left + piece.right + corner[1]) for y, x in inner}
        assert covered == set(paths[p])


@pytest.mark.parametrize(("radius", "maxima"), [(5, 29), (10, 173)])
def test_path_cover_needs_few_maxima(radius: int, maxima: int) -> None:
    assert sum(len(pieces) - 1 for pieces in maxima_module.path_cover(radius)) == maxima


@given(radii, st.integers(0, 4), st.integers(0, 4), st.sampled_from(["raster", "path"]))
def test_pair_index_lists_each_pair_of_the_crop_once(
    radius: int, more_rows: int, more_columns: int, order: str
) -> None:
    height, width = radius + more_rows, 2 * radius - 1 + more_columns
    source, destination = pair_index(radius, (height, width), order=order)
    count = (height - radius + 1) * (width - 2 * radius + 2)
    assert source.shape == (count,)
    assert destination.shape == (len(affinity_offsets(radius)), count)
    pairs = torch.stack([source.expand_as(destination), destination], -1).flatten(0, 1)
    assert len({tuple(sorted(pair)) for pair in pairs.tolist()}) == len(pairs)
    rows, columns = pairs // width, pairs % width
    squared = rows.diff().square() + columns.diff().square()
    assert squared.min() > 0
    assert squared.max() < radius * radius


@pytest.mark.parametrize("size", [(4, 9), (5, 8)])
def test_pair_functions_refuse_a_map_without_source(size: tuple[int, int]) -> None:
    message = rf"size: expected at least 5 x 9 pixels for radius 5, got {size[0]} x {size[1]}; border='full' has no"
    for call in (
        lambda: pair_index(5, size),
        lambda: affinity_labels(torch.zeros(1, *size, dtype=torch.int64), 5),
        lambda: edge_to_affinity(torch.zeros(1, 1, *size), 5),
        lambda: feature_affinity(torch.zeros(1, 3, *size), 5),
        lambda: pair_displacement(torch.zeros(1, 2, *size), 5),
        lambda: LocalAffinity.from_pairs(torch.zeros(1, 34, 0), 5, size),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_messages_name_argument_expected_and_given() -> None:
    with pytest.raises(ValueError, match=r"radius: expected an integer of at least 2, got 1; radius 1 holds no pair"):
        affinity_offsets(1)
    with pytest.raises(ValueError, match=r"radius: expected an integer of at least 2, got 0"):
        EdgeToAffinity(0)
    with pytest.raises(ValueError, match=r"order: expected 'raster' or 'path', got 'column'"):
        pair_index(2, (3, 3), order="column")
    with pytest.raises(ValueError, match=r"border: expected 'released' or 'full', got 'none'"):
        edge_to_affinity(torch.zeros(1, 1, 3, 3), 2, border="none")
    with pytest.raises(TypeError, match=r"mask: expected an integer tensor, got torch.float32; did you pass scores\?"):
        affinity_labels(torch.zeros(1, 3, 3), 2)
    with pytest.raises(ValueError, match=r"mask: expected shape \(B, H, W\), got \(3, 3\)"):
        affinity_labels(torch.zeros(3, 3, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"edge: expected shape \(\*, 1, \*, \*\) \(B, 1, H, W\), got \(1, 2, 3, 3\)"):
        edge_to_affinity(torch.zeros(1, 2, 3, 3), 2)
    with pytest.raises(TypeError, match=r"edge: expected a floating-point tensor, got torch.int64"):
        edge_to_affinity(torch.zeros(1, 1, 3, 3, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"distance: expected 'mean' or 'sum', got 'max'"):
        feature_affinity(torch.zeros(1, 2, 3, 3), 2, distance="max")
    with pytest.raises(ValueError, match=r"displacement: expected shape \(\*, 2, \*, \*\)"):
        pair_displacement(torch.zeros(1, 3, 4, 4), 2)
    with pytest.raises(ValueError, match=r"values: expected 2 maps, one for each offset, got 3"):
        LocalAffinity(((0, 1), (1, 0)), torch.zeros(1, 3, 4, 4))
    with pytest.raises(
        ValueError, match=r"pairs: expected shape \(\*, 4, 2\) \(B, P, n\) of a 3 x 3 map, got \(1, 4, 3\)"
    ):
        LocalAffinity.from_pairs(torch.zeros(1, 4, 3), 2, (3, 3))
    with pytest.raises(ValueError, match=r"matrix: expected shape \(\*, 6, 6\) for a 2 x 3 map, got \(1, 5, 5\)"):
        LocalAffinity.from_dense(torch.eye(5)[None], (2, 3))
    with pytest.raises(ValueError, match=r"beta: expected a number >= 0, got -1"):
        local_affinity((2, 2), 2).power(-1)
    with pytest.raises(ValueError, match=r"x: expected shape \(\*, \*, 2, 2\) \(B, C, H, W\), the map of the affinity"):
        local_affinity((2, 2), 2).matvec(torch.zeros(1, 1, 2, 3))
    with pytest.raises(ValueError, match=r"in_channels, widths, groups: expected three numbers each, got \(2, 3, 3\)"):
        AffinityHead((8, 8))
    with pytest.raises(ValueError, match=r"norm: expected 'gn' or None, got 'bn'"):
        AffinityHead((8, 8, 8), norm="bn")
    with pytest.raises(ValueError, match=r"distance: expected 'mean' or 'sum', got 'max'"):
        AffinityHead((8, 8, 8), distance="max")
    with pytest.raises(ValueError, match=r"border: expected 'released' or 'full', got 'half'"):
        AffinityHead((8, 8, 8), border="half")
    with pytest.raises(ValueError, match=r"radius: expected an integer of at least 2, got 1"):
        AffinityHead((8, 8, 8), radius=1)


# labels


@given(st.integers(2, 4), sides, sides, st.sampled_from(["raster", "path"]), st.integers(0, 9))
def test_affinity_labels_match_pair_by_pair_comparison(
    radius: int, height: int, width: int, order: str, seed: int
) -> None:
    mask = torch.randint(0, 5, (2, height, width), generator=torch.Generator().manual_seed(seed))
    mask[mask == 4] = 255
    offsets = reference.disc(radius) if order == "raster" else reference.path_order(radius)
    labels = affinity_labels(mask, radius, order=order, border="full", num_classes=3)
    expected = reference.pair_labels(mask, offsets, radius, "full", ignored={3, 255})
    assert torch.equal(torch.stack(labels), expected)
    assert torch.stack(labels).sum(0).max() <= 1
    renamed = torch.tensor([0, 2, 1, 3] + [3] * 251 + [255])[mask]
    for label, swapped in zip(
        labels, affinity_labels(renamed, radius, order=order, border="full", num_classes=3), strict=True
    ):
        assert torch.equal(label, swapped)


def test_affinity_labels_of_the_released_crop() -> None:
    mask = torch.randint(0, 3, (2, 6, 9))
    expected = reference.pair_labels(mask, reference.disc(4), 4, "released", ignored={255})
    assert torch.equal(torch.stack(affinity_labels(mask, 4)), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_affinity_labels_ignore_an_unknown_pixel(dtype: torch.dtype) -> None:
    labels = affinity_labels(torch.full((1, 3, 3), 255, dtype=dtype), 2)
    assert not torch.stack(labels).any()
    assert not torch.stack(affinity_labels(torch.full((1, 3, 3), 7, dtype=dtype), 2, ignore_index=7)).any()


# edge to affinity


@given(st.integers(2, 5), sides, sides, st.integers(0, 99))
def test_edge_to_affinity_equals_the_maximum_over_each_path(radius: int, height: int, width: int, seed: int) -> None:
    edge = distinct(2, 1, height, width, seed=seed)
    assert torch.equal(edge_to_affinity(edge, radius, border="full"), reference.edge_to_affinity(edge, radius, "full"))
    assert torch.equal(EdgeToAffinity(radius)(edge).dense(), reference.edge_matrix(edge, radius))


@pytest.mark.parametrize(("radius", "size"), [(2, (2, 3)), (5, (7, 12)), (10, (12, 21))])
def test_edge_to_affinity_in_the_released_crop_equals_a_gather(radius: int, size: tuple[int, int]) -> None:
    edge = distinct(3, 1, *size).requires_grad_()
    ours, gathered = edge_to_affinity(edge, radius), reference.gathered_edge_to_affinity(edge, radius)
    assert torch.equal(ours, gathered)
    upstream = torch.randn_like(ours)
    (grad,) = torch.autograd.grad(ours, edge, upstream)
    torch.testing.assert_close(grad, torch.autograd.grad(gathered, edge, upstream)[0])


@given(st.integers(2, 5), st.integers(0, 99))
def test_edge_to_affinity_falls_with_edge_and_is_0_across_a_wall(radius: int, seed: int) -> None:
    edge = distinct(1, 1, 5, 6, seed=seed)
    low, high = (edge_to_affinity(e, radius, border="full") for e in (edge / 2, edge))
    inside = low > 0
    assert torch.equal(inside, high > 0)
    assert (high[inside] < low[inside]).all()
    assert torch.equal(edge_to_affinity(edge * 0, radius, border="full"), inside.double())
    edge[..., 3] = 1
    dense = EdgeToAffinity(radius)(edge).dense().view(5, 6, 5, 6)
    assert not dense[:, :3, :, 4:].any()
    assert dense[:, :3, :, :3].any()


def test_edge_to_affinity_of_neighbours_needs_two_pixels() -> None:
    edge = distinct(1, 1, 4, 5).requires_grad_()
    affinity = EdgeToAffinity(4)(edge)
    for offset in ((0, 1), (1, 0)):
        (grad,) = torch.autograd.grad(affinity.values[0, affinity.offsets.index(offset), 1, 2], edge, retain_graph=True)
        first, second = edge[0, 0, 1, 2], edge[0, 0, 1 + offset[0], 2 + offset[1]]
        assert grad.count_nonzero() == 1
        assert grad[0, 0, 1, 2] + grad[0, 0, 1 + offset[0], 2 + offset[1]] == -1
        assert (grad[0, 0, 1, 2] == -1) == (first > second)


@given(st.integers(2, 5), st.sampled_from([2, 3]), st.integers(0, 99))
def test_edge_to_affinity_commutes_with_mirror_images(radius: int, axis: int, seed: int) -> None:
    edge = distinct(1, 1, 4, 6, seed=seed)
    index = torch.arange(24).view(4, 6).flip(axis - 2).flatten()
    dense = EdgeToAffinity(radius)(edge).dense()
    assert torch.equal(EdgeToAffinity(radius)(edge.flip(axis)).dense(), dense[:, index][:, :, index])


def test_edge_to_affinity_gradient_with_ties_goes_to_one_pixel_of_the_path() -> None:
    edge = torch.full((2, 1, 5, 9), 0.5, dtype=torch.float64, requires_grad=True)
    affinity = edge_to_affinity(edge, 5)
    (grad,) = torch.autograd.grad(affinity[0, 20, 0], edge, retain_graph=True)
    assert sorted(grad.flatten().tolist())[:2] == [-1, 0]
    (grad,) = torch.autograd.grad(affinity.sum(), edge)
    torch.testing.assert_close(-grad.sum(), affinity.sum() * 2)  # each pair has affinity 0.5 and slope -1


def test_edge_to_affinity_gradcheck() -> None:
    edge = distinct(2, 1, 5, 9).requires_grad_()
    assert gradcheck(lambda e: edge_to_affinity(e, 4), edge)
    assert gradcheck(lambda e: edge_to_affinity(e, 5, border="full"), distinct(2, 1, 3, 4).requires_grad_())


def test_edge_to_affinity_in_groups_of_images_equals_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    edge = distinct(5, 1, 6, 9).requires_grad_()
    whole = edge_to_affinity(edge, 5)
    (grad,) = torch.autograd.grad(whole.square().sum(), edge)
    monkeypatch.setattr(maxima_module, "CHUNK_BYTES", 34 * 6 * 9 * 8 * 2)
    assert maxima_module.chunk_size(34, edge[:, 0]) == 2
    parts = edge_to_affinity(edge, 5)
    assert torch.equal(whole, parts)
    assert torch.equal(grad, torch.autograd.grad(parts.square().sum(), edge)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_edge_to_affinity_keeps_dtype(dtype: torch.dtype) -> None:
    edge = distinct(1, 1, 6, 9).to(dtype).requires_grad_()
    affinity = edge_to_affinity(edge, 5)
    assert affinity.dtype == dtype
    assert torch.equal(affinity, 1 - reference.gathered_edge_to_affinity(edge.double(), 5).neg().add(1).to(dtype))
    affinity.sum().backward()
    assert edge.grad is not None
    assert edge.grad.dtype == dtype
    assert edge.grad.isfinite().all()


# features to affinity


@pytest.mark.parametrize("distance", ["mean", "sum"])
@pytest.mark.parametrize(("radius", "size"), [(2, (2, 3)), (3, (6, 5)), (5, (7, 12))])
def test_feature_affinity_equals_gathered_pairs(radius: int, size: tuple[int, int], distance: str) -> None:
    features = torch.randn(2, 7, *size, dtype=torch.float64, requires_grad=True)
    ours = feature_affinity(features, radius, distance=distance)
    gathered = reference.gathered_feature_affinity(features, radius, distance)
    torch.testing.assert_close(ours, gathered, rtol=1e-12, atol=1e-14)
    upstream = torch.randn_like(ours)
    (grad,) = torch.autograd.grad(ours, features, upstream)
    torch.testing.assert_close(grad, torch.autograd.grad(gathered, features, upstream)[0], rtol=1e-11, atol=1e-13)


@given(st.integers(2, 5), sides, sides)
def test_feature_affinity_with_full_border_covers_every_pair(radius: int, height: int, width: int) -> None:
    features = distinct(2, 3, height, width)
    pairs = feature_affinity(features, radius, border="full")
    dense = LocalAffinity.from_pairs(pairs, radius, (height, width), border="full").dense()
    flat = features.flatten(2)
    near = (
        torch.cdist(position := torch.cartesian_prod(torch.arange(height), torch.arange(width)).double(), position)
        < radius
    )
    expected = torch.where(near, torch.exp(-(flat[:, :, :, None] - flat[:, :, None]).abs().mean(1)), 0)
    torch.testing.assert_close(dense, expected.double(), rtol=1e-12, atol=0)


def test_feature_affinity_of_a_batch_is_that_of_its_images() -> None:
    features = torch.randn(2, 4, 6, 9)
    alone = torch.cat([feature_affinity(image[None], 5) for image in features])
    assert torch.equal(feature_affinity(features, 5), alone)


def test_feature_affinity_gradcheck() -> None:
    features = torch.randn(2, 3, 3, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda f: feature_affinity(f, 3, border="full"), features)
    assert gradcheck(lambda f: feature_affinity(f, 3, distance="sum"), features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_feature_affinity_in_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    features = torch.randn(1, 448, 5, 9).to(dtype)
    expected = feature_affinity(features.double(), 5, distance="sum").to(dtype)
    torch.testing.assert_close(
        feature_affinity(features, 5, distance="sum"), expected, rtol=torch.finfo(dtype).eps, atol=0
    )


def test_equal_features_have_affinity_1_and_zero_slope() -> None:
    features = torch.ones(1, 3, 2, 3, requires_grad=True)
    affinity = feature_affinity(features, 2)
    affinity.sum().backward()
    assert (affinity == 1).all()
    assert features.grad is not None
    assert not features.grad.any()


@pytest.mark.parametrize("norm", [None, "gn"])
def test_affinity_head_forward_agrees_with_its_local_affinity(norm: str | None) -> None:
    head = AffinityHead((3, 4, 5), widths=(4, 8, 8), norm=norm, groups=(1, 2, 4), border="full")
    maps = [torch.randn(2, channels, 4, 5) for channels in (3, 4, 5)]
    affinity = head.local_affinity(*maps)
    assert torch.equal(affinity.pairs(head.radius, border="full"), head(*maps))
    dense = affinity.dense()
    assert torch.equal(dense, dense.mT)
    assert (dense.diagonal(dim1=1, dim2=2) == 1).all()
    again = AffinityHead((3, 4, 5), widths=(4, 8, 8), norm=norm, groups=(1, 2, 4), border="full")
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(*maps), head(*maps))


def test_affinity_head_loads_a_released_checkpoint() -> None:
    head = AffinityHead((3, 4, 5), widths=(2, 4, 6), norm="gn", groups=(1, 2, 3))
    names = ["f9.weight", *(f"f8_{i}.weight" for i in (3, 4, 5))]
    names += [f"gn8_{i}.{leaf}" for i in (3, 4, 5) for leaf in ("weight", "bias")]
    ours = head.state_dict()
    released = {f"module.{name}": torch.randn_like(ours[AffinityHead.released_key(name)]) for name in names}
    head.load_released_state_dict({**released, "module.conv1a.weight": torch.zeros(1)})
    for name, value in released.items():
        assert torch.equal(head.state_dict()[AffinityHead.released_key(name.removeprefix("module."))], value)


def test_affinity_head_starts_as_published() -> None:
    head = AffinityHead((512, 512, 512))
    bound = 4 * math.sqrt(6 / (448 + 448))
    assert head.project.weight.abs().max() <= bound
    assert head.project.weight.abs().max() > 0.99 * bound
    assert head.reduce[2].weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.02)


# displacement


@pytest.mark.parametrize("border", ["released", "full"])
def test_pair_displacement_is_source_minus_destination(border: str) -> None:
    field = torch.randn(2, 2, 6, 9, dtype=torch.float64)
    delta, target = pair_displacement(field, 4, border=border)
    offsets = reference.path_order(4)
    assert target[0, :, :, 0].T.tolist() == [list(map(float, offset)) for offset in offsets]
    for p, (dy, dx) in enumerate(offsets):
        for i, (y, x) in enumerate(reference.sources((6, 9), 4, border)):
            inside = reference.in_map((6, 9), y + dy, x + dx)
            expected = field[:, :, y, x] - field[:, :, y + dy, x + dx] if inside else torch.zeros(2, 2).double()
            assert torch.equal(delta[:, :, p, i], expected)


# LocalAffinity


@given(st.integers(2, 4), sides, sides)
def test_local_affinity_acts_like_its_matrix(radius: int, height: int, width: int) -> None:
    affinity = local_affinity((height, width), radius, batch=2)
    dense = affinity.dense()
    assert torch.equal(dense, dense.mT)
    assert (dense.diagonal(dim1=1, dim2=2) == 1).all()
    torch.testing.assert_close(affinity.degree().flatten(1), dense.sum(2), rtol=1e-13, atol=0)
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    torch.testing.assert_close(affinity.matvec(x).flatten(2), x.flatten(2) @ dense)
    for beta in (0.5, 1, 2, 8):
        torch.testing.assert_close(affinity.power(beta).dense(), dense**beta)
    transition = affinity.transition(3)
    torch.testing.assert_close(transition.dense().sum(2), torch.ones(2, height * width, dtype=torch.float64))
    torch.testing.assert_close(transition.matvec(x).flatten(2), x.flatten(2) @ transition.dense().mT)
    for loaded in (
        LocalAffinity.from_dense(dense, (height, width)),
        LocalAffinity.from_dense(dense, (height, width), radius=radius),
    ):
        assert torch.equal(loaded.dense(), dense)


def test_power_0_joins_all_pairs_inside_the_map() -> None:
    affinity = local_affinity((3, 4), 2).power(0)
    position = torch.cartesian_prod(torch.arange(3), torch.arange(4)).double()
    assert torch.equal(affinity.dense()[0], (torch.cdist(position, position) < 2).double())


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 8.0])
def test_power_has_finite_slope_at_zero(beta: float) -> None:
    values = torch.tensor([0.0, 0.5, 0.0]).view(1, 1, 1, 3).requires_grad_()
    LocalAffinity(((0, 1),), values).power(beta).values.sum().backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()
    assert (values.grad[..., 1] > 0) == (beta > 0)


@pytest.mark.parametrize("order", ["raster", "path"])
@pytest.mark.parametrize("border", ["released", "full"])
def test_from_pairs_inverts_pairs(order: str, border: str) -> None:
    size, radius = (6, 9), 4
    offsets = reference.disc(radius) if order == "raster" else reference.path_order(radius)
    source = reference.sources(size, radius, border)
    pairs = torch.rand(2, len(offsets), len(source))
    affinity = LocalAffinity.from_pairs(pairs, radius, size, order=order, border=border)
    assert torch.equal(affinity.dense(), reference.matrix_from_pairs(pairs, offsets, source, size))
    if border == "released":
        assert torch.equal(affinity.pairs(radius), pairs)


def test_released_crop_leaves_pairs_out() -> None:
    size = (64, 64)
    source = 60 * 56
    released = LocalAffinity.from_pairs(torch.ones(1, 34, source), 5, size)
    full = LocalAffinity.from_pairs(torch.ones(1, 34, 64 * 64), 5, size, border="full")
    assert (int(released.values.sum()), int(full.values.sum())) == (114_240, 130_680)
    assert int((released.degree() == 1).sum()) == 10


def test_local_affinity_converts_and_moves() -> None:
    affinity = local_affinity((2, 3), 2)
    half = affinity.to(torch.float16)
    assert half.values.dtype == torch.float16
    assert half.offsets == affinity.offsets
    assert half.size == (2, 3)
    assert affinity.to("meta").values.device.type == "meta"


# operations


@opcheck_reads_grad
def test_path_maxima_operation_is_well_formed() -> None:
    edge = distinct(2, 6, 9).requires_grad_()
    for full in (False, True):
        torch.library.opcheck(maxima_module.path_maxima, (edge, 4, full))


@opcheck_reads_grad
def test_pair_l1_distance_operation_is_well_formed() -> None:
    features = torch.randn(2, 3, 6, 9, requires_grad=True)
    for full in (False, True):
        torch.library.opcheck(head_module.pair_l1_distance, (features, 4, full))


def test_affinities_compile_to_one_graph() -> None:
    def from_edge(edge: torch.Tensor) -> torch.Tensor:
        return EdgeToAffinity(3)(edge).transition(2).matvec(edge).sum() + edge_to_affinity(edge, 3).sum()

    def from_features(features: torch.Tensor) -> torch.Tensor:
        pairs = feature_affinity(features, 3)
        delta, target = pair_displacement(features, 3)
        labels = affinity_labels(features[:, 0].long(), 3, order="path")
        return pairs.sum() + torch.where(labels.neg[:, None], delta - target, 0).square().sum()

    for function, x in ((from_edge, distinct(1, 1, 4, 6)), (from_features, torch.randn(1, 2, 4, 6).double())):
        eager, compiled = (x.clone().requires_grad_() for _ in range(2))
        expected = function(eager)
        result = torch.compile(function, fullgraph=True, backend="aot_eager")(compiled)
        torch.testing.assert_close(result, expected)
        expected.backward()
        result.backward()
        torch.testing.assert_close(compiled.grad, eager.grad)


def test_inputs_are_left_unchanged() -> None:
    edge, features, field = distinct(1, 1, 6, 9), torch.randn(1, 4, 6, 9), torch.randn(1, 2, 6, 9)
    before = [x.clone() for x in (edge, features, field)]
    mask = torch.randint(0, 3, (1, 6, 9))
    affinity = EdgeToAffinity(5)(edge)
    affinity.transition(8).matvec(features.double())
    feature_affinity(features, 5)
    pair_displacement(field, 5)
    affinity_labels(mask, 5)
    assert all(torch.equal(x, y) for x, y in zip((edge, features, field), before, strict=True))
