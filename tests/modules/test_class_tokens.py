from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from tests.modules import reference_class_tokens as reference
from wsss_losses import mctformer_loss
from wsss_modules import (
    AttentionSums,
    ClassTokenPool,
    GlobalWeightedRankPool,
    MixTransformer,
    MultiClassTokenViT,
    PatchCAMHead,
    TokenEncoder,
    TransformerBlock,
    class_to_patch_attention,
    expand_class_token_checkpoint,
    fuse_attention_cam,
    global_weighted_rank_pool,
    multi_scale_cam,
    normalize_cam,
    patch_to_patch_attention,
    refine_with_patch_affinity,
    token_encoder_from_vit,
)


def network(
    classes: int = 3, variant: str = "v2", *, more: int = 0, depth: int = 4, seed: int = 0
) -> MultiClassTokenViT:
    torch.manual_seed(seed)
    blocks = [TransformerBlock(12, 3, 2.0) for _ in range(depth)]
    encoder = TokenEncoder(
        nn.Conv2d(3, 12, 8, stride=8), blocks, 12, num_prefix=classes + more, grid=(4, 4), pos_offset=0.1
    )
    for block in blocks:  # attention far from uniform
        nn.init.normal_(block.attn.qkv.weight, std=0.5)
    return MultiClassTokenViT(encoder, classes, variant).eval()


def attention(layers: int = 3, tokens: int = 7, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layers, 2, 2, tokens, tokens, generator=generator, dtype=torch.float64).softmax(-1)


# attention


@given(st.integers(0, 9), st.integers(1, 3), st.integers(1, 5))
def test_sum_over_blocks_is_their_number_times_the_mean(seed: int, classes: int, n_layers: int) -> None:
    a = attention(seed=seed)
    total, mean = (class_to_patch_attention(a, classes, n_layers, reduce=r) for r in ("sum", "mean"))
    torch.testing.assert_close(total, min(n_layers, 3) * mean)
    torch.testing.assert_close(total, reference.class_maps(a, classes, n_layers))
    rows = patch_to_patch_attention(a, classes, reduce="none").sum(-1)
    torch.testing.assert_close(a.sum(-1), torch.ones_like(a[..., 0]))
    assert (rows < 1).all()


@pytest.mark.parametrize("size", [(32, 32), (24, 41)])
@pytest.mark.parametrize("more", [0, 2])
def test_running_sums_equal_the_stack(size: tuple[int, int], more: int) -> None:
    net, images = network(more=more), torch.randn(2, 3, *size)
    inputs: list[Tensor] = []
    net.encoder(images, visit=lambda layer, block, tokens: inputs.append(tokens))
    last, stack = reference.run_and_stack(net.encoder.blocks, inputs[0])
    torch.testing.assert_close(net.encoder(images).patches, last[:, 3 + more :], rtol=1e-5, atol=1e-5)
    for n_layers in (1, 3, 9):
        sums = AttentionSums(4, 3, n_layers=n_layers, num_prefix=3 + more)
        with torch.no_grad():
            net.encoder(images, visit=sums)
        expected = class_to_patch_attention(stack, 3, n_layers, num_prefix=3 + more)
        torch.testing.assert_close(sums.class_to_patch, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sums.patch_to_patch, patch_to_patch_attention(stack, 3 + more), rtol=1e-5, atol=1e-6)


def test_running_sums_pass_gradients_and_leave_the_output_as_it_is() -> None:
    net, images = network(), torch.randn(1, 3, 16, 24)
    sums = AttentionSums(4, 3)
    out = net(images, visit=sums)
    torch.testing.assert_close(out.class_logits, net(images).class_logits, rtol=0, atol=0)
    (sums.class_to_patch.square().sum() + sums.patch_to_patch.square().sum()).backward()
    grads = [block.attn.qkv.weight.grad for block in net.encoder.blocks]
    assert all(grad[:24].any() for grad in grads)
    assert not grads[-1][24:].any()  # what the last block attends to is not asked for


