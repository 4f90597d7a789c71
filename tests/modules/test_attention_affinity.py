import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck

from tests.modules.reference_attention_affinity import dense_head, dense_walk, loop_window, repeated_labels
from wsss_modules import (
    AffinityRandomWalk,
    AttentionAffinityHead,
    CAMHead,
    LocalAffinity,
    MixTransformer,
    TokenEncoder,
    TransformerBlock,
    affinity_random_walk,
    labels_to_affinity,
    local_window_mask,
    present_softmax,
    query_key,
    window_offsets,
)
from wsss_modules.attention_walk import _moved_by_offsets, _moved_by_rows

seeds = st.integers(0, 1000)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 5))


def affinities(size: tuple[int, int], seed: int = 0, batch: int = 2) -> Tensor:
    """Symmetric, in (0, 1), with a diagonal that is not 1."""
    n = size[0] * size[1]
    half = torch.rand(batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (half + half.mT) / 2


# the head


def test_head_is_a_convolution_over_symmetric_maps() -> None:
    head = AttentionAffinityHead(5).double()
    attentions = [torch.randn(2, heads, 6, 6, dtype=torch.float64) for heads in (2, 3)]
    affinity = head(attentions)
    torch.testing.assert_close(affinity, dense_head(attentions, head.proj.weight, head.proj.bias))
    assert torch.equal(affinity, affinity.mT)
    assert bool(((affinity > 0) & (affinity < 1)).all())
    torch.testing.assert_close(head([a.mT for a in attentions]), affinity)


def test_gradients_flow_into_the_attention() -> None:
    head = AttentionAffinityHead(2).double()
    assert gradcheck(lambda a: head([a]), torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True))


def test_head_compiles_and_takes_half_precision() -> None:
    head, attention = AttentionAffinityHead(2), torch.randn(1, 2, 4, 4)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled([attention]), head([attention]))
    assert head([attention.bfloat16()]).dtype == torch.bfloat16


def logits_of_last_two(encoder: TokenEncoder, images: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
    logits: list[Tensor] = []

    def visit(layer: int, block: nn.Module, tokens: Tensor) -> None:
        if layer >= len(encoder.blocks) - 2:
            query, key = query_key(block, tokens)
            logits.append((query @ key.mT)[..., encoder.num_prefix :, encoder.num_prefix :])

    return logits, encoder(images, visit=visit).grid


@pytest.mark.parametrize("kind", ["vit", "mit", "hybrid"])
def test_head_reads_any_transformer_on_grids_that_are_not_square(kind: str) -> None:
    images = torch.rand(2, 3, 48, 64)
    if kind == "mit":
        net = MixTransformer((8, 16, 24, 32), (1, 1, 1, 2), num_heads=(1, 2, 3, 4))
        attentions, grid = net(images)[1:]
    else:
        trunk = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Conv2d(8, 12, 4, stride=4))
        patches = nn.Conv2d(3, 12, 16, stride=16) if kind == "vit" else trunk
        prefix = 1 if kind == "vit" else 0
        encoder = TokenEncoder(patches, [TransformerBlock(12, 3) for _ in range(3)], 12, num_prefix=prefix, grid=(3, 3))
        attentions, grid = logits_of_last_two(encoder, images)
    assert tuple(grid) == (3, 4)
    affinity = AttentionAffinityHead(sum(a.shape[1] for a in attentions))(attentions)
    assert affinity.shape == (2, 12, 12)
    target = labels_to_affinity(torch.zeros(2, 48, 64, dtype=torch.int64), size=tuple(grid))
    assert target.shape == affinity.shape
    low, high = AffinityRandomWalk()(torch.rand(2, 3, *grid), affinity, torch.ones(2, 3))
    assert low.shape == high.shape == (2, 4, 3, 4)


def test_timm_vit_gives_its_attention_without_being_changed() -> None:
    timm = pytest.importorskip("timm")
    from wsss_modules import token_encoder_from_vit

    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    attentions, grid = logits_of_last_two(token_encoder_from_vit(vit), torch.rand(1, 3, 48, 80))
    assert tuple(grid) == (3, 5)
    assert [a.shape for a in attentions] == [(1, 3, 15, 15)] * 2


# windows and labels


