import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import wsss_losses
from tests.losses.reference_clims import looped_class_suppression, released_step
from wsss_losses import (
    background_suppression_loss,
    background_text_matching_loss,
    class_background_suppression_loss,
    clims_camera_ready_loss,
    clims_loss,
    object_text_matching_loss,
)
from wsss_modules import FrozenClassifier, TextPromptBank

MATCHING = [object_text_matching_loss, background_text_matching_loss]
LABELS = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Tower(nn.Module):
    """Stands in for the image tower of an image-text model, and counts its calls and images."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(3 * 4, 6, seed=seed))
        self.bias = nn.Parameter(random(6, seed=seed + 1))
        self.calls: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append(len(images))
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) @ self.weight.to(images.dtype) + self.bias


def case(seed: int = 0, labels: Tensor = LABELS) -> tuple[Tensor, Tensor, Tensor, Tower, Tensor, Tensor]:
    activation = torch.sigmoid(random(*labels.shape, 4, 5, seed=seed)).requires_grad_()
    images = random(len(labels), 3, 10, 12, seed=seed + 1)
    return activation, images, labels, Tower(), random(labels.shape[1], 6, seed=7), random(5, 6, seed=8)


def options(seed: int = 0) -> dict[str, float]:
    return {"size": 8, "threshold": 0.2 * (seed % 3)}


BATCHES = {"three images": LABELS[[2, 1, 0]], "one of them empty": LABELS[[1, 0]], "one image": LABELS[:1]}
BATCHES["one pair"] = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0]])


@given(st.integers(0, 30), st.sampled_from(list(BATCHES)))
def test_objective_and_gradient_equal_the_released_step(seed: int, kind: str) -> None:
    labels = BATCHES[kind]
    activation, images, labels, tower, text, background = case(seed, labels)
    sentences = {f"class {k}": row for k, row in enumerate(text)} | {f"bg {k}": row for k, row in enumerate(background)}

    def encode_text(texts: list[str]) -> Tensor:
        return torch.stack([sentences[text] for text in texts])

    prompts, backgrounds = [f"class {k}" for k in range(len(text))], [f"bg {k}" for k in range(len(background))]
    total = clims_loss(activation, images, labels, tower, text, background, **options(seed)).total
    expected = released_step(activation, images, labels, tower, encode_text, prompts, backgrounds, **options(seed))
    torch.testing.assert_close(total, expected)
    ours, theirs = (torch.autograd.grad(value, activation)[0] for value in (total, expected))
    torch.testing.assert_close(ours, theirs)


def test_image_tower_is_called_once_with_both_halves_of_each_pair() -> None:
    inputs = case()
    clims_loss(*inputs, **options()).total.backward()
    assert inputs[3].calls == [2 * 6]


def test_a_batch_without_labels_asks_nobody_and_keeps_the_area() -> None:
    inputs = case(labels=torch.zeros(2, 4))
    terms = clims_loss(*inputs, **options())
    assert inputs[3].calls == []
    torch.testing.assert_close(terms.total, 0.2 * inputs[0].mean())
    for term in terms[1:4]:
        assert term == 0
        assert not torch.autograd.grad(term, inputs[0], retain_graph=True)[0].any()


def compare_two_processes_with_one(rank: int, address: str) -> None:
    """The second process has an image without labels, and so no pair at all."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        related = torch.tensor([[True, False, True, True, False]] * 4)
        for loss_of, more in ((clims_loss, ()), (clims_camera_ready_loss, (related, torch.ones(4).double()))):
            activation, images, labels, *rest = case(labels=LABELS[:2])
            given = {"size": 8, "positive": True, "sync": True}
            expected = loss_of(activation, images, labels, *rest, *more, **given | {"sync": False})
            (whole,) = torch.autograd.grad(expected.total, activation)
            mine = activation.detach()[rank : rank + 1].requires_grad_()
            part = slice(rank, rank + 1)
            result = loss_of(mine, images[part], labels[part], *rest, *more, **given)
            torch.testing.assert_close(result, expected)
            (grad,) = torch.autograd.grad(result.total, mine)
            torch.testing.assert_close(grad / 2, whole[part])  # as DistributedDataParallel averages
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_a_process_without_a_pair_takes_part_in_the_backward(tmp_path: Path) -> None:
    spawn: Callable = torch.multiprocessing.spawn
    spawn(compare_two_processes_with_one, args=((tmp_path / "meeting").as_uri(),), nprocs=2)


def test_weights_of_a_frozen_tower_get_no_gradient() -> None:
    activation, images, labels, tower, *texts = case()
    clims_loss(activation, images, labels, FrozenClassifier(tower), *texts, **options()).total.backward()
    assert tower.weight.grad is None
    assert activation.grad.any()


