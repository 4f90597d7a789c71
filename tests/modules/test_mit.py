import pytest
import torch

from wsss_modules import EfficientSelfAttention, MixTransformer


def small(**options) -> MixTransformer:
    return MixTransformer((8, 16, 24, 32), (1, 1, 2, 2), num_heads=(1, 2, 3, 4), **options)


@pytest.mark.parametrize("size", [(64, 64), (33, 50), (16, 16), (1, 1)])
def test_strides_are_those_of_afa_for_any_size(size: tuple[int, int]) -> None:
    out = (
        small().eval()(torch.rand(2, 3, *size))
        if min(size) >= 32
        else small(sr_ratios=(1,) * 4)(torch.rand(2, 3, *size))
    )
    for features, channels, stride in zip(out.features, (8, 16, 24, 32), (4, 8, 16, 16), strict=True):
        assert features.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))
    cells = out.grid[0] * out.grid[1]
    assert [a.shape for a in out.attentions] == [(2, 4, cells, cells)] * 2
    assert out.features[-1].shape[2:] == out.grid


@pytest.mark.parametrize("sr_ratio", [1, 2])
def test_attention_is_the_same_with_and_without_export(sr_ratio: int) -> None:
    layer, tokens = EfficientSelfAttention(12, 3, sr_ratio), torch.randn(2, 20, 12)
    plain, nothing = layer(tokens, (4, 5))
    mixed, logits = layer(tokens, (4, 5), return_logits=True)
    torch.testing.assert_close(mixed, plain)
    assert nothing is None
    assert logits.shape == (2, 3, (4 // sr_ratio) * (5 // sr_ratio), (4 // sr_ratio) * (5 // sr_ratio))


def test_exported_logits_are_neither_scaled_nor_normalised() -> None:
    layer, tokens = EfficientSelfAttention(6, 2), torch.randn(1, 4, 6)
    logits = layer(tokens, (2, 2), return_logits=True)[1]
    query, key = layer.q(tokens).view(1, 4, 2, 3), layer.kv(tokens)[..., :6].view(1, 4, 2, 3)
    torch.testing.assert_close(logits, torch.einsum("bqhd,bkhd->bhqk", query, key))


@pytest.mark.parametrize("size", [(4, 6), (5, 7)], ids=str)
def test_reduced_attention_is_exported_over_the_mean_of_its_queries(size: tuple[int, int]) -> None:
    layer, (height, width) = EfficientSelfAttention(6, 2, 2), size
    tokens = torch.randn(1, height * width, 6)
    logits = layer(tokens, size, return_logits=True)[1]
    kept = (height // 2 * 2, width // 2 * 2)
    grid = tokens.mT.view(1, 6, *size)
    fewer = torch.nn.functional.conv2d(grid, layer.sr.weight, layer.sr.bias, stride=2)
    keys = layer.kv(layer.norm(fewer.flatten(2).mT))[..., :6].view(1, -1, 2, 3)
    queries = layer.q(tokens).view(1, height, width, 2, 3)[:, : kept[0], : kept[1]]
    every = torch.einsum("byxhd,bkhd->bhyxk", queries, keys)
    means = every.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))  # over the 2 x 2 queries of a key
    torch.testing.assert_close(logits, means.flatten(2, 3))
    assert logits.shape[2] == logits.shape[3]


def test_query_key_reads_the_same_logits_off_a_block() -> None:
    from wsss_modules import query_key

    net, tokens = small(), torch.randn(1, 6, 32)
    block = net.block4[-1]
    query, key = query_key(block, tokens)
    torch.testing.assert_close(query @ key.mT, block(tokens, (2, 3), True)[1])


def test_only_the_last_blocks_are_exported() -> None:
    assert len(small(export=1)(torch.rand(1, 3, 32, 32)).attentions) == 1
    assert small(export=0)(torch.rand(1, 3, 32, 32)).attentions == ()


def test_dropped_paths_keep_images_whole() -> None:
    net, images = small(drop_path=0.9).train(), torch.rand(4, 3, 32, 32)
    torch.manual_seed(0)
    assert not torch.equal(net(images).features[-1], net(images).features[-1])
    net.eval()
    assert torch.equal(net(images).features[-1], net(images).features[-1])


@pytest.mark.parametrize("prefix", ["", "module.encoder.", "encoder."])
def test_released_checkpoints_load(prefix: str) -> None:
    source, target = small(), small()
    state = {prefix + key: value for key, value in source.state_dict().items()}
    target.load_released_state_dict({**state, prefix + "head.weight": torch.zeros(2)})
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())
    del state[f"{prefix}block3.1.mlp.dwconv.dwconv.weight"]
    with pytest.raises(RuntimeError, match="dwconv"):
        target.load_released_state_dict(state)


@pytest.mark.peer
def test_features_are_those_of_another_library() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    peer = smp.encoders.get_encoder("mit_b0", weights=None).eval()
    ours = MixTransformer((32, 64, 160, 256), num_heads=(1, 2, 5, 8), strides=(4, 2, 2, 2)).eval()
    ours.load_released_state_dict(peer.state_dict())
    images = torch.rand(1, 3, 64, 96)
    for mine, theirs in zip(ours(images).features, peer(images)[-4:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_mit_compiles() -> None:
    net, images = small().eval(), torch.rand(1, 3, 32, 48)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")(images)
    torch.testing.assert_close(compiled.features, net(images).features)
    torch.testing.assert_close(compiled.attentions, net(images).attentions)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EfficientSelfAttention(10, 4), "dim, num_heads, sr_ratio: expected at least 1, dim a multiple"),
        (
            lambda: EfficientSelfAttention(8, 2)(torch.rand(1, 5, 8), (2, 2)),
            r"tokens: expected shape \(\*, 4, 8\) for a 2 x 2 grid",
        ),
        (lambda: MixTransformer((8, 16, 24)), "embed_dims: expected one number for each of 4 stages"),
        (lambda: small(export=3), "export: expected 0 to 2 blocks of the last stage, got 3"),
        (lambda: small()(torch.rand(1, 1, 32, 32)), r"images: expected shape \(\*, 3, \*, \*\)"),
    ],
)
def test_messages(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
