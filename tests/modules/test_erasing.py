from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from wsss_modules import (
    CAMHead,
    ClassSpecificErase,
    FrozenClassifier,
    class_specific_erase,
    sample_erase_class,
)

HALF = [torch.float16, torch.bfloat16]
NORMALISE = ["batch", "image"]


# Drawing the class


@st.composite
def multi_hot(draw: st.DrawFn) -> Tensor:
    batch, classes = draw(st.integers(1, 6)), draw(st.integers(1, 21))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=classes, max_size=classes), min_size=batch, max_size=batch))
    return torch.tensor(rows).to(draw(st.sampled_from([torch.bool, torch.int64, torch.float32, torch.float16])))


@given(multi_hot(), st.integers(0, 2**32))
def test_sample_erase_class_splits_the_labels(labels: Tensor, seed: int) -> None:
    out = sample_erase_class(labels, generator=torch.Generator().manual_seed(seed))
    assert out.erased.dtype == out.remaining.dtype == labels.dtype
    assert torch.equal(out.erased.long() + out.remaining.long(), labels.long())
    assert torch.equal(out.valid, labels.long().any(1))
    assert torch.equal(out.erased.long().sum(1), out.valid.long()), "one class of each image that has any"
    rows = out.valid.nonzero()[:, 0]
    assert bool((out.erased[rows, out.chosen[rows]] > 0).all())


def test_sample_erase_class_draws_every_present_class_equally_often() -> None:
    labels, n = torch.tensor([1, 0, 1, 1, 0, 1, 1]), 40_000
    counts = sample_erase_class(labels.expand(n, -1), generator=torch.Generator().manual_seed(0)).erased.sum(0)
    assert not counts[labels == 0].any()
    deviation = (n * 0.2 * 0.8) ** 0.5
    assert bool(((counts[labels > 0] - n / 5).abs() < 4 * deviation).all()), counts


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24], ids=["lowest", "highest"])
@pytest.mark.parametrize("classes", [1, 3, 16, 17, 20])
def test_sample_erase_class_stays_among_the_classes_at_the_ends_of_the_draws(
    monkeypatch: pytest.MonkeyPatch, draw: float, classes: int
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, draw))
    chosen = sample_erase_class(torch.ones(2, classes)).chosen
    assert chosen.tolist() == [0 if draw == 0 else classes - 1] * 2


def test_sample_erase_class_draws_from_its_generator_alone() -> None:
    labels = torch.ones(50, 20)
    state = torch.get_rng_state()
    first, again, other = (
        sample_erase_class(labels, generator=torch.Generator().manual_seed(seed)).chosen for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sample_erase_class_takes_given_classes() -> None:
    labels = torch.tensor([[1, 0, 1], [0, 1, 1]])
    out = sample_erase_class(labels, index=torch.tensor([2, 0]))
    assert out.erased.tolist() == [[0, 0, 1], [0, 0, 0]]
    assert out.remaining.tolist() == [[1, 0, 0], [0, 1, 1]]
    assert out.valid.tolist() == [True, False], "the second image does not show class 0"


def test_sample_erase_class_compiles_to_one_graph() -> None:
    labels = (torch.arange(12).view(3, 4) % 3 > 0).float()
    labels[1] = 0
    out = torch.compile(sample_erase_class, fullgraph=True, backend="aot_eager")(labels)
    assert out.valid.tolist() == [True, False, True]
    assert torch.equal(out.erased + out.remaining, labels)
    assert out.erased.sum(1).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.ones(3)}, r"labels: expected shape \(B, K\), got \(3,\)"),
        ({"labels": torch.ones(3, 0)}, r"labels: expected at least one class, got shape \(3, 0\)"),
        ({"index": torch.tensor([0])}, r"index: expected shape \(2,\) to match labels, got \(1,\)"),
        ({"index": torch.rand(2)}, "index: expected an integer tensor, got torch.float32"),
        ({"index": torch.tensor([0, 0]), "generator": torch.Generator()}, "index: expected None .* got both"),
    ],
)
def test_sample_erase_class_says_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        sample_erase_class(**{"labels": torch.ones(2, 3), **arguments})


# Erasing


def scene(dtype: torch.dtype = torch.float64, size: tuple[int, int] = (13, 17)) -> tuple[Tensor, Tensor, Tensor]:
    """Signed maps, one class to erase in each of three images, and images whose sides are no multiples of the maps'."""
    generator = torch.Generator().manual_seed(0)
    cam = torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 4, 2]).view(
        -1, 1, 1, 1
    )
    images = torch.randn(3, 3, *size, generator=generator, dtype=torch.float64)
    return cam.to(dtype), F.one_hot(torch.tensor([2, 0, 3]), 4).to(dtype), images.to(dtype)