def test_maps_of_absent_classes_learn_from_the_area_alone() -> None:
    scores = random(*LABELS.shape, 4, 5, seed=3).requires_grad_()
    _, images, labels, *rest = case()
    clims_loss(scores.sigmoid(), images, labels, *rest, **options()).total.backward()
    slope = (scores.sigmoid() * (1 - scores.sigmoid())).detach()
    expected = 0.2 / scores.numel() * slope
    absent = labels == 0
    torch.testing.assert_close(scores.grad[absent], expected[absent])
    assert not torch.isclose(scores.grad[~absent], expected[~absent]).all()


@given(st.permutations(range(3)))
def test_order_of_images_changes_nothing(order: list[int]) -> None:
    activation, images, labels, *rest = case()
    base = clims_loss(activation, images, labels, *rest, **options())
    permuted = clims_loss(activation[order], images[order], labels[order], *rest, **options())
    torch.testing.assert_close(permuted, base)


@pytest.mark.parametrize("loss_of", MATCHING)
@given(order=st.permutations(range(6)))
def test_order_of_pairs_changes_nothing(loss_of, order: list[int]) -> None:
    similarity, weight = torch.tanh(random(6, seed=1)), random(6, seed=2).abs()
    torch.testing.assert_close(loss_of(similarity[order], weight[order]), loss_of(similarity, weight))


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_matching_is_monotone_inside_the_clamp_and_flat_outside(a: float, b: float) -> None:
    low, high = sorted((a, b))
    pair = torch.tensor([low, high], dtype=torch.float64)
    shown, left = (loss_of(pair, reduction="none") for loss_of in MATCHING)
    inside = pair.clamp(1e-4, 0.9999)
    if inside[1] - inside[0] > 1e-9:
        assert shown[0] > shown[1]
        assert left[0] < left[1]
    elif inside[0] == inside[1]:
        assert shown[0] == shown[1]
        assert left[0] == left[1]


def test_negative_similarities_learn_with_a_leak_or_a_shift_only() -> None:
    for loss_of, sign in zip(MATCHING, (-1, 1), strict=True):
        for given_options, learns in (({}, False), ({"leak": 0.5}, True), ({"positive": True}, True)):
            similarity = torch.tensor([-0.4], dtype=torch.float64, requires_grad=True)
            loss_of(similarity, **given_options).backward()
            assert similarity.grad.item() * sign > 0 if learns else similarity.grad.item() == 0


@pytest.mark.parametrize("loss_of", MATCHING)
def test_leak_continues_the_loss_without_a_jump(loss_of) -> None:
    for bound in (1e-4, 0.9999):
        around = torch.tensor([bound - 1e-9, bound + 1e-9], dtype=torch.float64)
        below, above = loss_of(around, leak=0.5, reduction="none").tolist()
        assert below == pytest.approx(above, abs=2e-4)  # 1e-9 times the steepest slope, 1e4, and back: 1e-5


def test_camera_ready_similarities_that_were_nan_are_finite() -> None:
    similarity = torch.tensor([0.0, -0.5, 1.0], requires_grad=True)
    for loss_of in MATCHING:
        loss = loss_of(similarity, clamp=None, reduction="none")
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), similarity)[0].isfinite().all()


def test_weights_count_but_the_mean_divides_by_the_number_of_pairs() -> None:
    similarity = torch.tensor([0.5, 0.25], dtype=torch.float64)
    weighted = object_text_matching_loss(similarity, torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(weighted, -(3 * similarity[0].log() + similarity[1].log()) / 2)


@given(st.floats(-0.9, 0.9), st.floats(-0.9, 0.9))
def test_suppression_falls_with_the_threshold_and_adds_up_over_batches(a: float, b: float) -> None:
    low, high = sorted((a, b))
    similarity = torch.tanh(random(6, 4, seed=5)).abs()  # of a negative one the cost is negative too
    of_low, of_high = (background_suppression_loss(similarity, threshold=x) for x in (low, high))
    assert of_low >= of_high
    whole = background_suppression_loss(similarity, threshold=low)
    parts = sum(background_suppression_loss(part, threshold=low) for part in similarity.split((2, 4)))
    torch.testing.assert_close(whole, parts)


def test_suppression_is_zero_at_a_threshold_of_one_and_finite_at_a_similarity_of_one() -> None:
    similarity = torch.tensor([[1.0, 0.5]], requires_grad=True)
    assert background_suppression_loss(similarity, threshold=1.0) == 0
    loss = background_suppression_loss(similarity)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, similarity)[0].isfinite().all()
    everything = torch.ones(1, 2, dtype=torch.bool)
    assert class_background_suppression_loss(similarity, everything).isfinite()


def test_suppression_as_a_mean_does_not_depend_on_how_many_pairs_there_are() -> None:
    similarity = torch.tanh(random(3, 4, seed=6))
    once = background_suppression_loss(similarity, threshold=0.0, reduction="mean")
    torch.testing.assert_close(
        background_suppression_loss(similarity.repeat(4, 1), threshold=0.0, reduction="mean"), once
    )
    summed = background_suppression_loss(similarity, threshold=0.0)
    torch.testing.assert_close(summed, 3 * once)


