import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from wsss_modules import (
    HVBiLSTM,
    MixTransformer,
    PatchClassifierGMP,
    PatchTransform,
    TokenEncoder,
    TransformerBlock,
    equivariance_target,
    merge_class_labels,
    mosaic2x2,
    split2x2,
    tokens_to_map,
)

seeds = st.integers(0, 1000)
DIHEDRAL = list(itertools.product([False, True], repeat=3))


def turn(flip_lr: bool, flip_ud: bool, transpose: bool) -> PatchTransform:
    return PatchTransform(*(torch.tensor([flag]) for flag in (flip_lr, flip_ud, transpose)))


# row and column LSTMs


def test_transposed_grid_and_exchanged_weights_give_the_transposed_map() -> None:
    layer, swapped = HVBiLSTM(5, 2).eval(), HVBiLSTM(5, 2).eval()
    swapped.rows.load_state_dict(layer.cols.state_dict())
    swapped.cols.load_state_dict(layer.rows.state_dict())
    x = torch.randn(2, 5, 3, 4)
    rows, cols = swapped(x.mT).mT.chunk(2, 1)
    torch.testing.assert_close(torch.cat([cols, rows], 1), layer(x))


def test_mirrored_grid_and_exchanged_directions_give_the_mirrored_map() -> None:
    layer, swapped = HVBiLSTM(5, 2).eval(), HVBiLSTM(5, 2).eval()
    state = layer.rows.state_dict()
    exchanged = {
        name: state[name.removesuffix("_reverse") if name.endswith("_reverse") else f"{name}_reverse"] for name in state
    }
    swapped.rows.load_state_dict(exchanged)
    swapped.cols.load_state_dict(layer.cols.state_dict())
    x = torch.randn(1, 5, 3, 4)
    right, left, down, up = swapped(x.flip(3)).flip(3).chunk(4, 1)
    torch.testing.assert_close(torch.cat([left, right, down, up], 1), layer(x))


def test_lstms_start_as_keras_starts_them() -> None:
    layer = HVBiLSTM(6, 4)
    for lstm in (layer.rows, layer.cols):
        torch.testing.assert_close(lstm.bias_ih_l0, torch.tensor([0.0, 1, 0, 0]).repeat_interleave(4))
        assert not lstm.bias_hh_l0.any()
        recurrent = lstm.weight_hh_l0_reverse
        torch.testing.assert_close(recurrent.mT @ recurrent, torch.eye(4), atol=1e-6, rtol=0)
        assert lstm.weight_ih_l0.abs().max() <= (6 / (6 + 16)) ** 0.5


def test_dropout_is_off_in_evaluation_and_a_1_x_1_grid_works() -> None:
    layer, x = HVBiLSTM(5, 2, dropout=0.5), torch.randn(2, 5, 1, 1)
    torch.manual_seed(0)
    assert not torch.equal(layer(x), layer(x))
    kept = layer._run(lambda sequences: (sequences,), torch.ones(8, 3, 5))  # features of a sequence, at all its steps
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert kept.unique().tolist() == [0, 2]
    assert not torch.equal(kept[0], kept[1])
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert layer(x).shape == (2, layer.out_dim, 1, 1)


# the classifier


@given(seeds)
def test_pooling_forgets_the_places(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    head, x = PatchClassifierGMP(4, 3, dropout=0), torch.randn(2, 4, 2, 5, generator=generator)
    out = head(x)
    shuffled = head(x.flatten(2)[:, :, torch.randperm(10, generator=generator)].view_as(x))
    torch.testing.assert_close(shuffled.pooled, out.pooled)
    torch.testing.assert_close(shuffled.pooled_logits, out.pooled_logits)
    assert bool((out.pooled >= out.probs.mean((2, 3))).all())
    torch.testing.assert_close(out.pooled_logits, torch.logit(out.pooled), rtol=1e-4, atol=1e-4)


def test_equal_maxima_share_the_gradient() -> None:
    features = torch.ones(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    head = PatchClassifierGMP(2, 2, dropout=0).double()
    (grad,) = torch.autograd.grad(head(features).pooled[0, 0], features)
    torch.testing.assert_close(grad, grad[:, :, :1, :1].expand_as(grad))
    assert grad.any()


def test_classifier_has_gradients_and_a_penalty() -> None:
    head = PatchClassifierGMP(2, 3, dropout=0).double()
    x = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: tuple(head(x)), x)
    torch.testing.assert_close(head.l2_penalty(0.01), 0.01 * (head.classifier.weight**2).sum())


@pytest.mark.parametrize("kind", ["vit", "mit", "hybrid"])
def test_classifier_reads_any_transformer_on_grids_that_are_not_square(kind: str) -> None:
    images = torch.rand(2, 3, 48, 64)
    if kind == "mit":
        features = MixTransformer((8, 16, 24, 12), (1, 1, 1, 2), num_heads=(1, 2, 3, 4))(images).features[-1]
    else:
        trunk = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, stride=4), torch.nn.Conv2d(8, 12, 4, stride=4))
        patches = torch.nn.Conv2d(3, 12, 16, stride=16) if kind == "vit" else trunk
        encoder = TokenEncoder(patches, [TransformerBlock(12, 3)], 12, num_prefix=int(kind == "vit"), grid=(3, 3))
        out = encoder(images)
        features = tokens_to_map(out.patches, out.grid)
    lstm = HVBiLSTM(12, 2)
    out = PatchClassifierGMP(lstm.out_dim, 4)(lstm(features))
    assert out.probs.shape == (2, 4, 3, 4)


