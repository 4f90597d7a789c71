import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from tests.modules.reference_class_masks import looped_attention, looped_head, norm, transform
from wsss_modules import (
    CollaborativeMultiAttention,
    DiscriminativeActivationLayer,
    EDAMHead,
    ImagePositionEmbedding,
    PreNormTransformerBlock,
    class_specific_features,
    discriminative_activation,
    draw_shared_class_pairs,
    sample_class_keys,
)

NORMALIZATIONS = ["l2_abs", "softmax", "sigmoid"]
KEYS = torch.tensor([3, 1, 4])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(layers: int = 1, seed: int = 0, **options: int) -> CollaborativeMultiAttention:
    """Four classes, six channels, two heads; float64, without dropout, all parameters random."""
    torch.manual_seed(seed)
    module = CollaborativeMultiAttention(4, 6, 2, layers, **options).double().eval()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


@given(st.integers(0, 99), st.floats(0.01, 100))
def test_squares_of_masks_sum_to_1_and_sign_and_scale_are_lost(seed: int, factor: float) -> None:
    maps = random(2, 5, 3, 4, seed=seed)
    masks = discriminative_activation(maps)
    assert ((masks >= 0) & (masks <= 1)).all()
    torch.testing.assert_close(masks.square().sum(1), torch.ones(2, 3, 4, dtype=torch.float64))
    torch.testing.assert_close(discriminative_activation(-factor * maps), masks)


def test_other_normalisations() -> None:
    maps = random(2, 5, 3, 4)
    torch.testing.assert_close(discriminative_activation(maps, normalization="softmax"), maps.softmax(1))
    torch.testing.assert_close(discriminative_activation(maps, normalization="sigmoid"), maps.sigmoid())


def test_cell_of_zeros_has_no_mask_and_a_finite_gradient() -> None:
    maps = random(1, 3, 2, 2)
    maps[:, :, 0, 1] = 0
    masks = discriminative_activation(maps.requires_grad_())
    assert not masks[:, :, 0, 1].any()
    (grad,) = torch.autograd.grad(masks.sum(), maps)
    assert grad.isfinite().all()
    assert not grad[:, :, 0, 1].any()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradcheck_of_masks_and_features(normalization: str) -> None:
    assert gradcheck(
        lambda m: discriminative_activation(m, normalization=normalization), random(2, 3, 2, 2).requires_grad_()
    )
    leaves = random(2, 3, 2, 2).requires_grad_(), random(2, 5, 2, 2, seed=1).requires_grad_()
    assert gradcheck(lambda x, s: class_specific_features(x, s, torch.tensor([[4, 1], [2, 4]])), leaves)


def test_masking_before_and_after_a_projection_without_bias_is_the_same() -> None:
    features, scores, weight = random(2, 7, 3, 4), random(2, 5, 3, 4, seed=1).abs(), random(4, 7, 1, 1, seed=2)
    after = class_specific_features(F.conv2d(features, weight), scores, KEYS)
    before = torch.stack([F.conv2d(features * scores[:, k, None], weight) for k in KEYS], 1)
    torch.testing.assert_close(after, before)


def test_each_group_is_seen_through_its_own_classes() -> None:
    features, scores = random(4, 3, 2, 2), random(4, 5, 2, 2, seed=1)
    keys = torch.tensor([[1, 4], [3, 2]])
    seen = class_specific_features(features, scores, keys)
    for g in range(2):
        of_group = slice(2 * g, 2 * g + 2)
        alone = class_specific_features(features[of_group], scores[of_group], keys[g])
        torch.testing.assert_close(seen[of_group], alone)


@pytest.mark.parametrize("images", [1, 2, 4])
@pytest.mark.parametrize("layers", [1, 2])
def test_batched_classes_equal_the_loop_over_classes(images: int, layers: int) -> None:
    module = attention(layers)
    seen = random(2 * images, 3, 6, 3, 4)
    keys = torch.tensor([[3, 1, 4], [2, 4, 1]])
    logits = module(seen, keys)
    for g in range(2):
        one = seen[g * images : (g + 1) * images]
        expected = looped_attention(module, one, keys[g].tolist())
        # the waves are taken in float32 whatever the dtype, as in the released code
        torch.testing.assert_close(logits[g * images : (g + 1) * images], expected, rtol=1e-6, atol=1e-6)


