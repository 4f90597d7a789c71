from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from tests.modules import reference_refinement
from wsss_modules import PixelCorrelationModule, SEAMHead, keep_strongest, one_hot_scores, pixel_correlation


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@given(st.integers(0, 99), st.sampled_from([1, 3, 7, 12, 50]))
def test_correlation_and_gradients_are_those_of_the_dense_matrix(seed: int, chunk: int) -> None:
    maps, keys = random(2, 3, 3, 4, seed=seed).requires_grad_(), random(2, 5, 3, 4, seed=seed + 100).requires_grad_()
    ours, dense = pixel_correlation(maps, keys, chunk=chunk), reference_refinement.pixel_correlation(maps, keys)
    torch.testing.assert_close(ours, dense)
    direction = random(2, 3, 3, 4, seed=seed + 200)
    pairs = (torch.autograd.grad((y * direction).sum(), (maps, keys)) for y in (ours, dense))
    torch.testing.assert_close(*pairs)


def test_correlation_gradcheck() -> None:
    leaves = random(2, 2, 2, 3).requires_grad_(), random(2, 4, 2, 3, seed=1).requires_grad_()
    assert gradcheck(lambda x, k: pixel_correlation(x, k, chunk=4), leaves)
    assert gradcheck(lambda k: pixel_correlation(leaves[0].detach(), k, chunk=4), leaves[1:])


@given(st.integers(0, 99))
def test_weights_sum_to_less_than_one_and_constants_stay(seed: int) -> None:
    keys = random(2, 4, 3, 5, seed=seed)
    refined = pixel_correlation(torch.full((2, 1, 3, 5), 3.0, dtype=torch.float64), keys)
    assert bool((refined < 3).all())
    torch.testing.assert_close(refined, torch.full_like(refined, 3.0), rtol=2e-5, atol=0)  # own weight 1 is the least


@given(st.permutations(range(12)))
def test_order_of_the_pixels_is_of_no_account(order: list[int]) -> None:
    maps, keys = random(1, 2, 1, 12), random(1, 4, 1, 12, seed=1)
    torch.testing.assert_close(
        pixel_correlation(maps[..., order], keys[..., order], chunk=5), pixel_correlation(maps, keys)[..., order]
    )


@pytest.mark.parametrize("which", ["one", "all"])
def test_keys_of_zeros_give_zeros_and_finite_gradients(which: str) -> None:
    maps, keys = random(1, 2, 2, 3).requires_grad_(), random(1, 4, 2, 3, seed=1)
    keys[..., : 1 if which == "one" else 2, :] = 0
    keys.requires_grad_()
    refined = pixel_correlation(maps, keys)
    assert not refined[:, :, 0].any()
    grads = torch.autograd.grad(refined.sum(), (maps, keys))
    assert all(grad.isfinite().all() for grad in grads)


def test_neither_pass_holds_the_matrix() -> None:
    pixels, chunk = 400, 16
    maps, keys = torch.randn(1, 3, 20, 20, requires_grad=True), torch.randn(1, 8, 20, 20, requires_grad=True)
    with LargestTensor() as largest:
        pixel_correlation(maps, keys, chunk=chunk).sum().backward()
    assert chunk * pixels <= largest.elements <= 1.05 * chunk * pixels
    with LargestTensor() as dense:
        reference_refinement.pixel_correlation(maps, keys)
    assert dense.elements == pixels**2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_rounded_float64_result(dtype: torch.dtype) -> None:
    maps, keys = random(1, 2, 8, 9).abs().to(dtype), random(1, 16, 8, 9, seed=1).to(dtype)
    refined = pixel_correlation(maps, keys)
    assert refined.dtype == dtype
    exact = pixel_correlation(maps.double(), keys.double())
    torch.testing.assert_close(refined.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pixel_correlation(maps.float(), keys.float()), pixel_correlation(maps.float(), keys.float()))


@pytest.mark.parametrize("chunk", [4, 100])
def test_correlation_compiles_to_one_graph(chunk: int) -> None:
    def step(x: Tensor, k: Tensor) -> Tensor:
        return pixel_correlation(x, k, chunk=chunk)

    leaves = random(1, 2, 3, 4).requires_grad_(), random(1, 5, 3, 4, seed=1).requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, step(*leaves))
    pairs = (torch.autograd.grad(y.square().sum(), leaves) for y in (compiled, step(*leaves)))
    torch.testing.assert_close(*pairs)


def test_strongest_stays_with_its_equals() -> None:
    maps = torch.tensor([[[[1.0, -2.0, 0.0]], [[1.0, -1.0, 0.0]], [[0.5, -3.0, 0.0]]]])
    expected = torch.tensor([[[[1.0, 0.0, 0.0]], [[1.0, -1.0, 0.0]], [[0.0, 0.0, 0.0]]]])
    assert torch.equal(keep_strongest(maps), expected)
    assert keep_strongest(maps[:, :0]).shape == (1, 0, 1, 3)


@given(st.integers(0, 99), st.floats(0.1, 100))
def test_one_hot_scores_have_one_class_and_its_complement(seed: int, scale: float) -> None:
    cam = random(2, 4, 3, 5, seed=seed)
    scores = one_hot_scores(cam)
    classes = scores[:, 1:]
    assert bool(((classes > 0).sum(1) <= 1).all())
    torch.testing.assert_close(scores.sum(1), torch.ones(2, 3, 5, dtype=torch.float64))
    assert bool((scores >= 0).all())
    torch.testing.assert_close(one_hot_scores(scale * cam), scores, rtol=0, atol=2e-3)  # eps beside the maxima
    normal = cam.relu() / cam.relu().amax((2, 3), keepdim=True)
    won = normal.gather(1, classes.argmax(1, keepdim=True))[:, 0]
    some = normal.amax(1) > 1e-4
    torch.testing.assert_close(won[some], normal.amax(1)[some], rtol=0, atol=1e-4)  # eps beside the maxima


