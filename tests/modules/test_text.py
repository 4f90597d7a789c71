import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.losses.reference_clims import looped_pairs
from wsss_modules import (
    CAMERA_READY_VOC_PROMPTS,
    COCO_PROMPTS,
    GENERAL_PROMPTS,
    VOC_PROMPTS,
    CAMHead,
    MaskedImagePairs,
    PromptSet,
    SigmoidCAMHead,
    TextPromptBank,
    image_text_similarity,
    masked_image_pairs,
)

LABELS = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]])


def case(seed: int = 0, labels: Tensor = LABELS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    activation = torch.rand(*labels.shape, 4, 5, generator=generator, dtype=torch.float64)
    return activation, torch.randn(len(labels), 3, 9, 11, generator=generator, dtype=torch.float64), labels


def lengths(texts: list[str]) -> Tensor:
    return torch.tensor([[len(text), sum(text.encode())] for text in texts]).float()


@given(st.integers(0, 50), st.integers(1, 14))
def test_masked_pairs_equal_the_loop_over_images_and_classes(seed: int, size: int) -> None:
    activation, images, labels = case(seed)
    activation.requires_grad_()
    pairs = masked_image_pairs(activation, images, labels, size=size)
    shown, left, classes = looped_pairs(activation, images, labels, size)
    torch.testing.assert_close(pairs.images, torch.stack([shown, left]))
    assert pairs.class_index.tolist() == classes == [0, 2, 1, 2]
    assert pairs.image_index.tolist() == [0, 0, 2, 2]
    weights = torch.linspace(-1, 1, pairs.images.numel(), dtype=torch.float64).view_as(pairs.images)
    ours, theirs = (
        torch.autograd.grad((value * weights).sum(), activation)[0]
        for value in (pairs.images, torch.stack([shown, left]))
    )
    torch.testing.assert_close(ours, theirs)
    assert not ours[labels == 0].any()


@given(st.integers(0, 50))
def test_the_two_halves_of_a_pair_add_up_to_the_image(seed: int) -> None:
    activation, images, labels = case(seed)
    pairs = masked_image_pairs(activation, images, labels, size=(9, 11))  # of the image, so that it is not resized
    torch.testing.assert_close(pairs.foreground + pairs.background, images[pairs.image_index])


def test_a_full_map_leaves_nothing_and_an_empty_one_shows_nothing() -> None:
    activation, images, labels = case()
    full, empty = (masked_image_pairs(torch.full_like(activation, x), images, labels, size=7) for x in (1.0, 0.0))
    torch.testing.assert_close(full.background, torch.zeros_like(full.background), rtol=0, atol=1e-14)
    assert not empty.foreground.any()


@pytest.mark.parametrize("labels", [torch.zeros(2, 3), torch.tensor([[0, 0, 0], [0, 1, 0]])], ids=["none", "one"])
def test_batches_of_no_pair_and_of_one_pair_work(labels: Tensor) -> None:
    activation, images, labels = case(labels=labels)
    pairs = MaskedImagePairs(size=6)(activation.requires_grad_(), images, labels)
    assert pairs.images.shape == (2, int(labels.sum()), 3, 6, 6)
    assert pairs.images.dtype == images.dtype
    assert torch.autograd.grad(pairs.foreground.sum(), activation)[0].any() == labels.any()


def test_labels_that_are_not_one_count_for_nothing() -> None:
    activation, images, _ = case()
    soft = torch.tensor([[0.4, 0.9, 0.0]] * 3)
    assert masked_image_pairs(activation, images, soft, size=4).class_index.tolist() == [1, 1, 1]


def test_second_normalisation_is_that_of_the_first_undone() -> None:
    activation, _, labels = case()
    photos = torch.rand(3, 3, 9, 11, dtype=torch.float64)
    old, new = ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3)), ((0.5, 0.4, 0.3), (0.25, 0.3, 0.35))

    def normalized(norm: tuple) -> Tensor:
        mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in norm)
        return (photos - mean) / std

    ours = masked_image_pairs(activation, normalized(old), labels, size=8, image_norm=old, encoder_norm=new)
    direct = masked_image_pairs(activation, normalized(new), labels, size=8)
    torch.testing.assert_close(ours.images, direct.images)


