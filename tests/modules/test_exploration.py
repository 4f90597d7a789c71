import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from tests.modules.reference_exploration import (
    broadcast_cosine,
    broadcast_iou,
    broadcast_prototypes,
    broadcast_seeds,
    explore_one_image,
    similarity,
)
from wsss_modules import (
    HierarchicalFeatureHead,
    ImageSpecificPrototypeExploration,
    explore_prototypes,
    image_specific_prototypes,
    normalize_cam,
    normalize_cam_with_background,
    prototype_cam,
    structure_aware_seeds,
    structure_iou,
)
from wsss_modules.prototypes import structure

HALF = [torch.float16, torch.bfloat16]
LABELS = torch.tensor([[1.0, 0, 1], [0, 1, 0]])


def case(seed: int = 0, size: tuple[int, int] = (4, 6), batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Class maps of three classes, features of five and of seven channels, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, c, *size, generator=generator, dtype=torch.float64) for c in (3, 5, 7))


def masked(class_maps: Tensor, labels: Tensor = LABELS) -> tuple[Tensor, Tensor]:
    """Scores with background as in training, and where classes may be."""
    valid = F.pad(labels.to(class_maps.dtype), (1, 0), value=1.0)[:, :, None, None]
    return normalize_cam_with_background(class_maps) * valid, valid


@pytest.mark.parametrize("seed", range(5))
def test_exploration_equals_the_definition_cell_by_cell(seed: int) -> None:
    class_maps, features, semantic = case(seed, (3, 4))
    found = explore_prototypes(class_maps, features, LABELS, semantic)
    for b in range(2):
        scores, seeds, is_cam = explore_one_image(class_maps[b], features[b], LABELS[b].double(), semantic[b])
        torch.testing.assert_close((found.scores[b], found.seeds[b], found.is_cam[b]), (scores, seeds, is_cam))


@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 7), st.sampled_from([0.0, 0.5, 1.0]))
def test_matrix_products_equal_the_broadcast_forms(seed: int, height: int, width: int, bg_weight: float) -> None:
    class_maps, features, semantic = case(seed, (height, width))
    scores, valid = masked(class_maps)
    affinity = similarity(semantic)
    torch.testing.assert_close(structure_iou(scores, affinity), broadcast_iou(scores, affinity))
    found = structure_aware_seeds(scores, valid, semantic, bg_weight=bg_weight)
    torch.testing.assert_close(tuple(found), broadcast_seeds(scores, valid, semantic, bg_weight))
    prototypes = image_specific_prototypes(found.seeds, features)
    torch.testing.assert_close(prototypes, broadcast_prototypes(found.seeds, features))
    torch.testing.assert_close(prototype_cam(prototypes, features), broadcast_cosine(prototypes, features))


@pytest.mark.parametrize("rows", [1, 5, 23, 24, 25])
def test_strips_of_any_height_give_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class_maps, _, semantic = case()
    scores, valid = masked(class_maps)
    whole = broadcast_seeds(scores, valid, semantic)
    monkeypatch.setattr(structure, "_ROWS", rows)
    torch.testing.assert_close(tuple(structure_aware_seeds(scores, valid, semantic)), whole)


def test_overlap_reads_rows_of_an_affinity_that_is_not_symmetric() -> None:
    class_maps, _, _ = case()
    scores, _ = masked(class_maps)
    affinity = torch.rand(2, 24, 24, dtype=torch.float64)
    torch.testing.assert_close(structure_iou(scores, affinity), broadcast_iou(scores, affinity))


def test_gradient_of_the_image_specific_cam_equals_that_of_the_broadcast_form() -> None:
    class_maps, features, semantic = case()
    scores, valid = masked(class_maps)
    seeds = structure_aware_seeds(scores, valid, semantic).seeds
    cotangent = torch.randn(2, 4, 4, 6, dtype=torch.float64)
    ours, released = features.clone().requires_grad_(), features.clone().requires_grad_()
    (prototype_cam(image_specific_prototypes(seeds, ours), ours) * cotangent).sum().backward()
    (broadcast_cosine(broadcast_prototypes(seeds, released), released) * cotangent).sum().backward()
    torch.testing.assert_close(ours.grad, released.grad)


