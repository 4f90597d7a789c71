import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.modules import reference_affinity as reference
from wsss_losses import _irn_pairs as pairs_module
from wsss_losses import (
    affinity_loss,
    boundary_affinity_loss,
    displacement_loss,
    inter_pixel_relation_loss,
)
from wsss_modules import affinity_labels, edge_to_affinity, pair_displacement
from wsss_modules.affinity import path_maxima as maxima_module

opcheck_reads_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def random_maps(batch: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, 1, height, width, generator=generator, dtype=torch.float64)
    displacement = torch.randn(batch, 2, height, width, generator=generator, dtype=torch.float64)
    mask = torch.randint(0, 5, (batch, height, width), generator=generator)
    return logits.requires_grad_(), displacement.requires_grad_(), torch.where(mask == 4, 255, mask)


def grid(height: int, width: int) -> Tensor:
    """Position (y, x) of each pixel: (1, 2, H, W)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns])[None].double()


@pytest.mark.parametrize(("radius", "size"), [(2, (2, 3)), (3, (6, 5)), (5, (7, 12)), (10, (13, 22))])
def test_fused_loss_equals_the_gathered_form(radius: int, size: tuple[int, int]) -> None:
    logits, displacement, mask = random_maps(3, *size)
    fused = inter_pixel_relation_loss(logits, displacement, mask, radius=radius).total
    gathered = reference.gathered_irn_loss(logits, displacement, mask, radius)
    torch.testing.assert_close(fused, gathered, rtol=1e-10, atol=0)
    ours = torch.autograd.grad(fused, (logits, displacement))
    for grad, expected in zip(ours, torch.autograd.grad(gathered, (logits, displacement)), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-13)


@given(st.integers(2, 5), st.integers(1, 7), st.integers(1, 7), st.sampled_from([None, 2, 3]), st.integers(0, 99))
def test_fused_losses_equal_the_pieces_over_full_coverage(
    radius: int, height: int, width: int, num_classes: int | None, seed: int
) -> None:
    logits, displacement, mask = random_maps(2, height, width, seed)
    options = {"radius": radius, "border": "full", "num_classes": num_classes}
    labels = affinity_labels(mask, radius, order="path", border="full", num_classes=num_classes)
    boundary = boundary_affinity_loss(logits, mask, **options)
    expected = affinity_loss(edge_to_affinity(torch.sigmoid(logits), radius, border="full"), labels)
    torch.testing.assert_close(boundary, expected, rtol=1e-9, atol=1e-12)
    delta, target = pair_displacement(displacement, radius, border="full")
    vectors = displacement_loss(displacement, mask, **options)
    bg, fg = labels.bg_pos[:, None].double(), labels.fg_pos[:, None].double()
    torch.testing.assert_close(vectors.bg, (bg * delta.abs()).sum() / (2 * bg.sum() + 1e-5))
    torch.testing.assert_close(vectors.fg, (fg * (delta - target).abs()).sum() / (2 * fg.sum() + 1e-5))
    terms = inter_pixel_relation_loss(logits, displacement, mask, **options)
    torch.testing.assert_close(terms.positive, (boundary.bg + boundary.fg) / 2)
    torch.testing.assert_close(terms.total, boundary.total + vectors.total)
    torch.testing.assert_close(terms[2:], (boundary.neg, vectors.fg, vectors.bg))
    torch.testing.assert_close(terms.total, (terms.positive + terms.negative) / 2 + vectors.total)


def test_groups_of_images_equal_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, displacement, mask = random_maps(5, 6, 9)
    whole = inter_pixel_relation_loss(logits, displacement, mask, radius=5)
    (grad,) = torch.autograd.grad(whole.total, logits)
    monkeypatch.setattr(maxima_module, "CHUNK_BYTES", 34 * 6 * 9 * 8 * 2)
    parts = inter_pixel_relation_loss(logits, displacement, mask, radius=5)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.total, logits)[0], grad)


@given(st.floats(-9, 9), st.floats(-9, 9), st.integers(0, 99))
def test_adding_a_constant_to_the_displacement_changes_nothing(dy: float, dx: float, seed: int) -> None:
    _, displacement, mask = random_maps(2, 6, 9, seed)
    shifted = displacement + torch.tensor([dy, dx], dtype=torch.float64).view(2, 1, 1)
    torch.testing.assert_close(
        displacement_loss(shifted, mask, radius=5), displacement_loss(displacement, mask, radius=5)
    )


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_pointing_to_one_centre_costs_nothing_in_the_foreground(y: float, x: float) -> None:
    to_centre = torch.tensor([y, x], dtype=torch.float64).view(2, 1, 1) - grid(7, 12)
    mask = torch.ones(1, 7, 12, dtype=torch.int64)
    terms = displacement_loss(to_centre, mask, radius=5)
    assert terms.fg < 1e-13
    assert terms.bg == 0
    assert displacement_loss(to_centre, mask * 0, radius=5).bg > 0.5


def test_a_constant_displacement_costs_nothing_in_the_background() -> None:
    constant = torch.full((1, 2, 7, 12), 3.5)
    assert displacement_loss(constant, torch.zeros(1, 7, 12, dtype=torch.int64), radius=5).total == 0
    assert displacement_loss(constant, torch.ones(1, 7, 12, dtype=torch.int64), radius=5).fg > 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("magnitude", [12.0, 30.0, 60.0])
def test_saturated_logits_keep_a_live_gradient(magnitude: float, dtype: torch.dtype) -> None:
    logits = torch.full((1, 1, 1, 4), magnitude, dtype=dtype)
    same = torch.zeros(1, 1, 4, dtype=torch.int64)
    different = torch.arange(4).view(1, 1, 4)
    for sign, mask in ((1, same), (-1, different)):  # a boundary within a class; none between classes
        leaf = (sign * logits).requires_grad_()
        loss = boundary_affinity_loss(leaf, mask, radius=2, border="full").total
        (grad,) = torch.autograd.grad(loss * 1e4 if dtype != torch.float32 else loss, leaf)
        assert loss > 1
        assert grad.isfinite().all()
        if dtype != torch.float16 or magnitude < 30:  # else below the smallest float16
            assert (grad * sign).sum() > 0


def test_num_classes_21_is_the_released_rule() -> None:
    logits, displacement, mask = random_maps(2, 6, 9)
    coco = torch.where(mask == 3, 60, mask)
    options = {"radius": 4}
    ours = inter_pixel_relation_loss(logits, displacement, coco, **options)
    torch.testing.assert_close(ours, inter_pixel_relation_loss(logits, displacement, mask, **options))
    released = inter_pixel_relation_loss(logits, displacement, coco, num_classes=21, **options)
    ignored = inter_pixel_relation_loss(logits, displacement, torch.where(mask == 3, 255, mask), **options)
    torch.testing.assert_close(released, ignored)
    assert not torch.isclose(released.total, ours.total)
    other = inter_pixel_relation_loss(
        logits, displacement, torch.where(mask == 255, 9, mask), ignore_index=9, **options
    )
    torch.testing.assert_close(other, ours)


@pytest.mark.parametrize("magnitude", [1.0, 8.0, 25.0])
def test_fused_float32_loss_equals_the_loss_of_pairs_up_to_saturation(magnitude: float) -> None:
    logits, _, mask = random_maps(2, 6, 9)
    leaf = (logits.detach() * magnitude).float().requires_grad_()
    fused = boundary_affinity_loss(leaf, mask, radius=4)
    pairs = affinity_loss(edge_to_affinity(torch.sigmoid(leaf), 4), affinity_labels(mask, 4, order="path"))
    torch.testing.assert_close(fused, pairs, rtol=2e-6, atol=1e-8)
    never = torch.full_like(leaf, -30.0)
    fused = boundary_affinity_loss(never, mask, radius=4).neg
    torch.testing.assert_close(fused, -torch.tensor(1 + 1e-5).sub(1).log(), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_loss_compiles_with_the_default_compiler() -> None:
    logits, displacement, mask = random_maps(2, 5, 7)
    options = {"radius": 4}
    compiled = torch.compile(inter_pixel_relation_loss, fullgraph=True)
    result = compiled(logits, displacement, mask, **options)
    expected = inter_pixel_relation_loss(logits, displacement, mask, **options)
    torch.testing.assert_close(result, expected)
    leaves = (logits, displacement)
    torch.testing.assert_close(torch.autograd.grad(result.total, leaves), torch.autograd.grad(expected.total, leaves))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_masks_of_any_integer_type(dtype: torch.dtype) -> None:
    logits, displacement, mask = random_maps(1, 6, 9)
    expected = inter_pixel_relation_loss(logits, displacement, mask, radius=4)
    torch.testing.assert_close(inter_pixel_relation_loss(logits, displacement, mask.to(dtype), radius=4), expected)


def test_an_ideal_boundary_costs_nothing_and_its_opposite_much() -> None:
    mask = torch.zeros(1, 8, 16, dtype=torch.int64)
    mask[..., 7:9] = 255
    mask[..., 9:] = 2
    logits = torch.where(mask == 255, 20.0, -20.0)[:, None]
    assert boundary_affinity_loss(logits, mask, radius=5).total < 1e-4
    assert boundary_affinity_loss(-logits, mask, radius=5).total > 5


def test_maps_of_mixed_precision_give_the_wider_one() -> None:
    logits, displacement, mask = random_maps(1, 6, 9)
    terms = inter_pixel_relation_loss(logits.half(), displacement.float(), mask, radius=4)
    assert {term.dtype for term in terms} == {torch.float32}


@opcheck_reads_grad
@pytest.mark.parametrize("full", [False, True])
def test_operations_are_well_formed(full: bool) -> None:
    logits, displacement, mask = random_maps(2, 4, 6)
    known = pairs_module.hide_ignored(mask, 255, None)
    edge = logits[:, 0].detach().requires_grad_()
    torch.library.opcheck(pairs_module.pair_counts, (known, 3, full))
    torch.library.opcheck(pairs_module.boundary_costs, (edge, known, 3, full, 1e-5))
    torch.library.opcheck(pairs_module.displacement_costs, (displacement, known, 3, full))


def test_messages_name_argument_expected_and_given() -> None:
    logits, displacement, mask = random_maps(2, 4, 6)
    with pytest.raises(
        ValueError, match=r"edge_logits: expected shape \(\*, 1, \*, \*\) \(B, 1, H, W\), got \(2, 2, 4, 6\)"
    ):
        boundary_affinity_loss(displacement, mask)
    with pytest.raises(ValueError, match=r"displacement: expected shape \(\*, 2, \*, \*\)"):
        displacement_loss(logits, mask)
    with pytest.raises(
        ValueError, match=r"mask: expected shape \(2, 4, 6\) \(B, H, W\) to match edge_logits, got \(1, 4, 6\)"
    ):
        boundary_affinity_loss(logits, mask[:1])
    with pytest.raises(TypeError, match=r"mask: expected an integer tensor, got torch.float64; did you pass scores\?"):
        inter_pixel_relation_loss(logits, displacement, mask.double())
    with pytest.raises(TypeError, match=r"displacement: expected a floating-point tensor, got torch.int64"):
        displacement_loss(displacement.long(), mask)
    with pytest.raises(ValueError, match=r"border: expected 'released' or 'full', got 'reflect'"):
        displacement_loss(displacement, mask, border="reflect")
    with pytest.raises(ValueError, match=r"radius: expected an integer of at least 2, got 1"):
        boundary_affinity_loss(logits, mask, radius=1)