def test_one_hot_scores_of_nothing_are_background() -> None:
    cam = torch.zeros(1, 3, 2, 2)
    assert torch.equal(one_hot_scores(cam), one_hot_scores(-1 - cam))
    assert torch.equal(one_hot_scores(cam)[:, 0], torch.ones(1, 2, 2))
    assert torch.equal(one_hot_scores(cam[:, :0]), torch.ones(1, 1, 2, 2))
    assert one_hot_scores(cam, eps=0.0).isfinite().all()
    assert not one_hot_scores(cam.requires_grad_()).requires_grad


def head_and_inputs(**options) -> tuple[SEAMHead, list[Tensor]]:
    torch.manual_seed(0)
    head = SEAMHead(8, 3, side_channels=(4, 6), side_widths=(5, 7), embed=9, proj_dim=10, **options)
    inputs = [torch.randn(2, 8, 4, 5), torch.randn(2, 4, 8, 10), torch.randn(2, 6, 4, 5), torch.rand(2, 3, 33, 41)]
    return head, [x.requires_grad_() for x in inputs]


def test_refined_maps_teach_the_keys_and_nothing_else() -> None:
    head, inputs = head_and_inputs(dropout=0.0)
    out = head(*inputs)
    assert out.refined.shape == out.scores.shape == (2, 4, 4, 5)
    assert bool((out.refined >= 0).all())
    assert bool((out.refined <= 1).all())
    out.refined.square().sum().backward()
    taught = {name for name, value in head.named_parameters() if value.grad is not None}
    assert taught == {"low.weight", "high.weight", "correlation.embed.weight"}
    assert all(value.grad.any() for value in head.parameters() if value.grad is not None)
    assert all(x.grad is None for x in inputs[:3])


def test_scores_and_projection_teach_the_features() -> None:
    head, inputs = head_and_inputs(dropout=0.0)
    out = head(*inputs)
    assert out.projected.shape == (2, 10, 4, 5)
    (out.projected.sum() + out.scores.sum()).backward()
    taught = {name for name, value in head.named_parameters() if value.grad is not None}
    assert taught == {"classifier.weight", "projection.weight"}
    assert inputs[0].grad.any()


def test_dropout_is_of_training_only_and_the_projection_optional() -> None:
    head, inputs = head_and_inputs()
    assert not torch.equal(head(*inputs).scores, head(*inputs).scores)
    head.eval()
    assert torch.equal(head(*inputs).scores, head(*inputs).scores)
    plain = SEAMHead(8, 3, side_channels=(4, 6), proj_dim=None)
    assert plain(*inputs).projected is None


def test_head_compiles_to_one_graph() -> None:
    head, inputs = head_and_inputs(dropout=0.0)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), head(*inputs))


def test_module_resizes_the_maps_to_its_features() -> None:
    torch.manual_seed(0)
    refine = PixelCorrelationModule(6, embed=4)
    assert refine(torch.rand(2, 3, 2, 3), torch.randn(2, 6, 5, 7)).shape == (2, 3, 5, 7)
    assert "chunk=256" in repr(refine)


MAPS, KEYS = torch.rand(2, 3, 4, 5), torch.rand(2, 6, 4, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pixel_correlation(MAPS[0], KEYS), ValueError, r"maps: expected shape \(B, C, H, W\), got \(3, 4, 5\)"),
        (lambda: pixel_correlation(MAPS.long(), KEYS), TypeError, "maps: expected a floating-point tensor"),
        (lambda: pixel_correlation(MAPS, KEYS.long()), TypeError, "keys: expected a floating-point tensor"),
        (
            lambda: pixel_correlation(MAPS, KEYS[..., :4]),
            ValueError,
            r"keys: expected shape \(2, \*, 4, 5\) to match maps, got \(2, 6, 4, 4\)",
        ),
        (lambda: pixel_correlation(MAPS, KEYS, chunk=0), ValueError, "chunk: expected at least 1, got 0"),
        (lambda: keep_strongest(MAPS[0]), ValueError, r"maps: expected shape \(B, C, H, W\)"),
        (lambda: one_hot_scores(MAPS.long()), TypeError, "cam: expected a floating-point tensor"),
        (
            lambda: PixelCorrelationModule(7)(MAPS, KEYS),
            ValueError,
            r"features: expected shape \(\*, 7, \*, \*\) for this module, got \(2, 6, 4, 5\)",
        ),
        (
            lambda: SEAMHead(6, 3, side_channels=(4, 4))(KEYS, MAPS, KEYS, MAPS),
            ValueError,
            r"low: expected shape \(2, 4, \*, \*\) for this head and features, got \(2, 3, 4, 5\)",
        ),
        (
            lambda: SEAMHead(6, 3, side_channels=(3, 6))(KEYS, MAPS, KEYS, KEYS),
            ValueError,
            r"images: expected shape \(2, 3, \*, \*\) to match features, got \(2, 6, 4, 5\)",
        ),
    ],
)
def test_messages(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