def erased_one_by_one(cam: Tensor, erased: Tensor, images: Tensor, normalise: str) -> tuple[Tensor, Tensor]:
    """Image by image, as the description says it."""
    shown = []
    for maps, picked, image in zip(cam, erased, images, strict=True):
        one = maps[int(picked.argmax())][None, None]
        shown.append(F.interpolate(one, image.shape[1:], mode="bilinear", align_corners=False).clamp(min=0)[0])
    highest = max(float(m.max()) for m in shown)
    masks = torch.stack([m / ((highest if normalise == "batch" else m.max()) + 1e-5) for m in shown])
    return masks, images - images * masks


@pytest.mark.parametrize("normalise", NORMALISE)
def test_class_specific_erase_equals_the_form_by_image(normalise: str) -> None:
    cam, erased, images = scene()
    mask, left = ClassSpecificErase(normalise=normalise)(cam, erased, images)
    torch.testing.assert_close((mask, left), erased_one_by_one(cam, erased, images, normalise))
    assert bool(((mask >= 0) & (mask < 1)).all())


@pytest.mark.parametrize("normalise", NORMALISE)
def test_class_specific_erase_leaves_what_the_map_does_not_show(normalise: str) -> None:
    cam, erased, images = scene()
    up = F.interpolate(cam, images.shape[2:], mode="bilinear", align_corners=False)
    denied = (up * erased[:, :, None, None]).sum(1, keepdim=True) <= 0
    mask, left = class_specific_erase(cam, erased, images, normalise=normalise)
    assert denied.any()
    assert not mask[denied].any()
    assert torch.equal(torch.where(denied, left, 0), torch.where(denied, images, 0))


@given(st.floats(0.01, 1000), st.sampled_from(NORMALISE))
def test_class_specific_erase_does_not_depend_on_the_scale_up_to_eps(gain: float, normalise: str) -> None:
    cam, erased, images = scene()
    options = {"normalise": normalise, "eps": 0.0}
    whole = class_specific_erase(cam, erased, images, **options)
    torch.testing.assert_close(class_specific_erase(gain * cam, erased, images, **options), whole)
    bound = 1e-5 * (1 + 1 / gain)  # the lowest maximum of the maps is above 1
    torch.testing.assert_close(
        class_specific_erase(gain * cam, erased, images, normalise=normalise).mask, whole.mask, rtol=bound, atol=0
    )


def test_only_the_batch_maximum_makes_an_image_depend_on_its_mates() -> None:
    cam, erased, images = scene()
    louder = cam * torch.tensor([1.0, 10, 1], dtype=cam.dtype).view(-1, 1, 1, 1)
    by_image = [class_specific_erase(maps, erased, images, normalise="image") for maps in (cam, louder)]
    by_batch = [class_specific_erase(maps, erased, images) for maps in (cam, louder)]
    assert torch.equal(by_image[0].mask[0], by_image[1].mask[0])
    torch.testing.assert_close(by_image[0].mask.amax((1, 2, 3)), torch.ones(3, dtype=cam.dtype), rtol=1e-4, atol=0)
    torch.testing.assert_close(by_batch[1].mask[0], by_batch[0].mask[0] / 10, rtol=1e-4, atol=0)


def test_both_maxima_agree_for_one_image() -> None:
    cam, erased, images = (x[:1] for x in scene())
    batch, image = (class_specific_erase(cam, erased, images, normalise=n) for n in NORMALISE)
    assert torch.equal(batch.mask, image.mask)


@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("normalise", NORMALISE)
def test_a_map_that_is_nowhere_positive_erases_nothing_and_learns_nothing(normalise: str, eps: float) -> None:
    cam, erased, images = scene()
    cam = (-cam.abs()).requires_grad_()
    mask, left = class_specific_erase(cam, erased, images, normalise=normalise, eps=eps)
    (grad,) = torch.autograd.grad(left.square().sum() + mask.sum(), cam)
    assert not mask.any()
    assert torch.equal(left, images)
    assert not grad.any()


@pytest.mark.parametrize("normalise", NORMALISE)
def test_an_image_without_a_class_to_erase_stays_as_it_is(normalise: str) -> None:
    cam, erased, images = scene()
    erased[1] = 0
    mask, left = class_specific_erase(cam, erased, images, normalise=normalise)
    assert not mask[1].any()
    assert torch.equal(left[1], images[1])
    assert mask[0].any()


def test_class_specific_erase_takes_nothing_from_the_other_classes() -> None:
    cam, erased, images = scene()
    spoilt = torch.where(erased[:, :, None, None] > 0, cam, float("nan"))
    torch.testing.assert_close(
        class_specific_erase(spoilt, erased, images), class_specific_erase(cam, erased, images), rtol=0, atol=0
    )


