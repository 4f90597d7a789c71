from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from wsss_modules import (
    TokenEncoder,
    TransformerBlock,
    attention_probabilities,
    interpolate_pos_embed,
    map_to_tokens,
    patch_grid,
    query_key,
    token_encoder_from_vit,
    tokens_to_map,
)


def small_encoder(num_prefix: int = 2, offset: float = 0.0, **options: object) -> TokenEncoder:
    torch.manual_seed(0)
    blocks = [TransformerBlock(12, 3, 2.0) for _ in range(3)]
    patches = nn.Conv2d(3, 12, 8, stride=8)
    return TokenEncoder(patches, blocks, 12, num_prefix=num_prefix, grid=(4, 4), pos_offset=offset, **options)


# tokens and maps


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 3))
def test_tokens_and_map_are_inverse(height: int, width: int, prefix: int) -> None:
    features = torch.arange(2 * 3 * height * width).view(2, 3, height, width)
    tokens = torch.cat([torch.full((2, prefix, 3), -1), map_to_tokens(features)], 1)
    assert torch.equal(tokens_to_map(tokens, (height, width), prefix), features)


@pytest.mark.parametrize(
    ("count", "grid", "prefix", "message"),
    [
        (197, (14, 14), 0, r"got 197: there is 1 token before the patches; pass num_prefix=1"),
        (198, (14, 14), 1, r"num_prefix=2 \(class and distillation token\)"),
        (201, (14, 14), 1, r"there are 5 tokens before the patches; pass num_prefix=5 \(class token and registers"),
        (216, (14, 14), 1, r"there are 20 tokens .* one token for each class"),
        (196, (14, 14), 1, r"there is no token before the patches; pass num_prefix=0"),
        (577, (14, 14), 1, r"got 577 = 1 \+ 24 x 24; is the grid that of the image"),
        (100, (14, 14), 1, r"got 100 = 0 \+ 10 x 10"),
        (98, (14, 14), 1, r"the grid is \(image height // patch size, image width // patch size\)"),
    ],
)
def test_wrong_count_of_tokens_is_explained(count: int, grid: tuple[int, int], prefix: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens_to_map(torch.zeros(1, count, 2), grid, prefix)


def test_bad_shapes_are_told() -> None:
    with pytest.raises(ValueError, match=r"tokens: expected shape \(B, P \+ N, D\), got \(4, 4\)"):
        tokens_to_map(torch.zeros(4, 4), (2, 2))
    with pytest.raises(ValueError, match="grid, num_prefix: expected"):
        tokens_to_map(torch.zeros(1, 4, 4), (2, 0))
    with pytest.raises(ValueError, match="features: expected shape"):
        map_to_tokens(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="at least one patch of 16 x 16 pixels, got \\(15, 40\\)"):
        patch_grid((15, 40), 16)


# positions


@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from([0.0, 0.1]))
def test_transposed_grid_gives_transposed_positions(height: int, width: int, offset: float) -> None:
    torch.manual_seed(0)
    rows = torch.randn(1, 6, 4, 4)
    prefix = torch.randn(1, 3, 6)
    upright, turned = (torch.cat([prefix, map_to_tokens(r)], 1) for r in (rows, rows.mT))
    ours = interpolate_pos_embed(upright, 3, (height, width), offset=offset, resample_same=True)
    theirs = interpolate_pos_embed(turned, 3, (width, height), offset=offset, resample_same=True)
    torch.testing.assert_close(
        tokens_to_map(ours, (height, width), 3), tokens_to_map(theirs, (width, height), 3).mT, rtol=0, atol=1e-6
    )
    assert torch.equal(ours[:, :3], prefix)


@pytest.mark.parametrize("mode", ["scale", "size", "nearest"])
def test_constant_positions_stay_constant(mode: str) -> None:
    moved = interpolate_pos_embed(torch.full((1, 1 + 9, 2), 0.25), 1, (5, 2), mode=mode)
    torch.testing.assert_close(moved, torch.full((1, 11, 2), 0.25))


def test_positions_of_the_stored_grid_are_left_alone_unless_asked() -> None:
    rows = torch.randn(1, 2 + 16, 3)
    assert interpolate_pos_embed(rows, 2, (4, 4)) is rows
    again = interpolate_pos_embed(rows, 2, (4, 4), resample_same=True)
    assert not torch.allclose(again, rows, atol=1e-3)  # the offset moves the samples
    torch.testing.assert_close(interpolate_pos_embed(rows, 2, (4, 4), offset=0, resample_same=True), rows)


