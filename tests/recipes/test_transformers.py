from __future__ import annotations

import pytest
import timm
import torch

from recipes.pipeline.transformers import TokenConfig, build_token_trunk
from wsss_modules import attention_probabilities, query_key, token_encoder_from_vit, tokens_to_map

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 64, "num_classes": 0}
KINDS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}),
    "registers apart": ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "norm of queries": ("vit_tiny_patch16_224", {"qk_norm": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_of_a_timm_model_gives_its_features(kind: str) -> None:
    name, options = KINDS[kind]
    torch.manual_seed(0)
    vit = timm.create_model(name, **{**SMALL, **options}).eval()
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    encoder = token_encoder_from_vit(vit).eval()
    images = torch.randn(2, 3, 64, 64)
    out = encoder(images)
    features = vit.forward_features(images)
    torch.testing.assert_close(torch.cat([out.prefix, out.patches], 1), features, rtol=1e-5, atol=1e-5)
    assert encoder.num_prefix == vit.num_prefix_tokens
    assert tokens_to_map(features, out.grid, vit.num_prefix_tokens).shape == (2, 24, 4, 4)
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"no class token"}))
def test_class_tokens_are_added_to_a_timm_model_without_editing_it(kind: str) -> None:
    name, options = KINDS[kind]
    torch.manual_seed(0)
    vit = timm.create_model(name, **{**SMALL, **options}).eval()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vit.modules())
    encoder = token_encoder_from_vit(vit, 20, final_norm=False, pos_offset=0.1).eval()
    weights = []
    images = torch.randn(1, 3, 64, 48)  # not square
    out = encoder(
        images, visit=lambda layer, block, tokens: weights.append(attention_probabilities(*query_key(block, tokens)))
    )
    registers = options.get("reg_tokens", 0)
    assert out.prefix.shape == (1, 20 + registers, 24)
    assert out.grid == (4, 3)
    assert [w.shape for w in weights] == [(1, 3, 32 + registers, 32 + registers)] * 2
    torch.testing.assert_close(out.prefix[:, 0], out.prefix[:, 19])  # all classes start alike
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vit.modules())
    assert vit.forward_features(torch.randn(1, 3, 64, 64)).shape[1] == 16 + vit.num_prefix_tokens


def test_a_model_without_class_token_has_none_to_copy() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL, class_token=False, global_pool="avg")
    with pytest.raises(TypeError, match="vit: expected a class token to copy"):
        token_encoder_from_vit(vit, 5)
    with pytest.raises(ValueError, match="num_class_tokens: expected at least 1"):
        token_encoder_from_vit(vit, 0)


@pytest.mark.parametrize("class_tokens", [None, 3])
def test_hybrid_gives_patches_at_stride_16(class_tokens: int | None) -> None:
    config = TokenConfig(weights="random", dim=48, depth=2, heads=3, grid=4)
    trunk = build_token_trunk(config, class_tokens).train()
    out = trunk(torch.randn(2, 3, 64, 96))
    assert out.grid == (4, 6)
    assert out.patches.shape == (2, 24, 48)
    assert out.prefix.shape == (2, class_tokens or 0, 48)
    assert (trunk.output_stride, trunk.depth, trunk.num_heads, trunk.out_channels) == (16, 2, 3, 48)
    assert trunk.convolutional.body.bn1.training is False
    out.patches.sum().backward()
    assert trunk.encoder.patch_embed.projection.weight.grad is not None
    assert trunk.convolutional.body.conv_stem.weight.grad is None


def test_new_blocks_of_a_hybrid_attend_to_what_looks_alike() -> None:
    torch.manual_seed(0)
    trunk = build_token_trunk(TokenConfig(weights="random", dim=96, depth=1, heads=3, grid=2))
    kinds = torch.randn(2, 96)
    tokens = torch.stack([kinds[0], kinds[1], kinds[0], kinds[1]])[None] + 0.1 * torch.randn(1, 4, 96)
    weights = attention_probabilities(*query_key(trunk.encoder.blocks[0], tokens)).mean(1)[0]
    alike = torch.tensor([0, 1, 0, 1])
    assert weights[alike[:, None] == alike].min() > 0.4
    assert weights[alike[:, None] != alike].max() < 0.1


def test_trunk_of_a_timm_name() -> None:
    trunk = build_token_trunk(TokenConfig(backbone="deit_tiny_patch16_224", weights="random"))
    assert trunk(torch.randn(1, 3, 48, 64)).grid == (3, 4)
    assert trunk.encoder.num_prefix == 1
    assert trunk.convolutional is None
    assert trunk.with_output_stride(16) is trunk
    with pytest.raises(ValueError, match="deit_tiny_patch16_224 has patches of 16 pixels, got 8"):
        trunk.with_output_stride(8)
    with pytest.raises(ValueError, match="backbone: 'deit_teeny' is not a timm model; did you mean"):
        build_token_trunk(TokenConfig(backbone="deit_teeny"))