@given(st.integers(0, 50))
def test_class_suppression_equals_the_loop_over_pairs(seed: int) -> None:
    similarity, related = torch.tanh(random(5, 4, seed=seed)), random(5, 4, seed=seed + 100) > 0.3
    expected = looped_class_suppression(similarity, related)
    torch.testing.assert_close(class_background_suppression_loss(similarity, related), expected)


@given(st.floats(0.1, 50))
def test_length_of_features_changes_nothing(scale: float) -> None:
    activation, images, labels, tower, text, background = case()
    base = clims_loss(activation, images, labels, tower, text, background, **options())
    longer = clims_loss(
        activation, images, labels, lambda x: scale * tower(x), text / scale, background * scale, **options()
    )
    torch.testing.assert_close(longer, base)


def test_camera_ready_objective_is_the_sum_of_its_terms_with_weights_of_classes() -> None:
    activation, images, labels, tower, text, background = case()
    related = torch.zeros(4, 5, dtype=torch.bool)
    related[2, 1:4] = True
    inputs = activation, images, labels, tower, text, background, related
    plain = clims_camera_ready_loss(*inputs, torch.ones(4), size=8, positive=True)
    parts = 10 * plain.object_text + 25 * plain.background_text + 29.5 * plain.suppression + 1.15 * plain.area
    torch.testing.assert_close(plain.total, parts)
    heavy = clims_camera_ready_loss(*inputs, 3 * torch.ones(4), size=8, positive=True)
    torch.testing.assert_close(heavy.object_text, 3 * plain.object_text)
    torch.testing.assert_close(heavy.background_text, 3 * plain.background_text)
    torch.testing.assert_close(heavy.suppression, plain.suppression)


def test_cached_bank_gives_the_same_loss_as_texts_encoded_anew() -> None:
    activation, images, labels, tower, *_ = case()

    def encode(texts: list[str]) -> Tensor:
        return torch.stack([random(6, seed=sum(text.encode())) for text in texts])

    bank = TextPromptBank(["boat", "cat", "cow", "train"], encode)
    cached = clims_loss(activation, images, labels, tower, bank.class_features, bank.background_features, **options())
    anew = encode(bank.class_prompts), encode(bank.background_prompts)
    torch.testing.assert_close(clims_loss(activation, images, labels, tower, *anew, **options()), cached)


def bad_objective(**changes: object) -> None:
    names = ("activation", "images", "labels", "encode_image", "class_text", "background_text")
    inputs = {**dict(zip(names, case(), strict=True)), **options(), **changes}
    clims_loss(**inputs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: object_text_matching_loss(torch.rand(2, 1)),
            ValueError,
            "similarity: expected shape (n,), got (2, 1)",
        ),
        (lambda: object_text_matching_loss(torch.ones(2).long()), TypeError, "similarity: expected a floating-point"),
        (
            lambda: background_text_matching_loss(torch.rand(2), torch.rand(3)),
            ValueError,
            "weight: expected shape (2,) to match similarity, got (3,)",
        ),
        (lambda: background_text_matching_loss(torch.rand(2), clamp=(1.0, 0.0)), ValueError, "clamp: expected least <"),
        (
            lambda: object_text_matching_loss(torch.rand(2), leak=-1.0),
            ValueError,
            "leak: expected at least 0, got -1.0",
        ),
        (lambda: object_text_matching_loss(torch.rand(2), reduction="all"), ValueError, 'reduction: expected "mean"'),
        (lambda: background_suppression_loss(torch.rand(2)), ValueError, "similarity: expected shape (n, L), got (2,)"),
        (
            lambda: class_background_suppression_loss(torch.rand(2, 3), torch.rand(2, 3)),
            TypeError,
            "related: expected bool, got torch.float32",
        ),
        (
            lambda: class_background_suppression_loss(torch.rand(2, 3), torch.ones(2, 4) > 0),
            ValueError,
            "related: expected shape (2, 3) to match similarity, got (2, 4)",
        ),
        (
            lambda: wsss_losses.area_regularization_loss(torch.rand(2, 3)),
            ValueError,
            "activation: expected shape (B, K, h, w), got (2, 3)",
        ),
        (lambda: bad_objective(area_weight=-1), ValueError, "area_weight: expected at least 0, got -1"),
        (
            lambda: bad_objective(suppression_reduction="none"),
            ValueError,
            'suppression_reduction: expected "sum" or "mean", got \'none\'',
        ),
        (
            lambda: bad_objective(class_text=torch.rand(3, 6)),
            ValueError,
            "class_text: expected shape (4, *) (K, D) to match labels, got (3, 6)",
        ),
        (
            lambda: bad_objective(encode_image=lambda images: images.mean((2, 3))),
            ValueError,
            "encode_image: expected shape (12, 6) for its images and class_text, got (12, 3)",
        ),
        (lambda: bad_objective(background_text=torch.rand(6)), ValueError, "background_text: expected shape (L, D)"),
    ],
)
def test_bad_arguments_are_named(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