def test_gradients_equal_those_of_the_loop_and_unsampled_classes_have_none() -> None:
    head = EDAMHead(7, 4, 6, dropout=0.0).double()
    features = random(2, 7, 3, 5).requires_grad_()
    wanted = [features, *head.parameters()]
    out = head(features, KEYS)
    ours = torch.autograd.grad(out.logits.square().sum(), wanted)
    released = torch.autograd.grad(looped_head(head, features, KEYS.tolist()).square().sum(), wanted)
    torch.testing.assert_close(ours, released, rtol=1e-5, atol=1e-5)
    names = [name for name, _ in head.attention.named_parameters()]
    for name, grad in zip(names, ours[-len(names) :], strict=True):
        if "segment" not in name:
            assert not grad[1].any(), name  # class 2
            assert grad[2].any(), name


@pytest.mark.parametrize(("heads", "width"), [(1, 6), (2, 6), (3, 6), (2, 8)])
def test_fused_attention_equals_an_explicit_softmax(heads: int, width: int) -> None:
    torch.manual_seed(0)
    block = PreNormTransformerBlock(width, heads, num_blocks=3).double().eval()
    for parameter in block.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x = random(2, 4, 7, width)
    index = torch.tensor([2, 0, 2, 1])
    out = block(x, index)
    for s, e in enumerate(index.tolist()):
        torch.testing.assert_close(out[:, s], transform(block, x[:, s], e))
    single = PreNormTransformerBlock(width, heads).double().eval()
    torch.testing.assert_close(single(x[:, 0]), transform(single, x[:, 0]))


def test_norm_is_layer_norm_with_a_smaller_gain() -> None:
    x, weight, bias = 1e3 * random(3, 5), random(5, seed=1), random(5, seed=2)  # far above both eps
    plain = F.layer_norm(x, (5,), weight, bias)
    torch.testing.assert_close((norm(x, weight, bias) - bias) * math.sqrt(5 / 4), plain - bias, rtol=1e-6, atol=1e-6)


def test_constant_tokens_have_finite_gradients() -> None:
    block = PreNormTransformerBlock(4, 2).double()
    x = torch.ones(1, 3, 4, dtype=torch.float64, requires_grad=True)
    block.eval()(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in block.parameters())
    assert PreNormTransformerBlock(1, 1)(torch.ones(2, 3, 1)).isfinite().all()


def test_gradcheck_of_a_block() -> None:
    torch.manual_seed(0)
    block = PreNormTransformerBlock(4, 2, num_blocks=2).double().eval()
    assert gradcheck(lambda x: block(x, torch.tensor([1, 0])), random(1, 2, 3, 4).requires_grad_())


@given(st.permutations(range(3)))
def test_order_of_classes_permutes_logits(order: list[int]) -> None:
    module, seen = attention(), random(2, 3, 6, 2, 3)
    torch.testing.assert_close(module(seen[:, order], KEYS[order]), module(seen, KEYS)[:, order])


def test_logit_depends_on_its_own_class_only() -> None:
    module, seen = attention(), random(2, 3, 6, 2, 3)
    base = module(seen, KEYS)
    others = seen.clone()
    others[:, 1:] += 1
    torch.testing.assert_close(module(others, KEYS)[:, 0], base[:, 0], rtol=0, atol=0)
    for name, parameter in module.named_parameters():
        if "segment" not in name:
            parameter.data[[0, 1, 3]] += 1  # all classes but 3, the first one of KEYS
    torch.testing.assert_close(module(seen, KEYS)[:, 0], base[:, 0])


def test_swapping_images_with_their_rows_swaps_logits() -> None:
    module, seen = attention(), random(2, 3, 6, 2, 3)
    base = module(seen, KEYS)
    assert not torch.allclose(module(seen.flip(0), KEYS).flip(0), base)
    table = module.embedding.segment.weight
    table.data[:2] = table.data[:2].flip(0)
    torch.testing.assert_close(module(seen.flip(0), KEYS).flip(0), base)


@given(st.permutations(range(6)))
def test_without_embeddings_the_order_of_cells_does_not_matter(order: list[int]) -> None:
    module, seen = attention(), random(2, 3, 6, 2, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(module.embedding), "forward", lambda self, tokens: tokens)
        moved = seen.flatten(3)[..., order].view_as(seen)
        torch.testing.assert_close(module(moved, KEYS), module(seen, KEYS))
    assert order == sorted(order) or not torch.allclose(module(moved, KEYS), module(seen, KEYS))
    block = PreNormTransformerBlock(6, 2).double().eval()
    tokens = random(1, 6, 6)
    torch.testing.assert_close(block(tokens[:, order]), block(tokens)[:, order])


