"""The climb of an image along the gradient of its strongest class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from wsss_modules import gradient_climb, top_logit_gradient


class Toy(nn.Module):
    """Convolution, tanh, mean and a linear layer, in float64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.linear = nn.Conv2d(3, 5, 3), nn.Linear(5, 4)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.conv(images).tanh().mean((2, 3)))


def pictures(batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 6, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_top_logit_gradient_equals_finite_differences() -> None:
    model, images, small = Toy(), pictures(2), 1e-6
    gradient = top_logit_gradient(model, images)
    for place in [(0, 0, 0, 0), (0, 2, 3, 4), (1, 1, 5, 6)]:
        there = torch.zeros_like(images)
        there[place] = small
        with torch.no_grad():
            rise = (model(images + there).amax(1) - model(images - there).amax(1)).sum() / (2 * small)
        torch.testing.assert_close(gradient[place], rise, rtol=1e-6, atol=1e-9)


@given(st.integers(0, 1000), st.sampled_from([0.0, 0.07, 3.0]), st.sampled_from(["batch", "image"]))
def test_climb_stays_within_a_step_and_within_the_range_of_the_pixels(seed: int, step: float, scope: str) -> None:
    images = pictures(seed=seed)
    climbed = gradient_climb(Toy(seed), images, step, scope=scope)
    assert not climbed.requires_grad
    assert (climbed - images).abs().max() <= step + 1e-12
    parts = [(images, climbed)] if scope == "batch" else zip(images, climbed, strict=True)
    for before, after in parts:
        assert before.min() <= after.min()
        assert after.max() <= before.max()


def test_a_small_step_raises_the_strongest_class_and_moves_one_entry_by_all_of_it() -> None:
    model, images = Toy(), pictures()
    climbed = gradient_climb(model, images, 1e-3)
    with torch.no_grad():
        assert (model(climbed).amax(1) > model(images).amax(1)).all()
    torch.testing.assert_close((climbed - images).abs().max().item(), 1e-3)


def test_in_image_scope_an_image_does_not_depend_on_the_others() -> None:
    model, images = Toy(), pictures()
    together = gradient_climb(model, images, scope="image")
    alone = torch.cat([gradient_climb(model, image[None]) for image in images])
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(gradient_climb(model, images), alone)


def test_climb_leaves_weights_images_and_modes_alone() -> None:
    model, images = Toy(), pictures()
    model.conv.requires_grad_(False)
    model.linear.weight.grad = torch.ones_like(model.linear.weight)
    before = images.clone()
    gradient_climb(model, images)
    assert model.conv.weight.grad is None
    assert model.linear.bias.grad is None
    assert torch.equal(model.linear.weight.grad, torch.ones_like(model.linear.weight))
    assert torch.equal(images, before)
    assert not images.requires_grad
    assert model.training


def test_climb_works_without_gradients_around_it_and_does_not_reach_into_them() -> None:
    model, images = Toy(), pictures()
    with torch.no_grad():
        inside = gradient_climb(model, images)
    outside = gradient_climb(model, images.clone().requires_grad_())
    assert torch.equal(inside, outside)
    assert not outside.requires_grad


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_without_a_gradient_the_images_stay(scope: str) -> None:
    images = pictures()
    assert torch.equal(gradient_climb(lambda x: (0 * x).mean((2, 3)), images, scope=scope), images)


def test_climb_of_no_image_and_of_one_pixel() -> None:
    def model(images: Tensor) -> Tensor:
        return images.mean((2, 3))

    assert gradient_climb(model, pictures(0)).shape == (0, 3, 6, 7)
    assert gradient_climb(model, torch.zeros(1, 3, 1, 1)).shape == (1, 3, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_climb_in_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    images, weight = pictures().to(dtype), torch.randn(4, 3, dtype=dtype)
    climbed = gradient_climb(lambda x: x.sum((2, 3)) @ weight.T, images)
    exact = gradient_climb(lambda x: x.sum((2, 3)) @ weight.double().T, images.double())
    assert climbed.dtype == dtype
    torch.testing.assert_close(climbed.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


def climb_one_image_a_process(rank: int, address: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        model, images = Toy(), pictures(2)
        mine, expected = images[rank : rank + 1], gradient_climb(model, images)[rank : rank + 1]
        torch.testing.assert_close(gradient_climb(model, mine, sync=True), expected)
        alone = gradient_climb(model, mine)
        torch.testing.assert_close(gradient_climb(model, mine, scope="image", sync=True), alone)
        both = [torch.zeros(()), torch.zeros(())]
        dist.all_gather(both, (alone - expected).abs().max().float())
        assert max(both) > 1e-6, "the step of an image depends on the other"
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_synced_climb_over_two_processes_equals_that_of_the_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(climb_one_image_a_process, args=((tmp_path / "meeting").as_uri(),), nprocs=2)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "images: expected a floating-point tensor", {"images": torch.ones(1, 3, 2, 2, dtype=torch.uint8)}),
        (ValueError, r"images: expected shape \(B, 3, H, W\)", {"images": torch.ones(3, 2, 2)}),
        (ValueError, r"model\(images\): expected shape \(1, \*\) as logits", {"model": lambda x: x}),
        (ValueError, "model: expected logits with a gradient", {"model": lambda x: x.detach().mean((2, 3))}),
        (ValueError, "step: expected at least 0, got -1", {"step": -1}),
        (ValueError, "scope: expected", {"scope": "class"}),
    ],
)
def test_climb_names_the_wrong_argument(error: type[Exception], message: str, arguments: dict[str, object]) -> None:
    sound = {"model": lambda x: x.mean((2, 3)), "images": torch.ones(1, 3, 2, 2)}
    with pytest.raises(error, match=message):
        gradient_climb(**{**sound, **arguments})