def test_nearest_copies_each_row_over_two_by_two() -> None:
    rows = torch.arange(4.0).view(1, 4, 1)
    doubled = tokens_to_map(interpolate_pos_embed(rows, 0, (4, 4), mode="nearest"), (4, 4))
    assert torch.equal(doubled[0, 0], torch.tensor([[0.0, 1], [2, 3]]).repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_half_precision_positions_are_resampled_in_float32() -> None:
    rows = torch.randn(1, 16, 3).half()
    exact = interpolate_pos_embed(rows.double(), 0, (7, 3))
    moved = interpolate_pos_embed(rows, 0, (7, 3))
    assert moved.dtype == torch.float16
    torch.testing.assert_close(moved.double(), exact, rtol=2**-10, atol=2**-10)


def test_position_messages() -> None:
    with pytest.raises(ValueError, match="a square number of patch rows, got 13 rows; pass source_grid"):
        interpolate_pos_embed(torch.zeros(1, 13, 2), 1, (2, 2))
    with pytest.raises(ValueError, match=r"source_grid: expected 12 patch rows beside 1 of a prefix, got \(3, 3\)"):
        interpolate_pos_embed(torch.zeros(1, 13, 2), 1, (2, 2), source_grid=(3, 3))
    with pytest.raises(ValueError, match="offset: expected a number in"):
        interpolate_pos_embed(torch.zeros(1, 5, 2), 1, (2, 2), offset=1.0)
    with pytest.raises(ValueError, match='mode: expected "scale", "size" or "nearest"'):
        interpolate_pos_embed(torch.zeros(1, 5, 2), 1, (2, 2), mode="bilinear")
    with pytest.raises(ValueError, match="grid: expected"):
        interpolate_pos_embed(torch.zeros(1, 5, 2), 1, (0, 2))
    with pytest.raises(TypeError, match="pos_embed: expected a floating-point tensor"):
        interpolate_pos_embed(torch.zeros(1, 5, 2, dtype=torch.int64), 1, (2, 2))


# blocks and attention


def test_block_is_attention_with_its_queries_and_keys() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(12, 3, 2.0).double()
    nn.init.normal_(block.attn.qkv.bias)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    weights = attention_probabilities(*query_key(block, x))  # (B, J, T, T)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))
    value = block.attn.qkv(block.norm1(x))[..., 24:].unflatten(2, (3, 4)).transpose(1, 2)
    attended = x + block.attn.proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block(x), attended + block.mlp(block.norm2(attended)))


def test_dropped_branches_keep_the_mean() -> None:
    torch.manual_seed(0)
    block, x = TransformerBlock(12, 3, drop_path=0.5), torch.randn(1, 4, 12).expand(4000, -1, -1)
    for layer in (block.attn.proj, block.mlp.fc2):  # the second branch does not see the first
        nn.init.zeros_(layer.weight)
        nn.init.ones_(layer.bias)
    moved = (block.train()(x) - x).mean().item()
    assert moved == pytest.approx(2.0, abs=0.1)  # measured 1.98; standard error of 8000 draws is 0.022
    torch.testing.assert_close(block.eval()(x)[0] - x[0], torch.full((4, 12), 2.0))


def test_queries_and_keys_of_separate_layers() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.sr_ratio = 2, 1
            self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 16)

    block = nn.Module()
    block.norm1, block.attn = nn.LayerNorm(8), Attention()
    x = torch.randn(2, 5, 8)
    query, key = query_key(block, x)
    normed = block.norm1(x)
    torch.testing.assert_close(query.transpose(1, 2).flatten(2), block.attn.q(normed))
    torch.testing.assert_close(key.transpose(1, 2).flatten(2), block.attn.kv(normed)[..., :8])
    block.attn.sr_ratio = 2
    with pytest.raises(TypeError, match="without spatial reduction"):
        query_key(block, x)


class PlainAttention(nn.Module):
    """As timm builds it, with room for more."""

    def __init__(self, **more: object) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(8, 24), nn.Linear(8, 8)
        self.q_norm, self.k_norm, self.norm = nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(8)
        for name, part in more.items():
            setattr(self, name, part)


def block_around(attention: nn.Module, width: int = 8) -> nn.Module:
    block = nn.Module()
    block.norm1, block.attn = nn.LayerNorm(width), attention
    return block


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"relative_position_bias_table": nn.Parameter(torch.zeros(9, 2))}, "relative_position_bias_table"),
        ({"q_bias": nn.Parameter(torch.zeros(8))}, "q_bias"),
        ({"proj_l": nn.Linear(2, 2), "proj_w": nn.Linear(2, 2)}, "proj_l, proj_w"),
        ({"rotate_half": False}, "rotary positions"),
    ],
    ids=["relative positions", "biases apart", "mixed heads", "rotary positions"],
)
def test_attention_that_is_more_than_products_is_refused(more: dict[str, object], named: str) -> None:
    x = torch.randn(2, 5, 8)
    query, _ = query_key(block_around(PlainAttention(gate=nn.Identity())), x)
    assert query.shape == (2, 2, 5, 4)
    with pytest.raises(TypeError, match=f"products of queries and keys alone, got PlainAttention with {named}"):
        query_key(block_around(PlainAttention(**more)), x)