def test_sums_of_half_precision_are_float32() -> None:
    net, images = network().half(), torch.randn(1, 3, 16, 16).half()
    sums = AttentionSums(4, 3)
    with torch.no_grad():
        net.encoder(images, visit=sums)
    assert sums.class_to_patch.dtype == sums.patch_to_patch.dtype == torch.float32


def test_affinity_is_left_out_if_it_is_not_wanted() -> None:
    net, sums = network(), AttentionSums(4, 3, affinity=False)
    net.encoder(torch.randn(1, 3, 16, 16), visit=sums)
    assert sums.patch_to_patch is None
    assert sums.class_to_patch.shape == (1, 3, 4)


def test_attention_messages() -> None:
    a = attention()
    with pytest.raises(ValueError, match="attention: expected at least one block, got none"):
        class_to_patch_attention([], 2)
    with pytest.raises(ValueError, match="num_classes, num_prefix: expected class tokens, then patches among 7 tokens"):
        class_to_patch_attention(a, 7)
    with pytest.raises(ValueError, match="with as many rows as columns"):
        patch_to_patch_attention(a[..., :5], 2)
    with pytest.raises(ValueError, match=r'n_layers, reduce: expected .* got 0 and "?\'sum\''):
        class_to_patch_attention(a, 2, 0)
    with pytest.raises(ValueError, match='reduce: expected "sum", "mean" or "none"'):
        patch_to_patch_attention(a, 2, reduce="max")
    with pytest.raises(ValueError, match="depth, n_layers, num_class_tokens, num_prefix: expected"):
        AttentionSums(4, 3, num_prefix=2)


# fusion and refinement


def test_fusion_modes() -> None:
    a, cam = torch.rand(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    assert torch.equal(fuse_attention_cam(a, cam), a * cam.relu())
    assert torch.equal(fuse_attention_cam(a, cam, "patchcam"), cam.relu())
    assert torch.equal(fuse_attention_cam(a, None, "mct"), a)
    torch.testing.assert_close(fuse_attention_cam(a, cam, root=True), (a * cam.relu()).sqrt())
    with pytest.raises(ValueError, match='mode: expected "fused", "patchcam" or "mct", got \'fuse\''):
        fuse_attention_cam(a, cam, "fuse")
    with pytest.raises(ValueError, match="cam: expected maps of the patches for mode 'fused', got None"):
        fuse_attention_cam(a, None)
    with pytest.raises(ValueError, match="cam: expected shape"):
        fuse_attention_cam(a, cam[..., :2])


def test_root_has_a_finite_gradient_at_zero() -> None:
    cam = torch.tensor([[[[-1.0, 0.0, 4.0]]]], requires_grad=True)
    fuse_attention_cam(torch.ones(1, 1, 1, 3), cam, root=True).sum().backward()
    assert torch.equal(cam.grad, torch.tensor([[[[0.0, 0.0, 0.25]]]]))


@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 3))
def test_refinement_equals_the_loop_is_linear_and_commutes_with_selection(seed: int, classes: int, rows: int) -> None:
    torch.manual_seed(seed)
    first, second = torch.rand(2, 2, classes, rows, 3, dtype=torch.float64)
    layers = attention(tokens=1 + 3 * rows, seed=seed).mean(2)[..., 1:, 1:]
    refined = refine_with_patch_affinity(first, layers)
    torch.testing.assert_close(refined, reference.refine_by_class(first, layers))
    torch.testing.assert_close(refined, refine_with_patch_affinity(first, layers.sum(0)))
    assert (refined >= 0).all()
    both = refine_with_patch_affinity(2 * first - second, layers)
    torch.testing.assert_close(both, 2 * refined - refine_with_patch_affinity(second, layers))
    torch.testing.assert_close(refine_with_patch_affinity(first[:, :1], layers), refined[:, :1])


