"""Backbones that the field uses and timm lacks: ResNet-38d, and MiT with exported attention."""

from wsss_modules.backbones.mit import EfficientSelfAttention, MixTransformer, MixTransformerOutput
from wsss_modules.backbones.resnet38 import ResNet38, ResNet38Features

__all__ = ["EfficientSelfAttention", "MixTransformer", "MixTransformerOutput", "ResNet38", "ResNet38Features"]