def test_images_of_a_group_support_each_other_and_groups_do_not() -> None:
    module, seen = attention(), random(4, 3, 6, 2, 3)
    keys = KEYS.expand(2, 3)
    base = module(seen, keys)
    changed = seen.clone()
    changed[0] = random(3, 6, 2, 3, seed=1)
    logits = module(changed, keys)
    assert not torch.allclose(logits[1], base[1])
    torch.testing.assert_close(logits[2:], base[2:], rtol=0, atol=0)
    alone = module(seen, KEYS.expand(4, 3))  # groups of one image: no collaboration
    torch.testing.assert_close(alone[0], module(seen[:1], KEYS)[0])


def test_embedding_tells_cells_and_images() -> None:
    embed = ImagePositionEmbedding(6, max_images=3).double().eval()
    tokens = random(2, 3, 4, 5, 6)  # two groups of three images, four classes, five cells
    added = embed(tokens) - tokens
    torch.testing.assert_close(added, added[:1, :, :1].expand_as(added))
    waves = added[0, :, 0] - embed.segment.weight[:, None]
    torch.testing.assert_close(waves, embed.positions(5).expand(3, 5, 6))
    p, i = 3, 1
    angle = p * 10 ** (-8 * i / 6)
    assert waves[0, p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
    assert waves[0, p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert ImagePositionEmbedding(5).positions(4).shape == (4, 5)


def test_checkpoint_serves_another_crop_and_another_number_of_classes_sampled() -> None:
    first, second = EDAMHead(5, 4, 8).eval(), EDAMHead(5, 4, 8).eval()
    second.load_state_dict(first.state_dict())
    for size, keys in (((3, 4), KEYS), ((7, 5), torch.tensor([2])), ((1, 1), torch.tensor([[1, 2], [2, 3]]))):
        features = torch.randn(2, 5, *size)
        torch.testing.assert_close(second(features, keys), first(features, keys), rtol=0, atol=0)
    assert not any("position" in name for name in first.state_dict())


def test_pooled_tokens_are_fewer_and_the_masks_stay() -> None:
    torch.manual_seed(0)
    head = EDAMHead(5, 4, 8, pool=2).eval()
    features = torch.randn(2, 5, 6, 4)
    out = head(features, KEYS)
    seen = class_specific_features(head.project(features), out.scores, KEYS)
    pooled = F.avg_pool2d(seen.flatten(0, 1), 2).view(2, 3, 8, 3, 2)
    head.attention.pool = 1
    torch.testing.assert_close(out.logits, head.attention(pooled, KEYS))
    head.attention.pool = 2
    assert head(torch.randn(2, 5, 1, 3), KEYS).logits.isfinite().all()


def test_dropout_is_for_training_only() -> None:
    head, features = EDAMHead(5, 4, 8, dropout=0.5), torch.randn(2, 5, 3, 4)
    assert not torch.equal(head(features, KEYS).logits, head(features, KEYS).logits)
    head.eval()
    assert torch.equal(head(features, KEYS).logits, head(features, KEYS).logits)
    certain = EDAMHead(5, 4, 8, dropout=0.0)
    certain.load_state_dict(head.state_dict())
    torch.testing.assert_close(certain(features, KEYS), head(features, KEYS))


def test_zero_features_are_finite() -> None:
    head = EDAMHead(5, 4, 8)
    features = torch.zeros(2, 5, 3, 4, requires_grad=True)
    out = head(features, KEYS)
    assert not out.scores.any()
    out.logits.sum().backward()
    assert features.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head, features = EDAMHead(5, 4, 8).eval(), torch.randn(2, 5, 3, 4)
    exact = head(features, KEYS)
    half = head.to(dtype)(features.to(dtype), KEYS)
    assert half.logits.dtype == half.scores.dtype == dtype
    # measured: 3e-3 and 2e-2 for logits of about 0.5, through some ten layers rounded each
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(half.logits.float(), exact.logits, rtol=0, atol=tolerance)
    torch.testing.assert_close(half.scores.float(), exact.scores, rtol=0, atol=tolerance)


def test_compiles_to_one_graph() -> None:
    torch.manual_seed(0)
    head, features = EDAMHead(5, 4, 8, dropout=0.0), torch.randn(2, 5, 3, 4)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, KEYS), head(features, KEYS))