def test_identity_attention_multiplies_by_the_number_of_blocks() -> None:
    cam = torch.rand(1, 2, 2, 3)
    torch.testing.assert_close(refine_with_patch_affinity(cam, torch.eye(6).expand(5, 1, 6, 6)), 5 * cam)


def test_refinement_in_half_precision_without_classes_and_its_messages() -> None:
    cam, affinity = torch.rand(1, 2, 20, 20).half(), torch.rand(1, 400, 400).half()
    refined = refine_with_patch_affinity(cam, affinity)
    assert refined.dtype == torch.float16
    torch.testing.assert_close(
        refined.double(), refine_with_patch_affinity(cam.double(), affinity.double()), rtol=2**-10, atol=0
    )
    assert refine_with_patch_affinity(cam[:, :0], affinity).shape == (1, 0, 20, 20)
    with pytest.raises(ValueError, match=r"patch_attention: expected shape \(1, 400, 400\) \(B, N, N\), to match cam"):
        refine_with_patch_affinity(cam, affinity[:, 1:])
    with pytest.raises(TypeError, match="patch_attention: expected a floating-point tensor"):
        refine_with_patch_affinity(cam, affinity.long())
    compiled = torch.compile(refine_with_patch_affinity, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(cam, affinity), refined)


# seeds: the spec's order, from pieces that the library has


def seeds(maps: list[Tensor], affinity: list[Tensor], labels: Tensor, size: tuple[int, int]) -> dict[int, Tensor]:
    refined = [refine_with_patch_affinity(cam, a) for cam, a in zip(maps, affinity, strict=True)]
    mirrored = [i % 2 == 1 for i in range(len(maps))]
    out = multi_scale_cam(refined, labels[None], size, mirrored=mirrored, eps=1e-8, subtract_min=True)
    return dict(zip(out.keys.tolist(), out.cam, strict=True))


@given(st.integers(0, 5))
def test_seeds_equal_the_form_that_enlarges_all_classes(seed: int) -> None:
    torch.manual_seed(seed)
    grids = [(3, 4), (3, 4), (2, 3), (2, 3)]
    maps = [torch.rand(1, 4, *grid, dtype=torch.float64) for grid in grids]
    affinity = [torch.rand(2, 1, h * w, h * w, dtype=torch.float64) for h, w in grids]
    labels = torch.tensor([1.0, 0, 0, 1])
    ours = seeds(maps, affinity, labels, (25, 33))
    expected = reference.seeds_of_all_classes(maps, affinity, labels, (25, 33))
    assert ours.keys() == expected.keys() == {1, 4}
    for key, seed_map in ours.items():
        torch.testing.assert_close(seed_map, expected[key])
        assert seed_map.min() == 0
        assert seed_map.max() <= 1
    order = [2, 3, 0, 1]  # merging order does not matter
    again = seeds([maps[i] for i in order], [affinity[i] for i in order], labels, (25, 33))
    torch.testing.assert_close(again, ours)
    # plain and mirrored views exchanged: the mirror image
    order = [1, 0, 3, 2]
    swapped = seeds([maps[i] for i in order], [affinity[i] for i in order], labels, (25, 33))
    torch.testing.assert_close(swapped, {key: seed_map.flip(-1) for key, seed_map in ours.items()})


def test_min_max_normalisation_of_seeds() -> None:
    cam = torch.randn(3, 5, 6, dtype=torch.float64)
    base = normalize_cam(cam, 1e-8, subtract_min=True)
    assert base.amin() == 0
    assert base.amax() <= 1
    torch.testing.assert_close(normalize_cam(3 * cam + 2, 1e-8, subtract_min=True), base)  # off by eps / range
    assert not normalize_cam(torch.full((1, 4, 4), 7.0), 1e-8, subtract_min=True).any()
    assert not normalize_cam(torch.full((1, 1, 1), 7.0), 1e-8, subtract_min=True).any()


# pooling