@pytest.mark.parametrize("normalise", NORMALISE)
def test_class_specific_erase_gradient(normalise: str) -> None:
    cam, erased, images = scene(size=(7, 9))
    leaves = cam.requires_grad_(), images.requires_grad_()
    assert gradcheck(lambda cam, images: class_specific_erase(cam, erased, images, normalise=normalise), leaves)


def test_the_gradient_flows_through_the_maximum() -> None:
    cam = torch.tensor([[[[1.0, 2.0]]]], requires_grad=True)
    mask, _ = class_specific_erase(cam, torch.ones(1, 1), torch.ones(1, 3, 1, 2), eps=0)
    (grad,) = torch.autograd.grad(mask[..., 0].sum(), cam)  # d (a / b) = (1 / b, -a / b^2)
    torch.testing.assert_close(grad, torch.tensor([[[[0.5, -0.25]]]]))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_class_specific_erase_of_half_precision_is_the_rounded_exact_result(dtype: torch.dtype) -> None:
    cam, erased, images = scene(dtype)
    out = class_specific_erase(cam, erased, images)
    exact = class_specific_erase(cam.double(), erased.double(), images.double())
    for ours, reference in zip(out, exact, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), reference, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_class_specific_erase_keeps_the_dtype_of_each_input() -> None:
    cam, erased, images = scene(torch.float32)
    out = class_specific_erase(cam.half(), erased.bool(), images)
    assert (out.mask.dtype, out.images.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize(("batch", "size"), [(0, (4, 4)), (1, (1, 1))])
def test_class_specific_erase_of_degenerate_shapes(normalise: str, batch: int, size: tuple[int, int]) -> None:
    cam, images = torch.rand(batch, 2, 1, 1), torch.rand(batch, 3, *size)
    mask, left = class_specific_erase(cam, torch.ones(batch, 2), images, normalise=normalise)
    assert mask.shape == (batch, 1, *size)
    assert left.shape == images.shape
    assert left.isfinite().all()


@pytest.mark.parametrize("normalise", NORMALISE)
def test_class_specific_erase_compiles_to_one_graph(normalise: str) -> None:
    cam, erased, images = scene(torch.float32)
    module = ClassSpecificErase(normalise=normalise)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(cam, erased, images), module(cam, erased, images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cam": torch.rand(4, 5, 6)}, r"cam: expected shape \(B, K, h, w\), got \(4, 5, 6\)"),
        ({"cam": torch.ones(3, 4, 5, 6, dtype=torch.int64)}, "cam: expected a floating-point tensor"),
        ({"erased": torch.ones(3, 5)}, r"erased: expected shape \(3, 4\) to match cam, got \(3, 5\)"),
        ({"images": torch.rand(2, 3, 8, 8)}, r"images: expected shape \(3, \*, \*, \*\) to match cam"),
        (
            {"images": torch.ones(3, 3, 8, 8, dtype=torch.uint8)},
            "images: expected a floating-point tensor, got .*uint8",
        ),
        ({"normalise": "set"}, 'normalise: expected "batch" or "image", got \'set\''),
    ],
)
def test_class_specific_erase_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    cam, erased, images = scene()
    with pytest.raises((ValueError, TypeError), match=message):
        class_specific_erase(**{"cam": cam, "erased": erased, "images": images, **change})


def test_the_module_says_what_is_wrong_and_shows_its_options() -> None:
    with pytest.raises(ValueError, match="normalise: expected"):
        ClassSpecificErase(normalise="sum")
    assert repr(ClassSpecificErase(normalise="image")) == "ClassSpecificErase(normalise='image', eps=1e-05, sync=False)"


def compare_one_image_a_process_with_one_batch(rank: int, address: str) -> None:
    """The maximum and its gradient must be those of the batch, wherever the maximum lies."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        whole = [x[:2] for x in scene()]
        for cam in (whole[0], whole[0].flip(0), whole[0][:1].expand(2, -1, -1, -1)):
            erased = whole[1][:1].expand(2, -1)  # the same class, so that the last case has two equal maxima
            weights = whole[2].square()
            leaf = cam.clone().requires_grad_()
            expected = class_specific_erase(leaf, erased, whole[2])
            (expected_grad,) = torch.autograd.grad((expected.mask * weights).mean(), leaf)

            mine = cam[rank : rank + 1].clone().requires_grad_()
            mask, left = class_specific_erase(mine, erased[:1], whole[2][rank : rank + 1], sync=True)
            torch.testing.assert_close((mask, left), tuple(x[rank : rank + 1] for x in expected))
            (grad,) = torch.autograd.grad((mask * weights[rank : rank + 1]).mean(), mine)
            torch.testing.assert_close(grad / 2, expected_grad[rank : rank + 1])  # DDP averages over the processes
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_sync_over_two_processes_equals_one_process(tmp_path: Path) -> None:
    spawn: Callable[..., Any] = torch.multiprocessing.spawn
    spawn(compare_one_image_a_process_with_one_batch, args=((tmp_path / "meeting").as_uri(),), nprocs=2)


# The frozen classifier


def network() -> nn.Sequential:
    """Convolutions with batch norm and dropout, logits and maps at the end."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.9), CAMHead(8, 4, dropout=0.9)
    )