@given(sizes, st.integers(0, 3))
def test_window_is_square(size: tuple[int, int], radius: int) -> None:
    assert torch.equal(local_window_mask(size, radius).float(), loop_window(size, radius))
    ones = torch.ones(1, size[0] * size[1], size[0] * size[1])
    near = LocalAffinity.from_dense(ones, size, offsets=window_offsets(radius)).dense()
    assert torch.equal(near[0], loop_window(size, radius))


@given(seeds, sizes, st.integers(0, 3))
def test_labels_of_pairs(seed: int, size: tuple[int, int], radius: int) -> None:
    mask = torch.randint(0, 4, (2, *size), generator=torch.Generator().manual_seed(seed))
    mask = torch.where(mask == 3, 255, mask)
    target = labels_to_affinity(mask, radius=radius, stride=1)
    assert torch.equal(target.long(), repeated_labels(mask, loop_window(size, radius)))
    assert torch.equal(target, target.mT)
    assert torch.equal(target.diagonal(dim1=1, dim2=2), torch.where(mask == 255, 255, 1).flatten(1).to(torch.uint8))
    wider = labels_to_affinity(mask, radius=radius + 1, stride=1)
    assert bool(((target == 255) | (target == wider)).all())
    renamed = torch.where(mask == 255, 255, (mask + 1) % 3)
    assert torch.equal(labels_to_affinity(renamed, radius=radius, stride=1), target)


def test_labels_are_read_at_the_corner_of_each_cell() -> None:
    mask = torch.zeros(1, 40, 33, dtype=torch.int64)
    mask[:, 16:] = 1
    assert labels_to_affinity(mask).shape == (1, 4, 4)  # 2 x 2 cells
    assert torch.equal(labels_to_affinity(mask)[0, 0], torch.tensor([1, 1, 0, 0], dtype=torch.uint8))
    assert labels_to_affinity(mask, size=(3, 3)).shape == (1, 9, 9)


# the walk


@given(seeds, sizes, st.integers(0, 3) | st.none(), st.sampled_from([0.0, 1e-4, 0.1]), st.integers(1, 3))
def test_walk_is_the_product_with_the_matrix(
    seed: int, size: tuple[int, int], radius: int | None, eps: float, n_steps: int
) -> None:
    affinity = affinities(size, seed)
    before, x = affinity.clone(), torch.rand(2, 3, *size, dtype=torch.float64)
    expected = x
    for _ in range(n_steps):
        expected = dense_walk(expected, affinity, loop_window(size, max(size) if radius is None else radius), eps=eps)
    options = {"radius": radius, "eps": eps, "n_steps": n_steps}
    torch.testing.assert_close(affinity_random_walk(x, affinity, **options), expected)
    assert torch.equal(affinity, before)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_walk_by_rows_is_the_walk_by_offsets(power: float) -> None:
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    affinity = affinities((4, 5))
    affinity[:, 0, 1] = 0  # where the slope of the root is infinite
    affinity.requires_grad_()
    found = []
    for moved in (_moved_by_rows, _moved_by_offsets):
        out = moved(x, affinity, 1, power)
        found.append((out, *torch.autograd.grad(out.square().sum(), (x, affinity))))
    torch.testing.assert_close(*found)
    assert all(bool(values.isfinite().all()) for values in found[0])