def test_gradcheck_with_the_seeds_fixed() -> None:
    class_maps, features, semantic = case(size=(2, 3))
    scores, valid = masked(class_maps)
    seeds = structure_aware_seeds(scores, valid, semantic).seeds
    assert gradcheck(lambda x: prototype_cam(image_specific_prototypes(seeds, x), x), features.requires_grad_())
    assert gradcheck(
        lambda p, x: prototype_cam(p, x), (torch.randn(2, 4, 5, dtype=torch.float64).requires_grad_(), features)
    )
    assert gradcheck(normalize_cam_with_background, class_maps.requires_grad_())
    assert gradcheck(structure_iou, (scores.requires_grad_(), similarity(semantic).requires_grad_()))


@given(st.integers(0, 99))
def test_seeds_are_one_hot_or_zero_and_obey_the_mask(seed: int) -> None:
    class_maps, features, semantic = case(seed)
    found = explore_prototypes(class_maps, features, LABELS, semantic, inside=torch.rand(2, 1, 4, 6) > 0.3)
    assert set(found.seeds.unique().tolist()) <= {0.0, 1.0}
    assert (found.seeds.sum(1) <= 1).all()
    assert (found.seeds <= found.valid).all()
    assert not found.scores[found.valid == 0].any()
    torch.testing.assert_close(found.probs.sum(1), torch.ones(2, 4, 6, dtype=torch.float64))


@given(st.integers(0, 99), st.floats(0.01, 100))
def test_seeds_and_maps_do_not_depend_on_the_length_of_features(seed: int, factor: float) -> None:
    class_maps, features, semantic = case(seed)
    # 1e-5 is added to the lengths, so that what is compared are lengths of about 1 to 300
    base, scaled = (explore_prototypes(class_maps, features * by, LABELS, semantic * by * 100) for by in (1.0, factor))
    torch.testing.assert_close(scaled.probs, base.probs, rtol=0, atol=1e-5)
    torch.testing.assert_close(scaled.is_cam, base.is_cam, rtol=0, atol=1e-12)
    doubled = prototype_cam(base.prototypes * factor, features)
    torch.testing.assert_close(doubled, base.is_cam, rtol=0, atol=1e-12)


@given(st.integers(0, 99), st.permutations(range(3)), st.permutations(range(24)))
def test_order_of_classes_and_of_cells_changes_nothing_else(seed: int, classes: list[int], cells: list[int]) -> None:
    class_maps, features, semantic = case(seed)
    base = explore_prototypes(class_maps, features, LABELS, semantic)
    found = explore_prototypes(class_maps[:, classes], features, LABELS[:, classes], semantic)
    order = [0, *(k + 1 for k in classes)]
    torch.testing.assert_close(tuple(found), tuple(x[:, order] for x in base))

    def moved(x: Tensor) -> Tensor:
        return x.flatten(2)[:, :, cells].view_as(x)

    found = explore_prototypes(moved(class_maps), moved(features), LABELS, moved(semantic))
    torch.testing.assert_close(found.prototypes, base.prototypes)
    torch.testing.assert_close((found.seeds, found.is_cam), (moved(base.seeds), moved(base.is_cam)))


@given(st.integers(0, 99))
def test_background_of_no_weight_wins_only_where_no_class_overlaps(seed: int) -> None:
    class_maps, _, semantic = case(seed)
    scores, valid = masked(class_maps)
    seeds = structure_aware_seeds(scores, valid, semantic, bg_weight=0.0).seeds
    overlap = structure_iou(scores, similarity(semantic))
    assert not overlap[:, 1:].amax(1)[seeds[:, 0] > 0].any()
    assert (overlap[:, 1:].amax(1) > 0).any()


