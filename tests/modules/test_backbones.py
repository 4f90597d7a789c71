import pytest
import torch
from torch import nn

from wsss_modules import ResNet38


def narrow(**options) -> ResNet38:
    return ResNet38(width_div=32, **options)


@pytest.mark.parametrize("size", [(40, 33), (64, 64), (1, 1), (9, 7)])
def test_resnet38_has_stride_8_for_any_size(size: tuple[int, int]) -> None:
    out = narrow().eval()(torch.randn(2, 3, *size))
    cells = (-(-size[0] // 8), -(-size[1] // 8))
    assert [tuple(x.shape) for x in out] == [(2, c, *cells) for c in narrow().channels]
    assert all(bool((x >= 0).all()) for x in out)


def test_resnet38_at_full_width_has_the_published_layers() -> None:
    with torch.device("meta"):
        net = ResNet38()
    assert net.channels == (512, 1024, 4096)
    plain = [(64, 128, 128), *[(128, 128, 128)] * 2, (128, 256, 256), *[(256, 256, 256)] * 2, (256, 512, 512)]
    plain += [*[(512, 512, 512)] * 5, (512, 512, 1024), *[(1024, 512, 1024)] * 2]
    weights = 9 * 3 * 64 + sum(9 * (i * m + m * o) + (i != o) * i * o for i, m, o in plain)
    weights += sum(i * o // 4 + 9 * (o // 4) * (o // 2) + o // 2 * o + i * o for i, o in [(1024, 2048), (2048, 4096)])
    assert sum(p.numel() for p in net.parameters() if p.ndim == 4) == weights
    dilations = {name: module.dilation[0] for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    assert dilations["b5.conv_branch2a"] == 1
    assert dilations["b5.conv_branch2b1"] == dilations["b5_1.conv_branch2a"] == dilations["b5_2.conv_branch2b1"] == 2
    assert dilations["b6.conv_branch2b1"] == dilations["b7.conv_branch2b1"] == 4
    assert net.b6.dropout.p == 0.3
    assert net.b7.dropout.p == 0.5


def test_resnet38_features_are_the_activated_inputs_of_the_next_stage() -> None:
    net = narrow().eval()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
    inputs = {}
    for name in ("b5", "b6", "bn7"):
        getattr(net, name).register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].clone()}))
    out = net(torch.randn(1, 3, 24, 24))
    torch.testing.assert_close(out.conv4, net.b5.bn_branch2a(inputs["b5"]).relu())
    torch.testing.assert_close(out.conv5, net.b6.bn_branch2a(inputs["b6"]).relu())
    torch.testing.assert_close(out.conv6, net.bn7(inputs["bn7"]).relu())


def test_frozen_batch_norms_stay_frozen_through_train() -> None:
    net = narrow()
    assert net.train() is net
    before = {key: value.clone() for key, value in net.state_dict().items()}
    sum(x.sum() for x in net(torch.randn(2, 3, 32, 32))).backward()
    assert net.b6.dropout.training
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    for name, parameter in net.named_parameters():
        fixed = "bn" in name or name.startswith("conv1a")
        assert (parameter.grad is None) == fixed == (not parameter.requires_grad), name


def test_batch_norms_may_be_trained() -> None:
    net = narrow(frozen_batch_norm=False, frozen=())
    net(torch.randn(2, 3, 32, 32))
    assert bool(net.bn7.running_mean.any())
    assert all(p.requires_grad for p in net.parameters())
    assert not net.eval().bn7.training


def test_named_stages_are_frozen() -> None:
    net = narrow(frozen=("conv1a", "b2", "b2_1", "b2_2"))
    trained = {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad}
    assert trained.isdisjoint({"conv1a", "b2", "b2_1", "b2_2"})
    assert {"b3", "b7"} <= trained


@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_checkpoints_load(prefix: str) -> None:
    source, target = narrow(), narrow()
    state = {prefix + key: value for key, value in source.state_dict().items() if "num_batches_tracked" not in key}
    target.load_released_state_dict({**state, prefix + "fc8.weight": torch.zeros(20, 4096, 1, 1)})
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())
    del state[prefix + "b4_3.conv_branch2a.weight"]
    with pytest.raises(RuntimeError, match=r"b4_3\.conv_branch2a\.weight"):
        target.load_released_state_dict(state)


def test_the_input_is_not_changed() -> None:
    image = torch.randn(1, 3, 16, 16)
    before = image.clone()
    narrow()(image)
    assert torch.equal(image, before)


def test_resnet38_without_its_last_relu_gives_signed_features() -> None:
    net, image = narrow(final_relu=False).eval(), torch.rand(1, 3, 33, 40)
    signed = net(image)
    net.final_relu = True
    active = net(image)
    assert (signed.conv6 < 0).any()
    assert torch.equal(signed.conv6.relu(), active.conv6)
    assert torch.equal(signed.conv5, active.conv5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_resnet38_in_other_precisions(dtype: torch.dtype) -> None:
    assert narrow().to(dtype).eval()(torch.randn(1, 3, 16, 16, dtype=dtype)).conv6.dtype == dtype


def test_resnet38_compiles() -> None:
    net, image = narrow().eval(), torch.randn(1, 3, 24, 17)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")(image)
    for got, expected in zip(compiled, net(image), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ResNet38(128), r"width_div: expected 1 to 64"),
        (lambda: narrow(frozen=("b9",)), r"frozen: expected names out of .* got 'b9'"),
        (lambda: narrow()(torch.rand(1, 4, 8, 8)), r"image: expected shape \(\*, 3, \*, \*\)"),
    ],
    ids=["width_div", "frozen", "image"],
)
def test_resnet38_messages(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