def test_walk_over_the_identity_only_shrinks() -> None:
    cam, labels = torch.rand(1, 2, 3, 4), torch.tensor([[1, 0]])
    walk = AffinityRandomWalk(radius=2, backgrounds=(0.4,))
    (out,) = walk(cam, torch.eye(12)[None], labels)
    torch.testing.assert_close(out, present_softmax(cam, labels, 0.4) / 1.1)
    assert not out[:, 2].any()
    assert "radius=2, power=2.0, eps=0.1, n_steps=1, backgrounds=(0.4,)" in repr(walk)
    (twice,) = AffinityRandomWalk(radius=2, n_steps=2, backgrounds=(0.4,))(cam, torch.eye(12)[None], labels)
    torch.testing.assert_close(twice, out / 1.1)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_walk_to_a_cell_that_is_like_none_gives_0(eps: float) -> None:
    x = torch.rand(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    affinity = affinities((2, 3), batch=1)
    affinity[:, 4] = affinity[:, :, 4] = 0
    affinity.requires_grad_()
    out = affinity_random_walk(x, affinity, radius=1, eps=eps, n_steps=2)
    assert not out[..., 1, 1].any()
    assert bool(out.flatten(2)[..., [0, 1, 2, 3, 5]].all())
    assert all(bool(grad.isfinite().all()) for grad in torch.autograd.grad(out.square().sum(), (x, affinity)))


def test_backgrounds_walk_together_as_they_walk_alone() -> None:
    cam, labels, affinity = torch.rand(2, 3, 3, 4), torch.tensor([[1, 0, 1], [0, 0, 0]]), affinities((3, 4)).float()
    both = AffinityRandomWalk(radius=1)(cam, affinity, labels)
    for scores, background in zip(both, (0.35, 0.55), strict=True):
        (alone,) = AffinityRandomWalk(radius=1, backgrounds=(background,))(cam, affinity, labels)
        torch.testing.assert_close(scores, alone)
        assert bool((scores >= 0).all())


def test_walk_has_gradients_compiles_and_takes_half_precision() -> None:
    x, affinity = torch.rand(1, 2, 2, 3, dtype=torch.float64), affinities((2, 3), batch=1)
    assert gradcheck(
        lambda x, a: affinity_random_walk(x, (a + a.mT) / 2, radius=1), (x.requires_grad_(), affinity.requires_grad_())
    )
    walk = torch.compile(lambda x, a: affinity_random_walk(x, a, radius=1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(walk(x, affinity), affinity_random_walk(x, affinity, radius=1))
    half = affinity_random_walk(x.bfloat16(), affinity.bfloat16(), radius=1)
    exact = affinity_random_walk(x.bfloat16().double(), affinity.bfloat16().double(), radius=1)
    torch.testing.assert_close(half.double(), exact, rtol=2**-7, atol=0)


# the classifier


def test_max_pooling_classifier_sees_the_largest_feature() -> None:
    features = torch.randn(2, 4, 3, 5)
    head = CAMHead(4, 3, pool="max")
    expected = torch.einsum("kd,bd->bk", head.classifier.weight[:, :, 0, 0], features.amax((2, 3)))
    torch.testing.assert_close(head(features).logits, expected)
    by_class = CAMHead(4, 3, "conv_then_gap", pool="max")
    torch.testing.assert_close(by_class(features).logits, by_class.class_maps(features).amax((2, 3)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AttentionAffinityHead(0), "num_maps: expected at least 1, got 0"),
        (lambda: AttentionAffinityHead(2)([]), "attentions: expected at least one tensor"),
        (
            lambda: AttentionAffinityHead(3)([torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4)]),
            r"attentions: expected 3 maps in all, got 1 \+ 1",
        ),
        (lambda: AttentionAffinityHead(1)([torch.rand(1, 1, 4, 5)]), r"attentions\[0\]: .* class tokens are to be cut"),
        (lambda: window_offsets(-1), "radius: expected at least 0, got -1"),
        (lambda: local_window_mask((2, 2), -1), "radius: expected at least 0, got -1"),
        (lambda: labels_to_affinity(torch.zeros(1, 4, 4).long(), stride=0), "stride: expected at least 1, got 0"),
        (lambda: labels_to_affinity(torch.zeros(1, 4, 4).long(), ignore_index=1), "ignore_index: expected 2 to 255"),
        (
            lambda: affinity_random_walk(torch.rand(1, 1, 2, 3), torch.rand(1, 4, 4)),
            r"affinity: expected shape \(1, 6, 6\) \(B, N, N\) for a grid of 2 x 3",
        ),
        (lambda: AffinityRandomWalk(-1), "radius: expected at least 0 or None, got -1"),
        (lambda: AffinityRandomWalk(n_steps=0), "n_steps: expected at least 1, got 0"),
        (lambda: AffinityRandomWalk(power=0), "power: expected a number above 0, got 0"),
        (lambda: AffinityRandomWalk(eps=-1), "eps: expected at least 0, got -1"),
        (lambda: AffinityRandomWalk(backgrounds=()), "backgrounds: expected at least one score"),
        (lambda: CAMHead(4, 3, pool="sum"), 'pool: expected "mean" or "max", got \'sum\''),
    ],
)
def test_messages(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