def test_maps_on_parts_of_orthogonal_regions_recover_the_regions() -> None:
    region = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2]])
    features = F.one_hot(region, 5).movedim(-1, 0)[None].double()
    class_maps = torch.zeros(1, 2, 3, 6, dtype=torch.float64)
    class_maps[0, 0, 0, 0] = class_maps[0, 1, 0, 5] = 3.0  # a single cell of regions 0 and 1
    class_maps[0, 0, 1, :2] = class_maps[0, 1, 1, 3:] = 1.0
    found = explore_prototypes(class_maps, features, torch.ones(1, 2))
    expected = torch.stack([region == 2, region == 0, region == 1]).double()
    assert torch.equal(found.seeds[0], expected)
    torch.testing.assert_close(found.is_cam[0], expected)


def test_background_is_what_no_class_claims() -> None:
    class_maps, _, _ = case()
    scores = normalize_cam_with_background(class_maps)
    torch.testing.assert_close(scores[:, 1:], normalize_cam(class_maps.relu()))
    torch.testing.assert_close(scores[:, 0], 1 - scores[:, 1:].amax(1))
    present = normalize_cam_with_background(class_maps, LABELS, bg_from="present")
    assert torch.equal(present[:, 1:], scores[:, 1:])
    torch.testing.assert_close(present[0, 0], 1 - scores[0, [1, 3]].amax(0))
    torch.testing.assert_close(present[1, 0], 1 - scores[1, 2])
    nothing = normalize_cam_with_background(class_maps, LABELS * 0, bg_from="present")
    assert (nothing[:, 0] == 1).all()
    assert (normalize_cam_with_background(class_maps[:, :0]) == 1).all()


def test_a_cell_that_an_absent_class_wins_is_no_seed_at_test_time() -> None:
    class_maps, features, _ = case()
    found = explore_prototypes(class_maps, features, LABELS, mask_scores=False)
    torch.testing.assert_close(found.scores, normalize_cam_with_background(class_maps))
    assert (found.seeds.sum(1) == 0).any()
    assert not found.seeds[LABELS.new_tensor([[0, 0, 1, 0], [0, 1, 0, 1]]).bool()].any()
    training = explore_prototypes(class_maps, features, LABELS)
    assert (training.seeds.sum(1) == 1).all()


