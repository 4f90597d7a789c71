import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from tests.modules.reference_pixel_adaptive import par
from wsss_modules import (
    PixelAdaptiveRefinement,
    denormalize_images,
    pixel_adaptive_kernel,
    pixel_adaptive_refinement,
)

seeds = st.integers(0, 1000)
RINGS = (1, 2, 4)


def case(seed: int = 0, channels: int = 3, size: tuple[int, int] = (9, 12)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(2, 3, *size, generator=generator, dtype=torch.float64)
    return image, torch.rand(2, channels, 5, 6, generator=generator, dtype=torch.float64)


@given(seeds, st.sampled_from([(1,), (1, 3), (1, 2, 24)]), st.integers(0, 4))
def test_refinement_is_the_average_over_all_neighbours(seed: int, dilations: tuple[int, ...], steps: int) -> None:
    image, masks = case(seed)
    ours = pixel_adaptive_refinement(image, masks, dilations=dilations, num_iter=steps)
    torch.testing.assert_close(ours, par(image, masks, dilations, steps))


@given(seeds)
def test_constant_maps_grow_by_the_sum_of_the_weights(seed: int) -> None:
    image, _ = case(seed)
    constant = torch.full((2, 1, 9, 12), 0.7, dtype=torch.float64)
    for normalize, growth in ((False, 1.01**5), (True, 1.0)):
        out = pixel_adaptive_refinement(image, constant, dilations=RINGS, num_iter=5, normalize=normalize)
        torch.testing.assert_close(out, constant * growth)


@given(seeds)
def test_refinement_is_linear_and_treats_maps_alike(seed: int) -> None:
    image, masks = case(seed)
    kernel = pixel_adaptive_kernel(image, RINGS)
    refined = kernel.refine(masks, 3)
    torch.testing.assert_close(kernel.refine(2 * masks - masks.flip(1), 3), 2 * refined - refined.flip(1))
    assert bool((refined >= masks.amin() - 1e-12).all())
    assert bool((refined <= masks.amax() * 1.01**3 + 1e-12).all())


@given(seeds)
def test_mirror_images_give_mirrored_maps(seed: int) -> None:
    image, masks = case(seed)
    options = {"dilations": RINGS, "num_iter": 3}
    mirrored = pixel_adaptive_refinement(image.flip(3), masks.flip(3), **options)
    torch.testing.assert_close(mirrored.flip(3), pixel_adaptive_refinement(image, masks, **options))


@given(seeds, st.floats(0.1, 10), st.floats(-5, 5))
def test_gain_and_offset_of_the_image_do_not_matter(seed: int, gain: float, offset: float) -> None:
    image, masks = case(seed)
    options = {"dilations": RINGS, "num_iter": 3}
    expected = pixel_adaptive_refinement(image, masks, **options)
    # the eps of 1e-8 beside deviations of about 0.03: 3e-7 of the exponent, which is of order 100
    torch.testing.assert_close(
        pixel_adaptive_refinement(gain * image + offset, masks, **options), expected, rtol=1e-4, atol=1e-6
    )


def test_no_iteration_only_resizes() -> None:
    image, masks = case()
    resized = torch.nn.functional.interpolate(masks, (9, 12), mode="bilinear", align_corners=True)
    assert torch.equal(pixel_adaptive_refinement(image, masks, num_iter=0), resized)


def test_a_plain_image_gives_equal_weights_and_no_gradient() -> None:
    image = torch.full((1, 3, 5, 6), 0.4, dtype=torch.float64, requires_grad=True)
    kernel = pixel_adaptive_kernel(image, (1, 2), w2=0, image_gradient=True)
    torch.testing.assert_close(kernel.weights, torch.full_like(kernel.weights, 1 / 16))
    kernel.refine(torch.rand(1, 2, 5, 6, dtype=torch.float64), 2).square().sum().backward()
    assert not image.grad.any()


def test_images_are_constants_unless_asked() -> None:
    image, masks = case()
    image.requires_grad_()
    assert not pixel_adaptive_refinement(image, masks, dilations=RINGS, num_iter=2).requires_grad
    assert pixel_adaptive_refinement(image, masks, dilations=RINGS, num_iter=2, image_gradient=True).requires_grad


def test_gradients() -> None:
    image, masks = case(channels=1, size=(4, 5))
    leaves = (image[:1].requires_grad_(), masks[:1].requires_grad_())
    options = {"dilations": (1, 2), "num_iter": 2}
    assert gradcheck(lambda m: pixel_adaptive_refinement(image[:1].detach(), m, **options), leaves[1])
    assert gradcheck(lambda x, m: pixel_adaptive_refinement(x, m, image_gradient=True, **options), leaves)


def test_with_and_without_a_graph_the_same_comes_out() -> None:
    image, masks = case()
    with torch.no_grad():
        plain = pixel_adaptive_refinement(image, masks, dilations=RINGS)
    torch.testing.assert_close(pixel_adaptive_refinement(image, masks.requires_grad_(), dilations=RINGS), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    image, masks = (x.to(dtype) for x in case())
    exact = pixel_adaptive_refinement(image.double(), masks.double(), dilations=RINGS)
    out = pixel_adaptive_refinement(image, masks, dilations=RINGS)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_a_1_x_1_image_and_no_map_at_all() -> None:
    out = pixel_adaptive_refinement(torch.rand(1, 3, 1, 1), torch.ones(1, 2, 3, 3), num_iter=2)
    torch.testing.assert_close(out, torch.full((1, 2, 1, 1), 1.01**2))
    assert pixel_adaptive_refinement(torch.rand(1, 3, 4, 5), torch.ones(1, 0, 3, 3)).shape == (1, 0, 4, 5)


def test_refinement_compiles_to_one_graph() -> None:
    image, masks = case()
    refine = PixelAdaptiveRefinement((1, 2), 2)
    compiled = torch.compile(refine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image, masks), refine(image, masks))
    assert "dilations=(1, 2), num_iter=2" in repr(refine)


def test_images_come_back_from_their_normalisation() -> None:
    levels = torch.arange(256.0).view(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (levels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(denormalize_images(normal), levels, rtol=0, atol=1e-7)
    lost = (levels - denormalize_images(normal, legacy=True)) * 255
    assert set(lost.round().unique().tolist()) == {0.0, 1.0}  # truncation takes a level from some
    assert float(denormalize_images(torch.full((1, 3, 1, 1), 99.0)).max()) == 1.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PixelAdaptiveRefinement(()), ValueError, "dilations: expected at least one number of pixels"),
        (lambda: PixelAdaptiveRefinement((0,)), ValueError, "dilations: expected"),
        (lambda: PixelAdaptiveRefinement(num_iter=-1), ValueError, "num_iter, w1: expected"),
        (lambda: pixel_adaptive_kernel(torch.rand(1, 3, 2, 2), w1=0), ValueError, "w1: expected a number above 0"),
        (lambda: pixel_adaptive_kernel(torch.rand(3, 2, 2)), ValueError, r"image: expected shape \(B, 3, H, W\)"),
        (
            lambda: pixel_adaptive_kernel(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)),
            TypeError,
            "image: expected a floating-point tensor, got torch.uint8",
        ),
        (
            lambda: pixel_adaptive_refinement(torch.rand(2, 3, 4, 4), torch.rand(1, 2, 4, 4)),
            ValueError,
            r"masks: expected shape \(2, \*, \*, \*\) \(B, C, h, w\) to match image",
        ),
        (
            lambda: pixel_adaptive_kernel(torch.rand(1, 3, 2, 2), (1,)).refine(torch.rand(1, 1, 2, 2), -1),
            ValueError,
            "num_iter: expected at least 0, got -1",
        ),
        (lambda: denormalize_images(torch.rand(1, 4, 2, 2)), ValueError, "mean: expected one number for each of 4"),
    ],
)
def test_messages(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