def test_weights_start_xavier_uniform_matrix_by_matrix() -> None:
    torch.manual_seed(0)
    block = PreNormTransformerBlock(64, 2, num_blocks=2)
    bound = math.sqrt(6 / 128)
    for part in block.qkv_weight.detach().unflatten(1, (3, 64)).flatten(0, 1):
        assert part.abs().max() <= bound
        assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert block.outer_bias.abs().max() <= 256**-0.5
    assert torch.equal(block.norm1_weight, torch.ones(2, 64))
    assert not torch.equal(block.qkv_weight[0], block.qkv_weight[1])


@given(st.integers(0, 199))
def test_pairs_share_the_class_that_they_are_drawn_for(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(9, 4, generator=generator) > 0.7
    pairs = draw_shared_class_pairs(labels, generator=generator)
    for i, j, key in zip(*(x.tolist() for x in pairs), strict=True):
        has_other = (labels[i] & (labels.sum(0) > 1)).any()
        if has_other:
            assert i != j
        else:
            assert i == j
        if key:
            assert labels[i, key - 1]
            assert labels[j, key - 1]
        else:
            assert not labels[i].any()
    again = draw_shared_class_pairs(labels, generator=generator.manual_seed(seed + 1))
    same = draw_shared_class_pairs(labels, generator=torch.Generator().manual_seed(seed + 1))
    assert all(torch.equal(x, y) for x, y in zip(again, same, strict=True))


def test_every_partner_and_class_is_drawn_in_its_turn() -> None:
    labels = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 1, 1], [1, 0, 0]])
    first = torch.zeros(4000, dtype=torch.int64)
    pairs = draw_shared_class_pairs(labels, first, generator=torch.Generator().manual_seed(0))
    assert (pairs.keys == 1).double().mean().item() == pytest.approx(0.5, abs=0.03)
    counts = pairs.second.bincount(minlength=5) / 4000
    torch.testing.assert_close(counts, torch.tensor([0, 1 / 6, 1 / 6, 1 / 2, 1 / 6]), rtol=0, atol=0.03)


def test_no_image_gives_no_pair() -> None:
    assert [len(x) for x in draw_shared_class_pairs(torch.zeros(0, 3))] == [0, 0, 0]
    none = draw_shared_class_pairs(torch.ones(3, 2), torch.zeros(0, dtype=torch.int64))
    assert [len(x) for x in none] == [0, 0, 0]


@given(st.integers(0, 199), st.integers(1, 6))
def test_sampled_classes_are_the_present_ones_and_then_others(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(3, 2, 6, generator=generator) > 0.8).float()
    keys = sample_class_keys(labels, count, generator=generator)
    assert keys.shape == (3, count)
    for row, present in zip(keys.tolist(), (labels > 0).any(1), strict=True):
        expected = (present.nonzero().flatten() + 1).tolist()
        known = min(count, len(expected))
        assert row[:known] == expected[:known]
        assert len(set(row)) == count
        assert not any(present[k - 1] for k in row[known:])
    everything = sample_class_keys(labels, generator=generator)
    assert all(sorted(row) == [1, 2, 3, 4, 5, 6] for row in everything.tolist())