def test_class_without_a_seed_has_no_map_and_no_gradient() -> None:
    features = torch.randn(1, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    seeds = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    seeds[:, 0] = 1
    is_cam = prototype_cam(image_specific_prototypes(seeds, features), features)
    assert not is_cam[:, 1].any()
    (grad,) = torch.autograd.grad(is_cam[:, 1].sum(), features)
    assert not grad.any()


def test_padding_has_no_seed_and_follows_the_nearest_cell() -> None:
    class_maps, features, semantic = case()
    inside = torch.ones(2, 1, 40, 60, dtype=torch.bool)
    inside[:, :, 20:] = False
    found = explore_prototypes(class_maps, features, LABELS, semantic, inside=inside)
    assert not found.valid[:, :, 2:].any()
    assert torch.equal(
        found.valid[:, :, :2], F.pad(LABELS, (1, 0), value=1.0).double()[:, :, None, None].expand(2, 4, 2, 6)
    )
    assert not found.seeds[:, :, 2:].any()
    assert (found.seeds[:, :, :2].sum(1) == 1).all()


def test_maps_of_other_grids_are_resized() -> None:
    class_maps, features, _ = case()
    semantic = torch.randn(2, 7, 2, 3, dtype=torch.float64)
    small = F.interpolate(class_maps, (2, 3), mode="bilinear")
    found = explore_prototypes(small, features, LABELS, semantic)
    assert found.is_cam.shape == (2, 4, 4, 6)
    expected = F.interpolate(normalize_cam_with_background(small), (4, 6), mode="bilinear", align_corners=True)
    torch.testing.assert_close(found.scores, expected * found.valid)
    wide = torch.zeros(2, 4, 2, 3, dtype=torch.float64)
    wide[:, 1, 0] = 1
    torch.testing.assert_close(image_specific_prototypes(wide, features)[:, 1], features[:, :, :2].sum((2, 3)) / 24)


def test_averages_share_their_direction() -> None:
    class_maps, features, semantic = case()
    seeds = structure_aware_seeds(*masked(class_maps), semantic).seeds
    by_map, by_seeds = (image_specific_prototypes(seeds, features, average=name) for name in ("map", "seeds"))
    counts = seeds.sum((2, 3))[:, :, None]
    torch.testing.assert_close(by_map * 24, by_seeds * counts)
    torch.testing.assert_close(prototype_cam(by_map, features), prototype_cam(by_seeds, features))


DEGENERATE = {
    "zero-feature": lambda m, x, y: (m, x * 0, y),
    "zero-feature-in-a-cell": lambda m, x, y: (m, x * (torch.arange(6) > 2), y),
    "zero-cam": lambda m, x, y: (m * 0, x, y),
    "negative-cam": lambda m, x, y: (-m.abs(), x, y),
    "zero-both": lambda m, x, y: (m * 0, x * 0, y),
    "no-label": lambda m, x, y: (m, x, y * 0),
    "one-cell": lambda m, x, y: (m[:, :, :1, :1], x[:, :, :1, :1], y),
    "one-image": lambda m, x, y: (m[:1], x[:1], y[:1]),
    "no-class": lambda m, x, y: (m[:, :0], x, y[:, :0]),
    "no-image": lambda m, x, y: (m[:0], x[:0], y[:0]),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("mask_scores", [True, False])
def test_degenerate_inputs_are_finite(name: str, mask_scores: bool) -> None:
    class_maps, features, labels = DEGENERATE[name](*case()[:2], LABELS)
    leaves = [x.detach().requires_grad_() for x in (class_maps, features)]
    for inside in (None, torch.zeros(len(features), 1, 5, 5)):
        found = explore_prototypes(*leaves, labels, inside=inside, mask_scores=mask_scores)
        assert all(x.isfinite().all() for x in found)
        assert ((found.is_cam >= 0) & (found.is_cam <= 1)).all()
        grads = torch.autograd.grad(found.scores.sum() + found.is_cam.sum(), leaves)
        assert all(grad.isfinite().all() for grad in grads)
        assert inside is None or not found.seeds.any()


def test_zero_feature_is_nobodys_seed_but_the_backgrounds() -> None:
    class_maps, features, _ = case()
    features[:, :, 1, 2] = 0
    scores, valid = masked(class_maps)
    released, _ = broadcast_seeds(scores, valid, features)
    assert not released[:, :, 1, 2].any(), "0 / 0 of an absent class wins, which may have no seed"
    found = structure_aware_seeds(scores, valid, features)
    assert found.seeds[:, :, 1, 2].tolist() == [[1.0, 0, 0, 0]] * 2
    assert found.probs.isfinite().all()


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    class_maps, features, semantic = (x.to(dtype) for x in case())
    found = explore_prototypes(class_maps, features, LABELS, semantic)
    exact = explore_prototypes(class_maps.float(), features.float(), LABELS, semantic.float())
    assert all(x.dtype == dtype for x in found)
    # the scores are rounded once before they are compared, so that probabilities carry that error; seeds did not flip
    torch.testing.assert_close(found.seeds, exact.seeds.to(dtype))
    torch.testing.assert_close(found.is_cam, exact.is_cam.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = explore_prototypes(class_maps.float(), features.float(), LABELS, semantic.float())
    torch.testing.assert_close(tuple(again), tuple(exact), rtol=0, atol=0)


def test_small_classes_keep_their_direction_in_float16() -> None:
    features = torch.full((1, 3, 64, 64), 1e-3, dtype=torch.float16)
    seeds = torch.zeros(1, 2, 64, 64, dtype=torch.float16)
    seeds[:, 1, 5, 5] = 1
    assert image_specific_prototypes(seeds, features, average="seeds")[0, 1].tolist() == features[0, :, 5, 5].tolist()
    found = explore_prototypes(torch.randn(1, 1, 64, 64).half(), features, torch.ones(1, 1))
    assert found.is_cam.max() > 0.99


def test_compiles_to_one_graph() -> None:
    class_maps, features, semantic = case()
    module = torch.compile(explore_prototypes, fullgraph=True, backend="aot_eager")
    leaf = class_maps.requires_grad_()
    found, expected = (
        f(leaf, features, LABELS, semantic, inside=LABELS[:, :1, None, None]) for f in (module, explore_prototypes)
    )
    torch.testing.assert_close(tuple(found), tuple(expected))


def levels(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (2, 4, 12, 10), (2, 6, 6, 5), (2, 8, 6, 5)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def test_hierarchy_normalises_before_it_resizes() -> None:
    torch.manual_seed(0)
    head = HierarchicalFeatureHead((4, 6, 8), (2, 3, 4)).double()
    maps = levels()
    joined = head(maps)
    assert joined.shape == (2, head.out_channels, 6, 5)
    projected = [side(x) for side, x in zip(head.sides, maps, strict=True)]
    unit = [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-5) for x in projected]
    torch.testing.assert_close(joined[:, 2:], torch.cat(unit[1:], 1))
    first = F.interpolate(unit[0], (6, 5), mode="bilinear", align_corners=False)
    torch.testing.assert_close(joined[:, :2], first)
    assert (joined[:, :2].norm(dim=1) < 0.999).any(), "not normalised again"


def test_only_the_projections_learn_from_the_hierarchy() -> None:
    torch.manual_seed(0)
    maps = [x.requires_grad_() for x in levels()]
    head = HierarchicalFeatureHead((4, 6, 8), (2, 3, 4)).double()
    grads = torch.autograd.grad(head(maps).square().sum() + sum(x.sum() * 0 for x in maps), [*maps, *head.parameters()])
    assert not any(grad.any() for grad in grads[:3])
    attached = HierarchicalFeatureHead((4, 6, 8), (2, 3, 4), detach=False).double()
    weight = torch.randn(2, 9, 6, 5, dtype=torch.float64)
    assert all(grad.any() for grad in torch.autograd.grad((attached(maps) * weight).sum(), maps))


def test_zero_maps_give_zero_features_and_finite_gradients() -> None:
    head = HierarchicalFeatureHead((4, 6), (2, 3))
    joined = head([torch.zeros(1, 4, 3, 3), torch.zeros(1, 6, 3, 3)])
    assert not joined.any()
    joined.sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_module_is_the_function_over_its_hierarchy() -> None:
    torch.manual_seed(0)
    maps, class_maps = levels(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    inside = torch.rand(2, 1, 12, 10) > 0.2
    for name in ("semantic", "hierarchical"):
        module = ImageSpecificPrototypeExploration((4, 6, 8), (2, 3, 4), seed_feature=name, bg_weight=0.7).double()
        joined = module.hierarchy(maps)
        by = maps[-1] if name == "semantic" else joined
        expected = explore_prototypes(class_maps, joined, LABELS, by, inside=inside, bg_weight=0.7)
        torch.testing.assert_close(tuple(module(class_maps, maps, LABELS, inside)), tuple(expected), rtol=0, atol=0)
        read = explore_prototypes(class_maps, joined, LABELS, mask_scores=False, bg_weight=0.7)
        torch.testing.assert_close(tuple(module.read(class_maps, joined, LABELS)), tuple(read), rtol=0, atol=0)
    assert module.state_dict().keys() == {f"hierarchy.sides.{i}.weight" for i in range(3)}


def test_published_widths_are_the_defaults() -> None:
    shapes = [side.weight.shape[:2] for side in HierarchicalFeatureHead().sides]
    assert shapes == [(128, 256), (128, 512), (256, 1024), (256, 2048)]


MAPS, FEATURES, _ = case()
SCORES, VALID = masked(MAPS)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: normalize_cam_with_background(MAPS[0]), ValueError, r"class_maps: expected shape \(B, K, H, W\)"),
        (lambda: normalize_cam_with_background(MAPS.long()), TypeError, r"class_maps: expected a floating-point"),
        (lambda: normalize_cam_with_background(MAPS, bg_from="some"), ValueError, r'bg_from: expected "all" or "pres'),
        (lambda: normalize_cam_with_background(MAPS, bg_from="present"), ValueError, r"labels: expected \(B, K\) for"),
        (
            lambda: normalize_cam_with_background(MAPS, LABELS[:, :2], bg_from="present"),
            ValueError,
            r"labels: expected shape \(2, 3\) to match class_maps, got \(2, 2\)",
        ),
        (lambda: structure_iou(SCORES, torch.rand(2, 5, 5)), ValueError, r"affinity: expected shape \(2, 24, 24\) to"),
        (lambda: structure_iou(SCORES, torch.ones(2, 24, 24).long()), TypeError, r"affinity: expected a floating"),
        (lambda: structure_iou(SCORES[0], FEATURES), ValueError, r"scores: expected shape \(B, C, H, W\), got"),
        (
            lambda: structure_aware_seeds(SCORES, VALID, FEATURES[:, :, :2]),
            ValueError,
            r"features: expected shape \(2, \*, 4, 6\) to match scores, got \(2, 5, 2, 6\)",
        ),
        (
            lambda: structure_aware_seeds(SCORES, VALID[:, :2], FEATURES),
            ValueError,
            r"valid: expected shape \(2, 4, 4, 6\) to match scores, or \(2, 4, 1, 1\), got \(2, 2, 1, 1\)",
        ),
        (lambda: structure_aware_seeds(SCORES[:, :0], VALID, FEATURES), ValueError, r"scores: expected the background"),
        (lambda: structure_aware_seeds(SCORES, VALID, FEATURES, bg_weight=-1), ValueError, r"bg_weight: expected at l"),
        (lambda: structure_aware_seeds(SCORES, VALID, FEATURES.long()), TypeError, r"features: expected a floating"),
        (
            lambda: image_specific_prototypes(SCORES[:1], FEATURES),
            ValueError,
            r"seeds: expected shape \(2, \*, \*, \*\)",
        ),
        (lambda: image_specific_prototypes(SCORES.long(), FEATURES), TypeError, r"seeds: expected a floating-point"),
        (
            lambda: image_specific_prototypes(SCORES, FEATURES, average="sum"),
            ValueError,
            r'average: expected "map" or "seeds", got \'sum\'',
        ),
        (
            lambda: prototype_cam(torch.rand(2, 4, 6), FEATURES),
            ValueError,
            r"prototypes: expected shape \(2, \*, 5\) to match features, got \(2, 4, 6\)",
        ),
        (lambda: prototype_cam(torch.ones(2, 4, 5).long(), FEATURES), TypeError, r"prototypes: expected a floating"),
        (
            lambda: explore_prototypes(MAPS, FEATURES, LABELS[:1]),
            ValueError,
            r"labels: expected shape \(2, 3\) to match class_maps, got \(1, 3\)",
        ),
        (lambda: explore_prototypes(MAPS[:1], FEATURES, LABELS), ValueError, r"class_maps: expected shape \(2, \*, \*"),
        (
            lambda: explore_prototypes(MAPS, FEATURES, LABELS, inside=torch.ones(2, 4, 6)),
            ValueError,
            r"inside: expected shape \(2, 1, \*, \*\) to match features, got \(2, 4, 6\)",
        ),
        (lambda: HierarchicalFeatureHead((4, 6), (2,)), ValueError, r"out_channels: expected 2, one a stage, got 1"),
        (lambda: HierarchicalFeatureHead((4,), (2,)), ValueError, r"grid: expected the index of one of the 1 stages"),
        (lambda: HierarchicalFeatureHead((4, 6), (2, 2))(levels()), ValueError, r"levels: expected 2 maps, got 3"),
        (
            lambda: HierarchicalFeatureHead((4, 6, 9), (2, 2, 2))(levels()),
            ValueError,
            r"levels\[2\]: expected shape \(\*, 9, \*, \*\) for this head, got \(2, 8, 6, 5\)",
        ),
        (
            lambda: ImageSpecificPrototypeExploration(seed_feature="both"),
            ValueError,
            r'seed_feature: expected "semantic" or "hierarchical", got \'both\'',
        ),
        (lambda: ImageSpecificPrototypeExploration(bg_weight=-0.5), ValueError, r"bg_weight: expected at least 0, got"),
        (lambda: ImageSpecificPrototypeExploration(bg_from="none"), ValueError, r'bg_from: expected "all" or'),
    ],
)
def test_messages_name_argument_expected_and_given(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
