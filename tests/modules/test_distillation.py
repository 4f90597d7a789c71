"""The fusion of ReviewKD and its teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.modules.reference_distillation import fuse_concatenated
from wsss_modules import AttentionBasedFusion, ReviewDistiller, pyramid_maps, teacher_features

side = st.integers(1, 9)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(side, side, side, side, st.sampled_from([None, (3, 5), (10, 4)]))
def test_split_attention_equals_that_on_the_concatenation(
    h: int, w: int, h2: int, w2: int, out_size: tuple[int, int] | None
) -> None:
    fusion = AttentionBasedFusion(3, 6, 4).double()
    x, y = draw(2, 3, h, w).requires_grad_(), draw(2, 6, h2, w2, seed=1).requires_grad_()
    inputs = [x, y, *fusion.parameters()]
    ours, other = fusion(x, y, out_size), fuse_concatenated(fusion, x, y, out_size)
    torch.testing.assert_close(tuple(ours), tuple(other))
    assert ours.residual.shape[-2:] == ((h, w) if out_size is None else out_size)
    weights = draw(*ours.out.shape, seed=2)
    grads = [torch.autograd.grad((o.out * weights).sum() + o.residual.sum(), inputs) for o in (ours, other)]
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-9)


def test_attention_far_on_one_side_shuts_the_residual_out() -> None:
    fusion = AttentionBasedFusion(3, 6, 4).double().eval()
    with torch.no_grad():
        fusion.attention.weight.zero_()
        fusion.attention.bias.copy_(torch.tensor([50.0, -50.0]))
    x, y = draw(2, 3, 4, 4), draw(2, 6, 2, 2)
    torch.testing.assert_close(fusion(x, y).residual, fusion.reduce(x))


def test_eval_mode_is_deterministic_and_keeps_the_statistics() -> None:
    distiller = ReviewDistiller([3, 5], [4, 6]).eval()
    state = copy.deepcopy(distiller.state_dict())
    maps = [torch.rand(2, 3, 8, 8), torch.rand(2, 5, 4, 4)]
    first, second = distiller(maps), distiller(maps)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in distiller.state_dict().items())
    distiller.train()(maps)
    assert not torch.equal(distiller.blocks[0].reduce[1].running_mean, state["blocks.0.reduce.1.running_mean"])


def test_gradients_run_from_deep_to_shallow_only() -> None:
    distiller = ReviewDistiller([3, 4, 5], [4, 5, 6], mid_channels=6).double()
    maps = [draw(2, c, *s, seed=c).requires_grad_() for c, s in ((3, (12, 20)), (4, (6, 10)), (5, (3, 5)))]
    out = distiller(maps)
    assert [tuple(x.shape) for x in out] == [(2, 4, 12, 20), (2, 5, 6, 10), (2, 6, 3, 5)]
    for stage, x in enumerate(out):
        weights = draw(*x.shape, seed=stage)
        grads = torch.autograd.grad((x * weights).sum(), maps, allow_unused=True, retain_graph=True)
        assert [grad is not None and bool(grad.any()) for grad in grads] == [i >= stage for i in range(3)]


def test_maps_take_the_sizes_asked_for() -> None:
    distiller = ReviewDistiller([3, 5], [4, 6])
    assert distiller.blocks[0].reduce[0].in_channels == 5  # the deepest stage first, as in the released state dict
    assert distiller.blocks[0].attention is None
    assert distiller.blocks[1].attention.in_channels == 10  # twice the channels of the deepest map
    out = distiller([torch.rand(2, 3, 8, 12), torch.rand(2, 5, 4, 6)], [(16, 20), (5, 7)])
    assert [tuple(x.shape) for x in out] == [(2, 4, 16, 20), (2, 6, 5, 7)]


def test_convolutions_start_kaiming_uniform_with_a_slope_of_one() -> None:
    fusion = AttentionBasedFusion(12, 20, 16)
    for weight in (fusion.reduce[0].weight, fusion.expand[0].weight):
        bound = (3 / weight[0].numel()) ** 0.5
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.9 * bound


def test_group_norm_learns_from_one_image_of_one_cell() -> None:
    x = torch.rand(1, 6, 1, 1, requires_grad=True)
    AttentionBasedFusion(6, 8, 4, fuse=False, norm="group")(x).out.sum().backward()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        AttentionBasedFusion(6, 8, 4, fuse=False)(x)


def test_fusion_compiles_to_one_graph() -> None:
    fusion = AttentionBasedFusion(3, 6, 4)
    x, y = torch.rand(2, 3, 8, 8), torch.rand(2, 6, 4, 4)
    compiled = torch.compile(copy.deepcopy(fusion), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tuple(compiled(x, y)), tuple(fusion(x, y)))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("resnet14t", "resnet10t"), ("mobilenetv2_035", "lcnet_035"), ("convnext_atto", "mobilenetv2_035")],
)
def test_any_two_timm_pyramids_fit(student: str, teacher: str) -> None:
    timm = pytest.importorskip("timm")
    nets = [timm.create_model(name, features_only=True, pretrained=False) for name in (student, teacher)]
    count = min(len(net.feature_info.channels()) for net in nets)
    channels = [net.feature_info.channels()[-count:] for net in nets]
    images = torch.rand(2, 3, 64, 96)
    maps, targets = nets[0](images)[-count:], teacher_features(nets[1], images)[-count:]
    out = ReviewDistiller(*channels, mid_channels=16)(maps, [x.shape[-2:] for x in targets])
    assert [x.shape for x in out] == [x.shape for x in targets]
    assert all(x.requires_grad for x in out)
    assert not any(x.requires_grad for x in targets)


def test_pyramids_with_channels_last_teach_and_learn() -> None:
    timm = pytest.importorskip("timm")
    small = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "img_size": (64, 96), "window_size": 2}
    swin = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, pretrained=False, **small)
    other = timm.create_model("resnet10t", features_only=True, pretrained=False, out_indices=(1, 2, 3, 4))
    images = torch.rand(2, 3, 64, 96)
    for student, teacher in ((swin, other), (other, swin)):
        maps, targets = pyramid_maps(student, images), teacher_features(teacher, images)
        distiller = ReviewDistiller(student.feature_info.channels(), teacher.feature_info.channels(), mid_channels=16)
        out = distiller(maps, [x.shape[-2:] for x in targets])
        assert [x.shape for x in out] == [x.shape for x in targets]
        assert [x.shape[1] for x in targets] == teacher.feature_info.channels()
        sum(x.square().mean() for x in out).backward()
    assert all(p.grad is not None for p in swin.parameters())
    classifier = nn.Flatten()
    classifier.output_fmt = "NHWC"
    assert pyramid_maps(classifier, images).shape == (2, 3 * 64 * 96), "no list of maps"


def test_the_teacher_is_asked_in_eval_mode_and_given_back() -> None:
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    teacher[0].bias.requires_grad_(False)
    teacher[2].eval()
    state, images = copy.deepcopy(teacher.state_dict()), torch.rand(2, 3, 6, 6, requires_grad=True)
    first, second = teacher_features(teacher, images), teacher_features(teacher, images)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert [layer.training for layer in teacher] == [True, True, False]
    assert [p.requires_grad for p in teacher.parameters()] == [True, False, True, True]
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    with pytest.raises(TypeError, match="teacher: expected an nn.Module, got function"):
        teacher_features(lambda x: x, images)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("norm: expected", lambda: AttentionBasedFusion(3, 6, 4, norm="layer")),
        ("x: expected shape", lambda: AttentionBasedFusion(3, 6, 4)(torch.ones(2, 4, 3, 3))),
        ("residual: expected the map of the deeper", lambda: AttentionBasedFusion(3, 6, 4)(torch.ones(2, 3, 3, 3))),
        (
            "residual: expected None",
            lambda: AttentionBasedFusion(3, 6, 4, fuse=False)(torch.ones(2, 3, 3, 3), torch.ones(2, 6, 3, 3)),
        ),
        (
            "residual: expected shape",
            lambda: AttentionBasedFusion(3, 6, 4)(torch.ones(2, 3, 3, 3), torch.ones(2, 5, 3, 3)),
        ),
        ("in_channels, out_channels: expected as many", lambda: ReviewDistiller([3], [4, 5])),
        ("in_channels, out_channels: expected as many", lambda: ReviewDistiller([], [])),
        ("features: expected 1 maps, got 2", lambda: ReviewDistiller([3], [4])([torch.ones(2, 3, 3, 3)] * 2)),
        (r"features\[0\]: expected shape", lambda: ReviewDistiller([3], [4])([torch.ones(3, 3, 3)])),
        ("out_sizes: expected 1 sizes", lambda: ReviewDistiller([3], [4])([torch.ones(2, 3, 3, 3)], [])),
    ],
)
def test_the_wrong_argument_is_named(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()