def image_gradient(judge: nn.Module, images: Tensor) -> Tensor:
    leaf = images.clone().requires_grad_()
    logits, cam = judge(leaf)
    (grad,) = torch.autograd.grad(logits.square().sum() + cam.square().sum(), leaf)
    return grad


@pytest.mark.parametrize("parts", [None, 2])
def test_the_frozen_classifier_passes_the_gradient_of_its_images_and_takes_none(parts: int | None) -> None:
    net, images = network(), torch.rand(3, 3, 8, 8)
    expected = image_gradient(net.eval(), images)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    judge = FrozenClassifier(net, parts=parts)
    learner = nn.Conv2d(3, 3, 1)
    both = nn.ModuleList([learner, judge]).train()

    torch.testing.assert_close(image_gradient(judge, images), expected)
    judge(learner(images)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in learner.parameters())
    assert all(parameter.grad is None for parameter in judge.parameters())
    torch.optim.SGD(both.parameters(), lr=1.0, weight_decay=0.1).step()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_train_does_not_wake_the_frozen_classifier() -> None:
    judge = FrozenClassifier(network().train())
    images = torch.rand(4, 3, 8, 8)
    first = judge(images).logits
    around = nn.Sequential(judge).train()
    assert around.training
    assert not any(module.training for module in judge.module.modules())
    assert torch.equal(around(images).logits, first), "no dropout, no batch statistics"


def test_the_frozen_classifier_keeps_its_weights_in_the_state_dict() -> None:
    judge, other = FrozenClassifier(network()), FrozenClassifier(network())
    other.load_state_dict(judge.state_dict())
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(other(images).logits, judge(images).logits)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_change_no_output(parts: int) -> None:
    net, images = network(), torch.rand(5, 3, 8, 8)
    whole, split = FrozenClassifier(net), FrozenClassifier(net, parts=parts)
    torch.testing.assert_close(split(images), whole(images))
    torch.testing.assert_close(image_gradient(split, images), image_gradient(whole, images))


def test_parts_are_recomputed_one_after_the_other() -> None:
    seen: list[int] = []
    net = network()
    net[0].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    judge = FrozenClassifier(net, parts=2)
    image_gradient(judge, torch.rand(5, 3, 8, 8))
    assert seen == [3, 2, 2, 3], "forward, then backward from the last part to the first"
    seen.clear()
    with torch.no_grad():
        judge(torch.rand(5, 3, 8, 8))
    assert seen == [5], "nothing to save without a graph"


def test_parts_keep_no_activation() -> None:
    def kept(parts: int | None) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.data_ptr()] = x.numel()
            return x

        judge, images = FrozenClassifier(network(), parts=parts), torch.rand(4, 3, 16, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            held = judge(images)  # held, so that no address is used twice
        del held
        return sum(sizes.values())

    assert kept(2) < kept(None) / 5


class AsDictionary(nn.Module):
    """Outputs in nested plain containers."""

    def forward(self, images: Tensor) -> dict[str, Any]:
        means = images.mean((2, 3))
        return {"logits": means, "levels": [images, (images, means)]}


def test_parts_join_dictionaries_lists_and_tuples() -> None:
    images = torch.rand(3, 2, 4, 4)
    out = FrozenClassifier(AsDictionary(), parts=2)(images)
    expected = AsDictionary()(images)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert isinstance(out["levels"][1], tuple)


class AsNumber(nn.Module):
    """An output without images along its first axis."""

    def forward(self, images: Tensor) -> int:
        return len(images)


def test_the_frozen_classifier_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="parts: expected at least 1 or None, got 0"):
        FrozenClassifier(network(), parts=0)
    with pytest.raises(TypeError, match="module: expected tensors in tuples, lists or dictionaries, got int"):
        FrozenClassifier(AsNumber(), parts=2)(torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize("parts", [None, 2])
def test_the_frozen_classifier_compiles_to_one_graph(parts: int | None) -> None:
    judge, images = FrozenClassifier(network(), parts=parts), torch.rand(4, 3, 8, 8)
    compiled = torch.compile(judge, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(image_gradient(compiled, images), image_gradient(judge, images))
    assert f"parts={parts}" in repr(judge)
