"""EDAM: class masks put out by the network, and attention over the images of a group under each of them."""

from wsss_modules.class_masks.attention import (
    CollaborativeMultiAttention,
    EDAMHead,
    EDAMOutput,
    ImagePositionEmbedding,
    PreNormTransformerBlock,
)
from wsss_modules.class_masks.groups import SharedClassPairs, draw_shared_class_pairs, sample_class_keys
from wsss_modules.class_masks.masks import (
    DiscriminativeActivationLayer,
    class_specific_features,
    discriminative_activation,
)

__all__ = [
    "CollaborativeMultiAttention",
    "DiscriminativeActivationLayer",
    "EDAMHead",
    "EDAMOutput",
    "ImagePositionEmbedding",
    "PreNormTransformerBlock",
    "SharedClassPairs",
    "class_specific_features",
    "discriminative_activation",
    "draw_shared_class_pairs",
    "sample_class_keys",
]