@given(st.integers(0, 9), st.sampled_from([0.0, 0.5, 0.996, 1.0]))
def test_rank_pooling_equals_the_sorted_loop(seed: int, decay: float) -> None:
    torch.manual_seed(seed)
    maps = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    pooled = global_weighted_rank_pool(maps, decay=decay)
    torch.testing.assert_close(pooled, reference.rank_pool(maps, decay))
    order = torch.randperm(20)
    torch.testing.assert_close(global_weighted_rank_pool(maps.flatten(2)[..., order], decay=decay), pooled)


def test_rank_pooling_lies_between_mean_and_maximum() -> None:
    maps = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(global_weighted_rank_pool(maps, decay=1), maps.mean((2, 3)))
    assert torch.equal(global_weighted_rank_pool(maps, decay=0), maps.amax((2, 3)))
    torch.testing.assert_close(global_weighted_rank_pool(maps, decay=1e-12), maps.amax((2, 3)))
    between = GlobalWeightedRankPool(0.9)(maps)
    assert (between > maps.mean((2, 3))).all()
    assert (between < maps.amax((2, 3))).all()
    assert gradcheck(global_weighted_rank_pool, maps)
    half = global_weighted_rank_pool(maps.detach().half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(
        half.double(), global_weighted_rank_pool(maps.detach().half().double()), rtol=2**-10, atol=1e-4
    )
    compiled = torch.compile(global_weighted_rank_pool, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(maps), global_weighted_rank_pool(maps))


def test_rank_pooling_messages() -> None:
    with pytest.raises(ValueError, match="decay: expected a number in"):
        global_weighted_rank_pool(torch.zeros(1, 1, 3), decay=1.5)
    with pytest.raises(ValueError, match="maps: expected shape"):
        global_weighted_rank_pool(torch.zeros(1, 1, 0))
    with pytest.raises(TypeError, match="maps: expected a floating-point tensor"):
        global_weighted_rank_pool(torch.zeros(1, 1, 2, dtype=torch.int64))


# the network


@pytest.mark.parametrize("variant", ["v1", "v2", "plus"])
def test_permuted_classes_permute_everything_and_leave_the_loss(variant: str) -> None:
    net, order = network(variant=variant).double(), [2, 0, 1]
    permuted = network(variant=variant).double()
    permuted.load_state_dict(net.state_dict())
    with torch.no_grad():
        permuted.encoder.prefix[:] = net.encoder.prefix[:, order]
        permuted.encoder.pos_embed[:, :3] = net.encoder.pos_embed[:, order]
        if net.head is not None:
            permuted.head.conv.weight[:] = net.head.conv.weight[order]
            permuted.head.conv.bias[:] = net.head.conv.bias[order]
    images = torch.randn(2, 3, 24, 32, dtype=torch.float64)
    labels = torch.tensor([[1, 0, 1], [0, 0, 0]])
    results = [model.localize(images) for model in (net, permuted)]
    torch.testing.assert_close(results[1].cam, results[0].cam[:, order])
    torch.testing.assert_close(results[1].affinity, results[0].affinity)
    losses = []
    for result, y in zip(results, (labels, labels[:, order]), strict=True):
        out = result.output
        tokens = out.class_tokens if variant == "plus" else None
        losses.append(mctformer_loss(out.class_logits, out.patch_logits, tokens, y).total)
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("variant", ["v1", "v2", "plus"])
def test_every_parameter_learns(variant: str) -> None:
    net = network(variant=variant).train()
    out = net(torch.randn(2, 3, 24, 32))
    tokens = out.class_tokens if variant == "plus" else None
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    mctformer_loss(out.class_logits, out.patch_logits, tokens, labels).total.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert out.class_tokens.shape == ((4, 2, 3, 12) if variant == "plus" else (2, 3, 12))


def test_scores_are_means_of_own_channels_and_of_the_signed_map() -> None:
    net = network()
    out = net(torch.randn(2, 3, 24, 32))
    torch.testing.assert_close(out.class_logits, out.class_tokens.mean(2))
    torch.testing.assert_close(out.patch_logits, out.cam.mean((2, 3)))
    torch.testing.assert_close(out.logits, (out.class_logits + out.patch_logits) / 2)
    assert network(variant="v1")(torch.randn(1, 3, 16, 16)).cam is None
    assert ClassTokenPool()(torch.ones(1, 2, 4).half()).dtype == torch.float16


class MiTPatches(nn.Module):
    """The last stage of a Mix Transformer as patches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MixTransformer((8, 16, 24, 32), (1, 1, 1, 1), num_heads=(1, 2, 3, 4), export=0)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).features[-1]


def encoder_on(kind: str) -> TokenEncoder:
    if kind == "vit":
        timm = pytest.importorskip("timm")
        return token_encoder_from_vit(timm.create_model("vit_tiny_patch16_224", depth=2), 3, final_norm=False)
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Conv2d(8, 32, 4, stride=4))
    patches = MiTPatches() if kind == "mit" else convolutions
    return TokenEncoder(patches, [TransformerBlock(32, 4) for _ in range(2)], 32, num_prefix=3, grid=(4, 4))


@pytest.mark.parametrize("variant", ["v1", "v2", "plus"])
@pytest.mark.parametrize("kind", ["vit", "mit", "convolutions"])
def test_class_tokens_read_any_backbone_on_grids_that_are_not_square(kind: str, variant: str) -> None:
    net, images = MultiClassTokenViT(encoder_on(kind), 3, variant), torch.randn(2, 3, 48, 80)
    found = net.localize(images)
    assert found.cam.shape == (2, 3, 3, 5)
    assert found.affinity.shape == (2, 15, 15)
    assert refine_with_patch_affinity(found.cam, found.affinity).shape == found.cam.shape
    out = found.output
    labels, tokens = torch.tensor([[1, 0, 1], [0, 1, 0]]), out.class_tokens if variant == "plus" else None
    mctformer_loss(out.class_logits, out.patch_logits, tokens, labels).total.backward()
    assert all(parameter.grad.any() for parameter in net.encoder.patch_embed.parameters())


@pytest.mark.parametrize(("variant", "modes"), [("v1", ["mct"]), ("v2", ["fused", "patchcam", "mct"])])
def test_a_network_can_be_read_in_all_its_modes(variant: str, modes: list[str]) -> None:
    net, images = network(variant=variant), torch.randn(1, 3, 24, 16)
    with torch.no_grad():
        default = net.localize(images)
        for mode in modes:
            assert (net.localize(images, mode).cam >= 0).all()
        assert torch.equal(default.cam, net.localize(images, modes[0]).cam)
    if variant == "v1":
        with pytest.raises(ValueError, match="cam: expected maps of the patches for mode 'fused'"):
            net.localize(images, "fused")


def test_plus_takes_the_mean_and_the_root() -> None:
    net, images = network(variant="plus"), torch.randn(1, 3, 24, 16)
    with torch.no_grad():
        mct, patch, fused = (net.localize(images, mode).cam for mode in ("mct", "patchcam", "fused"))
    torch.testing.assert_close(fused, (mct * patch).sqrt())
    sums = AttentionSums(4, 3)
    net.encoder(images, visit=sums)
    torch.testing.assert_close(mct.flatten(2), sums.class_to_patch / 3)


def test_no_hook_or_state_is_left_on_the_network() -> None:
    net, images = network(), torch.randn(1, 3, 16, 16)
    before = {name: dict(module.__dict__) for name, module in net.named_modules()}
    with torch.no_grad():
        net.localize(images)
    for name, module in net.named_modules():
        assert {k: v for k, v in module.__dict__.items() if k != "_buffers"}.keys() == {
            k for k in before[name] if k != "_buffers"
        }
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_network_compiles_to_one_graph() -> None:
    net, images = network(), torch.randn(1, 3, 16, 16)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).class_logits, net(images).class_logits)


def test_network_messages() -> None:
    encoder = network().encoder
    with pytest.raises(ValueError, match='variant: expected "v1", "v2" or "plus", got \'v3\''):
        MultiClassTokenViT(encoder, 3, "v3")
    with pytest.raises(ValueError, match="num_classes: expected 1 to 3, the tokens before the patches, got 4"):
        MultiClassTokenViT(encoder, 4)
    with pytest.raises(ValueError, match="n_layers: expected at least 1, got 0"):
        MultiClassTokenViT(encoder, 3, n_layers=0)
    with pytest.raises(ValueError, match="tokens: expected 0 \\+ 2 x 2 = 4 tokens"):
        PatchCAMHead(12, 3)(torch.zeros(1, 5, 12), (2, 2))


# checkpoints


def checkpoint(tokens: int = 1, rows: int = 16, **others: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    extra = {name: torch.randn(1, count, 12) for name, count in others.items()}
    shape = tokens + rows + sum(others.values())
    head = {"head.weight": torch.randn(1000, 12), "head.bias": torch.randn(1000)}
    return {"cls_token": torch.randn(1, tokens, 12), "pos_embed": torch.randn(1, shape, 12), **extra, **head}


@pytest.mark.parametrize("others", [{}, {"dist_token": 1}, {"reg_token": 4}])
def test_checkpoint_repeats_the_class_token_and_its_position(others: dict[str, int]) -> None:
    state = checkpoint(**others)
    state["blocks.0.norm1.weight"] = torch.ones(12)
    expanded = expand_class_token_checkpoint(state, 5, (4, 4))
    assert expanded.keys() == {"cls_token", "pos_embed", "blocks.0.norm1.weight"}
    assert torch.equal(expanded["cls_token"], state["cls_token"].expand(1, 5, 12))
    assert torch.equal(expanded["pos_embed"][:, :5], state["pos_embed"][:, :1].expand(1, 5, 12))
    assert torch.equal(expanded["pos_embed"][:, 5:], state["pos_embed"][:, 1 + sum(others.values()) :])


def test_checkpoint_of_several_tokens_is_known_by_its_shapes() -> None:
    state = checkpoint(tokens=5)
    expanded = expand_class_token_checkpoint(state, 5, (8, 8), mode="nearest")
    assert torch.equal(expanded["cls_token"], state["cls_token"])
    assert expanded["pos_embed"].shape == (1, 5 + 64, 12)
    with pytest.raises(ValueError, match="cls_token: expected 1 token, or one for each of 4 classes, got 5"):
        expand_class_token_checkpoint(state, 4, (4, 4))
    with pytest.raises(ValueError, match="state: expected the weights of a vision transformer, pos_embed missing"):
        expand_class_token_checkpoint({"cls_token": torch.zeros(1, 1, 2)}, 4, (4, 4))


def test_expanded_checkpoint_loads() -> None:
    net = network(variant="v1")
    names = {"encoder.prefix": None, "encoder.pos_embed": None}
    names |= {
        "encoder.patch_embed.weight": "patch_embed.proj.weight",
        "encoder.patch_embed.bias": "patch_embed.proj.bias",
    }
    state = checkpoint()
    for name, value in net.state_dict().items():
        theirs = names.get(name, name.removeprefix("encoder."))
        if theirs is not None:
            state[theirs] = torch.full_like(value, 0.5)
    state["norm.weight"] = torch.ones(12)
    net.load_released_state_dict(expand_class_token_checkpoint(state, 3, (4, 4)))
    assert (net.encoder.blocks[0].mlp.fc1.weight == 0.5).all()
    assert torch.equal(net.encoder.prefix[:, 2], state["cls_token"][:, 0])
    del state["patch_embed.proj.bias"]
    with pytest.raises(RuntimeError, match=r"state: missing \['encoder.patch_embed.bias'\]"):
        net.load_released_state_dict(expand_class_token_checkpoint(state, 3, (4, 4)))
