import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.losses import reference_rca
from wsss_losses import RegionalContrastLoss, regional_contrast_loss
from wsss_modules import RegionMemoryBank, RegionMixUp, draw_region_mix_up


def random_case(
    seed: int = 0, images: int = 3, classes: int = 4, slots: int = 5, channels: int = 6
) -> tuple[Tensor, Tensor, Tensor, Tensor, RegionMixUp]:
    """Embedding, class maps, labels (at least one an image), memory and draws, float64."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(images, classes, generator=generator) < 0.4).double()
    labels[torch.arange(images), torch.randint(classes, (images,), generator=generator)] = 1
    return (
        torch.randn(images, channels, 4, 5, generator=generator, dtype=torch.float64),
        3 * torch.randn(images, classes, 4, 5, generator=generator, dtype=torch.float64),
        labels,
        torch.randn(classes, slots, channels, generator=generator, dtype=torch.float64),
        draw_region_mix_up(labels, generator=generator),
    )


def loss_and_gradient(embedding: Tensor, *inputs, mix: RegionMixUp, **options) -> tuple[Tensor, Tensor]:
    leaf = embedding.clone().requires_grad_()
    loss = regional_contrast_loss(leaf, *inputs, mix=mix, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@given(
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(2, 5),
    st.integers(1, 4),
    st.sampled_from([None, 1e-4, 1e-1]),
    st.sampled_from([0.07, 0.5]),
)
def test_loss_and_gradient_equal_the_form_by_region(
    seed: int, images: int, classes: int, slots: int, log_floor: float | None, temperature: float
) -> None:
    embedding, cam, labels, memory, mix = random_case(seed, images, classes, slots)
    options = {"temperature": temperature, "log_floor": log_floor}
    loss, grad = loss_and_gradient(embedding, cam, labels, memory, mix=mix, **options, reduction="none")
    leaf = embedding.clone().requires_grad_()
    expected = reference_rca.regional_contrast(leaf, cam, labels, memory, mix, **options)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), leaf)[0], rtol=1e-9, atol=1e-12)


def test_reductions() -> None:
    embedding, cam, labels, memory, mix = random_case()
    each, total, mean = (
        regional_contrast_loss(embedding, cam, labels, memory, mix=mix, reduction=reduction)
        for reduction in ("none", "sum", "mean")
    )
    assert each.shape == (3,)
    torch.testing.assert_close(total, each.sum())
    torch.testing.assert_close(mean, each.mean())


def test_scale_of_embedding_and_of_memory_rows_does_not_matter() -> None:
    embedding, cam, labels, memory, mix = random_case(1)
    expected = regional_contrast_loss(embedding, cam, labels, memory, mix=mix)
    factors = torch.rand(4, 5, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(
        regional_contrast_loss(1e3 * embedding, cam, labels, factors * memory, mix=mix), expected
    )


def test_full_weight_removes_the_partner() -> None:
    embedding, cam, labels, memory, mix = random_case(2)
    whole = mix._replace(weight=torch.ones_like(mix.weight))
    other = RegionMixUp((mix.partner + 1) % 3, (mix.partner_class + 1) % 4, whole.weight)
    expected = loss_and_gradient(embedding, cam, labels, memory, mix=whole)
    torch.testing.assert_close(loss_and_gradient(embedding, cam, labels, memory, mix=other), expected)


def test_order_of_slots_and_of_classes_does_not_matter() -> None:
    embedding, cam, labels, memory, _ = random_case(3)
    labels = torch.ones_like(labels)
    mix = draw_region_mix_up(labels)
    expected = regional_contrast_loss(embedding, cam, labels, memory, mix=mix)
    slots = torch.stack([rows[torch.randperm(5)] for rows in memory])
    torch.testing.assert_close(regional_contrast_loss(embedding, cam, labels, slots, mix=mix), expected)
    order = torch.tensor([2, 0, 3, 1])
    inverse = order.argsort()
    moved = RegionMixUp(*(part.view(3, 4)[:, order].flatten() for part in mix))
    moved = moved._replace(partner_class=inverse[moved.partner_class])
    torch.testing.assert_close(
        regional_contrast_loss(embedding, cam[:, order], labels, memory[order], mix=moved), expected
    )


def test_doubling_a_batch_doubles_the_sum_and_keeps_the_mean() -> None:
    embedding, cam, labels, memory, mix = random_case(4)
    twice = [torch.cat([x, x]) for x in (embedding, cam, labels)]
    both = RegionMixUp(*(torch.cat([part, part]) for part in mix))
    for reduction, factor in (("sum", 2), ("mean", 1)):
        once = regional_contrast_loss(embedding, cam, labels, memory, mix=mix, reduction=reduction)
        torch.testing.assert_close(regional_contrast_loss(*twice, memory, mix=both, reduction=reduction), factor * once)


def test_gradient_reaches_the_embedding_alone() -> None:
    embedding, cam, labels, memory, mix = random_case(5)
    leaves = [x.requires_grad_() for x in (embedding, cam, memory)]
    loss = regional_contrast_loss(embedding, cam, labels, memory, mix=mix)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert grads[0] is not None
    assert grads[1:] == (None, None)


def test_slots_that_are_not_filled_take_no_part() -> None:
    embedding, cam, labels, memory, mix = random_case(6)
    filled = torch.tensor([5, 2, 1, 3])
    hidden = torch.where(torch.arange(5)[:, None] < filled[:, None, None], memory, 1e6)
    expected = loss_and_gradient(embedding, cam, labels, memory, filled, mix=mix)
    torch.testing.assert_close(
        loss_and_gradient(embedding, cam, labels, hidden, filled, mix=mix), expected, rtol=0, atol=0
    )
    same = torch.full((4,), 5)
    torch.testing.assert_close(
        loss_and_gradient(embedding, cam, labels, memory, same, mix=mix),
        loss_and_gradient(embedding, cam, labels, memory, mix=mix),
    )


def test_a_class_without_a_filled_slot_costs_nothing() -> None:
    embedding, cam, _, memory, _ = random_case(7, images=1)
    labels = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    alone = RegionMixUp(torch.tensor([0]), torch.tensor([1]), torch.tensor([1.0]))
    loss, grad = loss_and_gradient(embedding, cam, labels, memory, torch.tensor([5, 0, 5, 5]), mix=alone)
    assert loss == 0
    assert not grad.any()
    loss, grad = loss_and_gradient(embedding, cam, labels, memory, torch.zeros(4).long(), mix=alone, log_floor=1e-4)
    assert loss == 0
    assert not grad.any()


def test_a_memory_of_one_class_has_nothing_to_push_from() -> None:
    embedding, cam, labels, memory, mix = random_case(8)
    only = torch.tensor([0, 5, 0, 0])
    loss, grad = loss_and_gradient(embedding, cam, labels, memory, only, mix=mix)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)


def test_an_empty_region_is_left_out_of_its_images_mean() -> None:
    embedding, cam, _, memory, _ = random_case(9, images=2)
    labels = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    weight = torch.tensor([0.6, 0.6, 0.6])
    mix = RegionMixUp(torch.tensor([1, 1, 1]), torch.tensor([2, 2, 2]), weight)
    maps = cam.clone()
    maps[0] = torch.where(torch.arange(4)[:, None, None] == 1, -1e4, maps[0])  # probability 0 everywhere
    alone = labels.clone()
    alone[0, 1] = 0
    loss, grad = loss_and_gradient(embedding, maps, labels, memory, mix=mix)
    kept = RegionMixUp(*(part[[0, 2]] for part in mix))
    expected = loss_and_gradient(embedding, maps, alone, memory, mix=kept)
    assert loss.isfinite()
    torch.testing.assert_close((loss, grad), expected)


def test_an_empty_partner_leaves_the_region_unmixed() -> None:
    embedding, cam, _, memory, _ = random_case(10, images=2)
    labels = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    maps = cam.clone()
    maps[1] = 1.0
    mix = RegionMixUp(torch.tensor([1, 1]), torch.tensor([1, 1]), torch.tensor([0.4, 0.4]))
    loss, grad = loss_and_gradient(embedding, maps, labels, memory, mix=mix, reduction="none")
    unmixed = mix._replace(weight=torch.ones(2))
    torch.testing.assert_close(
        (loss, grad), loss_and_gradient(embedding, maps, labels, memory, mix=unmixed, reduction="none")
    )
    assert loss[0] > 0
    assert loss[1] == 0


def test_the_floor_cuts_the_gradient_where_all_similarities_are_low() -> None:
    # the row nearest to the query belongs to a third class that is also a negative; make all but one row opposite
    embedding = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 1, 2).double()
    cam = torch.tensor([[[[3.0, 0.0]], [[0.0, 3.0]]]]).double()
    labels = torch.tensor([[1.0, 0.0]])
    memory = torch.tensor([[[1.0, 0.1], [-1.0, 0.2]], [[-1.0, 0.3], [-1.0, 0.1]]]).double()
    mix = RegionMixUp(torch.tensor([0]), torch.tensor([0]), torch.tensor([1.0]))
    exact = regional_contrast_loss(embedding, cam, labels, memory, mix=mix)
    floored = regional_contrast_loss(embedding, cam, labels, memory, mix=mix, log_floor=1e-4)
    assert floored > exact + 1
    rows = F.normalize(memory, dim=2)[..., 0] / 0.07
    low = rows[0, 0] + torch.tensor(1e-4).double().log() - rows[0, 1]
    high = torch.logaddexp(rows[1].logsumexp(0), rows[0, 0]) - rows[0, 0]
    torch.testing.assert_close(floored, (low + high) / 2)


def test_draws_come_from_the_generator() -> None:
    embedding, cam, labels, memory, _ = random_case(11)
    values = [
        regional_contrast_loss(embedding, cam, labels, memory, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert values[0] == values[1]
    assert values[0] != values[2]


def test_single_image_batch_is_its_own_partner() -> None:
    embedding, cam, labels, memory, _ = random_case(12, images=1)
    mix = draw_region_mix_up(labels)
    assert not mix.partner.any()
    assert regional_contrast_loss(embedding, cam, labels, memory, mix=mix).isfinite()


def test_zero_embedding_has_a_finite_gradient() -> None:
    embedding, cam, labels, memory, mix = random_case(13)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        loss, grad = loss_and_gradient(
            torch.zeros_like(embedding).to(dtype), cam.to(dtype), labels, memory.to(dtype), mix=mix
        )
        assert loss.isfinite()
        assert grad.isfinite().all()


def test_memory_may_be_written_before_backward() -> None:
    embedding, cam, labels, memory, mix = (x.float() if isinstance(x, Tensor) else x for x in random_case(14))
    bank = RegionMemoryBank(4, 5, 6, legacy_init=True)
    bank.slots.copy_(memory)
    leaf = embedding.requires_grad_()
    loss = regional_contrast_loss(leaf, cam, labels, bank.slots, bank.filled, mix)
    (expected,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    bank.update(embedding, cam, labels, torch.ones_like(labels))
    assert not torch.equal(bank.slots, memory)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)


def test_contrast_pulls_regions_to_the_rows_of_their_class() -> None:
    _, cam, labels, memory, _ = random_case(15)
    memory = memory.mean(1, keepdim=True) + 0.1 * memory  # classes apart from each other
    embedding = torch.randn(3, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    criterion = RegionalContrastLoss()
    optimizer = torch.optim.Adam([embedding], lr=0.1)
    alone = RegionMixUp(*labels.nonzero().T, torch.ones(int(labels.sum())))
    costs = []
    for _ in range(60):
        loss = criterion(embedding, cam, labels, memory, mix=alone)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        costs.append(loss.item())
    assert costs[-1] < 0.2 * costs[0]


EMBEDDING, CAM, LABELS, MEMORY, MIX = random_case()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: regional_contrast_loss(EMBEDDING[:, 1:], CAM, LABELS, MEMORY),
            ValueError,
            r"embedding: expected shape \(\*, 6, \*, \*\) to match memory, got \(3, 5, 4, 5\)",
        ),
        (
            lambda: regional_contrast_loss(EMBEDDING, CAM[..., 1:], LABELS, MEMORY),
            ValueError,
            r"cam: expected shape \(3, 4, 4, 5\) to match embedding and memory, got \(3, 4, 4, 4\)",
        ),
        (
            lambda: regional_contrast_loss(EMBEDDING, CAM, LABELS[:, 1:], MEMORY),
            ValueError,
            r"labels: expected shape \(3, 4\) to match embedding and memory, got \(3, 3\)",
        ),
        (
            lambda: regional_contrast_loss(EMBEDDING, CAM, LABELS, MEMORY[0]),
            ValueError,
            r"memory: expected shape \(K, N, D\)",
        ),
        (
            lambda: regional_contrast_loss(EMBEDDING, CAM, LABELS, MEMORY[:, :0]),
            ValueError,
            r"memory: expected at least one class and one slot, got shape \(4, 0, 6\)",
        ),
        (
            lambda: regional_contrast_loss(EMBEDDING, CAM, LABELS, MEMORY.long()),
            TypeError,
            r"memory: expected a floating",
        ),
        (
            lambda: regional_contrast_loss(EMBEDDING.long(), CAM, LABELS, MEMORY),
            TypeError,
            r"embedding: expected a floating-point tensor",
        ),
        (
            lambda: regional_contrast_loss(EMBEDDING, CAM, LABELS, MEMORY, torch.tensor([1])),
            ValueError,
            r"filled: expected shape \(4,\) to match memory, got \(1,\)",
        ),
        (
            lambda: regional_contrast_loss(EMBEDDING, CAM, LABELS, MEMORY, mix=MIX._replace(weight=MIX.weight[1:])),
            ValueError,
            r"mix.weight: expected shape \(\d+,\) for the present classes of labels",
        ),
        (
            lambda: regional_contrast_loss(EMBEDDING, CAM, LABELS, MEMORY, temperature=0),
            ValueError,
            r"temperature: expected a positive number, got 0",
        ),
        (
            lambda: regional_contrast_loss(EMBEDDING, CAM, LABELS, MEMORY, log_floor=0),
            ValueError,
            r"log_floor: expected a positive number or None, got 0",
        ),
        (
            lambda: regional_contrast_loss(EMBEDDING, CAM, LABELS, MEMORY, reduction="max"),
            ValueError,
            r'reduction: expected "mean", "sum" or "none", got \'max\'',
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_messages(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