def test_tags_of_unseen_images_are_learnt_through_the_masks() -> None:
    """Two classes, each with a look of its own at a few cells of a common background."""
    torch.manual_seed(0)
    head, looks = EDAMHead(6, 2, 8, dropout=0.0), torch.eye(6)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)

    def batch(pairs: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, 2, (2 * pairs, 2))
        there = (torch.rand(2 * pairs, 2, 4, 5) > 0.7) & (labels[:, :, None, None] > 0)
        region = torch.where(there[:, 0], 0, torch.where(there[:, 1], 1, 2))
        labels = torch.stack([(region == k).flatten(1).any(1) for k in range(2)], 1).float()
        return looks[region].movedim(-1, 1) + 0.1 * torch.randn(2 * pairs, 6, 4, 5), labels

    def logits_and_targets(pairs: int) -> tuple[Tensor, Tensor]:
        features, labels = batch(pairs)
        keys = sample_class_keys(labels.view(pairs, 2, 2))
        return head(features, keys).logits, labels.gather(1, (keys - 1).repeat_interleave(2, 0))

    for _ in range(150):
        loss = F.binary_cross_entropy_with_logits(*logits_and_targets(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits, targets = logits_and_targets(32)
    assert ((logits > 0) == (targets > 0)).double().mean() > 0.9


LABELS = torch.tensor([[1, 0, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: discriminative_activation(random(3, 4, 4)), ValueError, r"class_maps: expected shape \(B, 1\+K, H, W"),
        (lambda: discriminative_activation(random(1, 3, 4, 4).long()), TypeError, r"class_maps: expected a floating"),
        (
            lambda: discriminative_activation(random(1, 3, 4, 4), normalization="max"),
            ValueError,
            r'normalization: expected "l2_abs", "softmax" or "sigmoid", got \'max\'',
        ),
        (lambda: DiscriminativeActivationLayer(4, 2, normalization="max"), ValueError, r"normalization: expected"),
        (
            lambda: DiscriminativeActivationLayer(4, 2)(torch.rand(1, 3, 2, 2)),
            ValueError,
            r"features: expected shape \(\*, 4, \*, \*\) for this layer, got \(1, 3, 2, 2\)",
        ),
        (
            lambda: class_specific_features(random(2, 3, 4, 4), random(2, 5, 4, 3), KEYS),
            ValueError,
            r"scores: expected shape \(2, \*, 4, 4\) to match features, got \(2, 5, 4, 3\)",
        ),
        (
            lambda: class_specific_features(random(2, 3, 4, 4), random(2, 5, 4, 4), KEYS.float()),
            TypeError,
            r"keys: expected an integer tensor, got torch.float32; expected classes 1..K",
        ),
        (
            lambda: class_specific_features(random(2, 3, 4, 4), random(2, 5, 4, 4), KEYS.expand(3, 3)),
            ValueError,
            r"keys: expected a number of groups that divides the batch of 2, got 3",
        ),
        (
            lambda: class_specific_features(random(2, 3, 4, 4), random(2, 5, 4, 4), KEYS.view(1, 1, 3)),
            ValueError,
            r"keys: expected shape \(S,\) or \(G, S\), got \(1, 1, 3\)",
        ),
        (
            lambda: ImagePositionEmbedding(6)(random(2, 3, 4, 5)),
            ValueError,
            r"tokens: expected shape \(..., n, S, N, ",
        ),
        (lambda: ImagePositionEmbedding(6, 1)(random(2, 3, 4, 6)), ValueError, r"at most max_images = 1 images, got 2"),
        (lambda: PreNormTransformerBlock(6, 4), ValueError, r"heads: expected a divisor of width = 6, got 4"),
        (lambda: PreNormTransformerBlock(6, 2, num_blocks=0), ValueError, r"num_blocks: expected at least 1, got 0"),
        (
            lambda: PreNormTransformerBlock(6, 2, num_blocks=3)(torch.rand(1, 4, 6)),
            ValueError,
            r"block: expected the blocks of x, one of 3 for each, got None",
        ),
        (
            lambda: PreNormTransformerBlock(6, 2)(torch.rand(1, 4, 5)),
            ValueError,
            r"x: expected shape \(\*, \*, 6\) for this block, got \(1, 4, 5\)",
        ),
        (
            lambda: PreNormTransformerBlock(6, 2, num_blocks=3)(torch.rand(2, 4, 5, 6), KEYS),
            ValueError,
            r"block: expected shape \(2, 4\) to match x, or \(4,\), got \(3,\)",
        ),
        (
            lambda: attention()(random(2, 3, 5, 2, 2), KEYS),
            ValueError,
            r"class_features: expected shape \(\*, \*, 6, \*, \*\) for this module, got \(2, 3, 5, 2, 2\)",
        ),
        (
            lambda: attention()(random(2, 2, 6, 2, 2), KEYS),
            ValueError,
            r"keys: expected shape \(\*, 2\) to match class_features, got \(1, 3\)",
        ),
        (lambda: CollaborativeMultiAttention(0), ValueError, r"num_classes: expected at least 1, got 0"),
        (lambda: EDAMHead(4, 2, pool=0), ValueError, r"pool: expected at least 1, got 0"),
        (lambda: draw_shared_class_pairs(LABELS[0]), ValueError, r"labels: expected shape \(M, K\), got \(3,\)"),
        (lambda: draw_shared_class_pairs(LABELS, LABELS), ValueError, r"first: expected shape \(P,\), got \(2, 3\)"),
        (lambda: draw_shared_class_pairs(LABELS, torch.rand(2)), TypeError, r"first: expected an integer tensor"),
        (lambda: sample_class_keys(LABELS), ValueError, r"labels: expected shape \(G, n, K\), got \(2, 3\)"),
        (lambda: sample_class_keys(LABELS[None], 4), ValueError, r"count: expected 1..3, got 4"),
    ],
)
def test_messages_name_argument_expected_and_given(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_class_0_is_refused() -> None:
    with pytest.raises((IndexError, RuntimeError), match="index"):
        attention()(random(2, 1, 6, 2, 2), torch.tensor([0]))