def test_blocks_of_timm_are_told_apart() -> None:
    timm = pytest.importorskip("timm")
    from timm.models.beit import Attention as BEiTAttention
    from timm.models.cait import TalkingHeadAttn
    from timm.models.eva import EvaAttention
    from timm.models.xcit import XCA

    x = torch.randn(1, 5, 12)
    eva = EvaAttention(12, 3, norm_layer=nn.LayerNorm)
    for attention in (BEiTAttention(12, 3, qkv_bias=True), eva, TalkingHeadAttn(12, 3), XCA(12, 3)):
        with pytest.raises(TypeError, match=f"got {type(attention).__name__} with"):
            query_key(block_around(attention, 12), x)
    plain = timm.models.vision_transformer.Attention(12, 3, qk_norm=True, norm_layer=nn.LayerNorm)
    assert query_key(block_around(plain, 12), x).query.shape == (1, 3, 5, 4)


def test_block_messages() -> None:
    with pytest.raises(TypeError, match=r"block: expected norm1 and an attn .* got Linear with attn NoneType"):
        query_key(nn.Linear(3, 3), torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="num_heads: expected a divisor of dim = 12, got 5"):
        TransformerBlock(12, 5)
    with pytest.raises(ValueError, match="drop_path: expected a probability"):
        TransformerBlock(12, 3, drop_path=1.0)
    with pytest.raises(ValueError, match="key: expected shape"):
        attention_probabilities(torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 4, 5))


# the encoder


@pytest.mark.parametrize("size", [(32, 32), (40, 27), (8, 64)])
def test_encoder_takes_images_of_any_shape(size: tuple[int, int]) -> None:
    encoder = small_encoder()
    out = encoder(torch.randn(2, 3, *size), layers=True)
    assert out.grid == patch_grid(size, 8)
    assert out.prefix.shape == (2, 2, 12)
    assert tokens_to_map(out.patches, out.grid).shape == (2, 12, *out.grid)
    assert torch.equal(out.layers[-1], out.prefix)
    assert out.layers.shape == (3, 2, 2, 12)


def test_visit_sees_what_each_block_gets_and_changes_nothing() -> None:
    encoder, images = small_encoder(), torch.randn(1, 3, 16, 24)
    seen = []
    out = encoder(images, visit=lambda layer, block, tokens: seen.append((layer, block, tokens)))
    assert [layer for layer, _, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[1][2], encoder.blocks[0](seen[0][2]))
    torch.testing.assert_close(out, encoder(images), rtol=0, atol=0)


def test_same_grid_of_an_image_that_is_not_square_is_resampled_with_the_offset_only() -> None:
    images = torch.randn(1, 3, 32, 35)  # 4 x 4 patches, as stored
    square = images[..., :32]
    for offset, moves in ((0.0, False), (0.1, True)):
        encoder = small_encoder(offset=offset)
        same = torch.equal(encoder(images).patches, encoder(square).patches)
        assert same is not moves


def test_encoder_compiles_and_trains_all_of_its_parameters() -> None:
    encoder, images = small_encoder(), torch.randn(2, 3, 16, 24)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).patches, encoder(images).patches)
    out = encoder(images)
    (out.prefix.sum() + out.patches.square().sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())


def test_encoder_messages() -> None:
    with pytest.raises(ValueError, match="num_prefix, grid: expected"):
        small_encoder(num_prefix=-1)
    with pytest.raises(ValueError, match=r"size: expected at least one patch of 8 x 8 pixels, got \(16, 7\)"):
        small_encoder()(torch.zeros(1, 3, 16, 7))
    with pytest.raises(ValueError, match=r"images: expected shape \(B, 3, H, W\)"):
        small_encoder()(torch.zeros(3, 16, 16))
    encoder = TokenEncoder(nn.Conv2d(3, 8, 8, stride=8), [], 12, num_prefix=0, grid=(1, 1))
    with pytest.raises(ValueError, match=r"patch_embed\(images\): expected shape \(1, 12, \*, \*\)"):
        encoder(torch.zeros(1, 3, 8, 8))
    with pytest.raises(TypeError, match="vit: expected a plain vision transformer"):
        token_encoder_from_vit(nn.Linear(3, 3))