def test_half_precision_images_come_back_in_half_precision_but_are_masked_in_float32() -> None:
    activation, images, labels = case()
    low = masked_image_pairs(activation.bfloat16(), images.bfloat16(), labels, size=8).images
    exact = masked_image_pairs(activation.bfloat16().double(), images.bfloat16().double(), labels, size=8).images
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), exact, rtol=2**-8, atol=1e-6)


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_similarity_ignores_lengths_and_bounds_hold(a: float, b: float) -> None:
    u, v = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    similarity = image_text_similarity(u, v)
    torch.testing.assert_close(image_text_similarity(a * u, b * v), similarity)
    torch.testing.assert_close(image_text_similarity(u, a * u), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(similarity, torch.cosine_similarity(u, v))


def test_head_takes_the_weights_of_a_trained_classifier() -> None:
    trained, head = CAMHead(6, 3), SigmoidCAMHead(6, 3)
    head.load_state_dict(trained.state_dict())
    features = torch.randn(2, 6, 4, 5)
    out = head(features)
    torch.testing.assert_close(out.cam, trained(features).cam)
    torch.testing.assert_close(out.activation, torch.sigmoid(trained.class_maps(features)))


def test_voc_prompts_are_those_of_the_release() -> None:
    bank = TextPromptBank(["aeroplane", "diningtable", "person", "tvmonitor", "pottedplant"], lengths, VOC_PROMPTS)
    called = ["aeroplane", "dining table", "player", "tv monitor", "potted plant"]
    assert bank.class_prompts == [f"a photo of {name}." for name in called]
    assert len(bank.background_prompts) == 10
    assert len(COCO_PROMPTS.backgrounds) == 88
    assert COCO_PROMPTS.prompt("person") == "a photo of player."
    assert GENERAL_PROMPTS.prompt("red_fox") == "a photo of red fox."


def test_camera_ready_prompts_have_backgrounds_for_two_classes_and_weights_for_three() -> None:
    bank = TextPromptBank(["boat", "chair", "person", "train"], lengths, CAMERA_READY_VOC_PROMPTS)
    assert bank.class_prompts[2] == "a photo of person"
    assert bank.related.sum(1).tolist() == [5, 0, 0, 4]
    assert bank.class_weight.tolist() == [1, 3, 1, 1]
    assert bank.background_features.shape == (0, 2)
    of_train = [text for text, mine in zip(bank.related_prompts, bank.related[3], strict=True) if mine]
    assert of_train == [f"a photo of {name}" for name in ("railroad", "railway", "branches", "tree")]


def test_texts_are_encoded_once_and_without_gradients() -> None:
    weight, calls = torch.ones(2, requires_grad=True), []

    def encode(texts: list[str]) -> Tensor:
        calls.append(texts)
        return lengths(texts) * weight

    prompts = PromptSet(backgrounds=("sea", "sea", "cat"), related={"dog": ("sea", "kennel")})
    bank = TextPromptBank(["cat", "dog", "cat"], encode, prompts)
    assert calls == [[f"a photo of {name}." for name in ("cat", "dog", "sea", "kennel")]]
    assert not any(value.requires_grad for value in bank.buffers())
    assert bank.background_prompts == ["a photo of sea."]  # once, and no class
    assert torch.equal(bank(torch.tensor([0, 2])), lengths(["a photo of cat."] * 2))
    assert torch.equal(bank.class_features, lengths(bank.class_prompts))
    assert torch.equal(bank.related_features, lengths(bank.related_prompts))
    assert bank.state_dict() == {}
    assert bank.double().class_features.dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: masked_image_pairs(*case()[:2], torch.ones(3, 4)),
            "labels: expected shape (3, 3) to match activation",
        ),
        (lambda: masked_image_pairs(case()[0], case()[1][:2], LABELS), "images: expected shape (3, *, *, *)"),
        (lambda: MaskedImagePairs(image_norm=((0,), (1,))), "image_norm, encoder_norm: expected both or none"),
        (lambda: masked_image_pairs(*case(), encoder_norm=((0,), (1,))), "image_norm, encoder_norm: expected both"),
        (lambda: image_text_similarity(torch.rand(2, 3), torch.rand(3, 3)), "text_features: expected shape (2, 3)"),
        (lambda: SigmoidCAMHead(4, 2)(torch.rand(1, 3, 2, 2)), "features: expected shape (*, 4, *, *) for this head"),
        (lambda: TextPromptBank([], lengths), "classes: expected at least one name, got none"),
        (
            lambda: TextPromptBank(["cat"], lambda texts: torch.rand(1, 2), GENERAL_PROMPTS),
            "encode_text: expected shape (11, *) for its sentences, got (1, 2)",
        ),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