# merging with labels


@given(seeds)
def test_merged_probabilities(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64).softmax(1)
    labels = torch.randint(0, 2, (2, 4), generator=generator)
    merged = merge_class_labels(probs, labels)
    some = labels.any(1)
    torch.testing.assert_close(merged.sum(1), some[:, None, None].expand(2, 3, 5).double())
    assert not merged[labels == 0].any()
    scaled = probs * torch.rand(1, 4, 1, 1, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(merge_class_labels(scaled, labels), merged)
    one = F.one_hot(torch.tensor([2, 0]), 4)
    torch.testing.assert_close(merge_class_labels(probs, one), one.double()[:, :, None, None].expand_as(probs))


def test_nothing_merges_into_nothing() -> None:
    probs = torch.zeros(2, 3, 2, 2)
    assert not merge_class_labels(probs, torch.ones(2, 3)).any()
    assert not merge_class_labels(probs + 0.3, torch.zeros(2, 3)).any()
    assert gradcheck(
        lambda p: merge_class_labels(p, torch.tensor([[1, 0]])), torch.rand(1, 2, 2, 2).double().requires_grad_()
    )


# transforms


def by_hand(x: Tensor, flip_lr: bool, flip_ud: bool, transpose: bool) -> Tensor:
    x = x.flip(3) if flip_lr else x
    x = x.flip(2) if flip_ud else x
    return x.mT if transpose else x


@pytest.mark.parametrize("flags", DIHEDRAL, ids=str)
def test_dihedral_transforms_are_exact_and_inverted(flags: tuple[bool, bool, bool]) -> None:
    x = torch.randn(1, 3, 5, 5)
    moved = turn(*flags).apply(x)
    assert torch.equal(moved, by_hand(x, *flags))
    assert torch.equal(turn(*flags).inverse().apply(moved), x)


def test_the_eight_transforms_form_a_group() -> None:
    x = torch.arange(9.0).view(1, 1, 3, 3)
    results = [turn(*flags).apply(x) for flags in DIHEDRAL]
    assert len({tuple(r.flatten().tolist()) for r in results}) == 8
    for first, second in itertools.product(DIHEDRAL, repeat=2):
        both = turn(*second).apply(turn(*first).apply(x))
        assert any(torch.equal(both, r) for r in results)


def test_each_image_has_a_transform_of_its_own() -> None:
    x = torch.randn(8, 2, 4, 4)
    flags = torch.tensor(DIHEDRAL)
    moved = PatchTransform(*flags.unbind(1)).apply(x)
    for i, each in enumerate(DIHEDRAL):
        assert torch.equal(moved[i : i + 1], by_hand(x[i : i + 1], *each))


@given(seeds)
def test_crops_are_resized_from_corner_to_corner(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = PatchTransform.draw(
        4, crop_probability=0.5, crop=4, lattice=2, grid=(10, 8), size=(6, 6), generator=generator
    )
    x = torch.rand(4, 3, 10, 8, generator=generator, dtype=torch.float64).softmax(1)
    moved = draw.apply(x)
    torch.testing.assert_close(moved.sum(1), torch.ones(4, 6, 6, dtype=torch.float64))
    torch.testing.assert_close(draw.apply(x.flip(1)), moved.flip(1))
    for i, (x1, y1, x2, y2) in enumerate(draw.box.tolist()):
        assert (x2 - x1, y2 - y1) in ((4, 4), (8, 10))
        part = F.interpolate(x[i : i + 1, :, y1:y2, x1:x2], (6, 6), mode="bilinear", align_corners=True)
        flags = (draw.flip_lr[i].item(), draw.flip_ud[i].item(), draw.transpose[i].item())
        torch.testing.assert_close(moved[i : i + 1], by_hand(part, *flags))


def test_grids_that_are_not_square_are_mirrored_but_not_turned() -> None:
    x = torch.randn(1, 2, 3, 5)
    assert torch.equal(turn(True, True, False).apply(x), x.flip(2, 3))
    with pytest.raises(ValueError, match="transpose: expected square results, got 3 x 5"):
        turn(False, False, True).apply(x)
    assert not PatchTransform.draw(64, transpose=False).transpose.any()


def test_transforms_in_patches_are_those_in_pixels_rounded_down() -> None:
    draw = PatchTransform.draw(3, crop_probability=1.0, crop=32, lattice=16, grid=(64, 64), size=(48, 48))
    patches = draw.on_patches(16)
    assert torch.equal(patches.box * 16, draw.box)
    assert patches.size == (3, 3)
    odd = draw._replace(box=torch.tensor([[17, 30, 50, 63]] * 3), size=(40, 47)).on_patches(16)
    assert odd.box[0].tolist() == [1, 1, 3, 3]
    assert odd.size == (2, 2)
    with pytest.raises(ValueError, match="inverse: expected flips and transposes only"):
        patches.inverse()
    assert gradcheck(patches.apply, torch.rand(3, 1, 4, 4, dtype=torch.float64, requires_grad=True))


@given(seeds)
def test_target_is_the_corrected_prediction_of_the_untransformed_image(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.rand(2, 3, 4, 4, generator=generator, dtype=torch.float64)  # of the images as they are
    labels = torch.tensor([[1, 0, 1], [1, 1, 0]])
    crops = {"crop_probability": 1.0, "crop": 2, "grid": (4, 4), "size": (3, 3)}
    first = PatchTransform.draw(2, generator=generator)
    view = PatchTransform.draw(2, generator=generator, **crops)
    seen, expected = torch.empty_like(whole), torch.zeros(2, 3, 3, 3, dtype=torch.float64)
    for i in range(2):
        seen[i : i + 1] = by_hand(whole[i : i + 1], *(bool(flag[i]) for flag in first[:3]))
        x1, y1, x2, y2 = view.box[i].tolist()
        part = F.interpolate(whole[i : i + 1, :, y1:y2, x1:x2], (3, 3), mode="bilinear", align_corners=True)
        part = by_hand(part, *(bool(flag[i]) for flag in view[:3]))[0]
        for k in labels[i].nonzero()[:, 0]:
            expected[i, k] = part[k] / part[k].max()  # of the crop, not of the image
        expected[i] /= expected[i].sum(0)
    target = equivariance_target(seen.requires_grad_(), labels, first, view)
    torch.testing.assert_close(target, expected)
    assert not target.requires_grad


# mosaics


@given(st.integers(0, 3), st.integers(1, 3), st.integers(1, 4))
def test_mosaics_split_into_what_they_were_made_of(n: int, height: int, width: int) -> None:
    images = torch.randn(4 * n, 2, height, width)
    tiled = mosaic2x2(images)
    assert tiled.shape == (n, 2, 2 * height, 2 * width)
    assert torch.equal(split2x2(tiled), images)
    if n:
        assert torch.equal(tiled[0, :, height:, :width], images[2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HVBiLSTM(0, 2), "in_dim, hidden_dim: expected at least 1, got 0 and 2"),
        (lambda: HVBiLSTM(4, 2)(torch.rand(1, 3, 2, 2)), r"features: expected shape \(\*, 4, \*, \*\) for this layer"),
        (lambda: PatchClassifierGMP(4, 1), "num_classes: expected at least 2, background and a class"),
        (lambda: merge_class_labels(torch.rand(1, 2, 2, 2), torch.ones(1, 3)), "labels: expected shape"),
        (lambda: mosaic2x2(torch.rand(6, 1, 2, 2)), "images: expected a multiple of 4, got 6; cut the batch or fill"),
        (lambda: split2x2(torch.rand(1, 1, 3, 2)), r"mosaics: expected even height and width, got \(3, 2\)"),
        (lambda: PatchTransform.draw(2, crop_probability=0.5, crop=9, grid=(8, 8), size=(4, 4)), "crop: expected grid"),
        (lambda: turn(False, False, False).apply(torch.rand(2, 1, 2, 2)), r"x: expected shape \(1, \*, \*, \*\)"),
        (
            lambda: turn(False, False, False)._replace(box=torch.tensor([[0, 0, 1, 1]])).apply(torch.rand(1, 1, 2, 2)),
            "size: expected the size of the results of a crop, got None",
        ),
    ],
)
def test_messages(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
