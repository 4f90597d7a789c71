import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.modules import reference_memory
from wsss_modules import RegionMemoryBank, draw_region_mix_up, kmeans_prototypes, region_mask, region_pool


def batch(seed: int = 0, images: int = 5, classes: int = 4, channels: int = 6, cells: int = 5) -> tuple[Tensor, ...]:
    """Features, class maps, labels and probabilities, float64."""
    generator = torch.Generator().manual_seed(seed)
    size = (cells, cells + 1)
    return (
        torch.randn(images, channels, *size, generator=generator, dtype=torch.float64),
        3 * torch.randn(images, classes, *size, generator=generator, dtype=torch.float64),
        (torch.rand(images, classes, generator=generator) < 0.6).double(),
        torch.rand(images, classes, generator=generator, dtype=torch.float64),
    )


def bank_of(*, classes: int = 4, slots: int = 3, channels: int = 6, **options) -> RegionMemoryBank:
    options.setdefault("threshold", 0.3)
    return RegionMemoryBank(classes, slots, channels, **options).double()


def state(bank: RegionMemoryBank) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in bank.state_dict().items()}


# Regions


def test_region_is_where_a_class_is_above_its_mean() -> None:
    _, cam, _, _ = batch(1)
    mask = region_mask(cam)
    assert torch.equal(mask, torch.stack([reference_memory.regions(maps) for maps in cam]))
    assert mask.any((2, 3)).all()
    assert not mask.all((2, 3)).any()


@pytest.mark.parametrize("size", [(4, 4), (7, 6), (1, 1), (13, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_maps_have_no_region_whatever_the_rounding(size: tuple[int, int], dtype: torch.dtype) -> None:
    cam = torch.randn(2, 20, 1, 1, dtype=dtype).expand(2, 20, *size)
    assert not region_mask(cam).any()
    pool = region_pool(torch.randn(2, 3, *size, dtype=dtype), cam)
    assert not pool.area.any()
    assert not pool.embedding.any()


def test_one_class_has_no_region() -> None:
    assert not region_mask(torch.randn(2, 1, 5, 5)).any()


def test_pooling_is_the_mean_over_the_region_and_its_gradient_stays_inside() -> None:
    features, cam, _, _ = batch(2)
    features.requires_grad_()
    cam.requires_grad_()
    pool, mask = region_pool(features, cam), region_mask(cam)
    for i in range(5):
        for k in range(4):
            torch.testing.assert_close(pool.embedding[i, k], features[i, :, mask[i, k]].mean(1))
            assert pool.area[i, k] == mask[i, k].sum()
    (grad,) = torch.autograd.grad(pool.embedding[1, 2].sum(), features)
    assert torch.equal(grad != 0, (mask[1, 2] & (torch.arange(5) == 1)[:, None, None, None]).expand_as(grad))
    assert cam.grad_fn is None
    assert not pool.area.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_pooled_in_float32_also_under_autocast(dtype: torch.dtype) -> None:
    features, cam, _, _ = batch(3)
    features, cam = features.to(dtype), cam.to(dtype)
    exact = region_pool(features.double(), cam.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pool = region_pool(features, cam)
    assert pool.embedding.dtype == torch.float32
    torch.testing.assert_close(pool.embedding.double(), exact.embedding, rtol=1e-5, atol=1e-6)


# Mix-up


def test_mix_up_draws_present_partners_and_beta_weights() -> None:
    labels = torch.zeros(40, 6)
    labels[torch.arange(40), torch.arange(40) % 6] = 1
    labels[:20, 5] = 1
    many = labels.repeat(50, 1)
    mix = draw_region_mix_up(many, generator=torch.Generator().manual_seed(0))
    assert len(mix.weight) == int(many.sum())
    assert bool((many[mix.partner, mix.partner_class] > 0).all())
    assert mix.partner.unique().numel() > 0.7 * len(many)
    both = mix.partner % 40 < 20
    both &= mix.partner % 6 != 5
    second = (mix.partner_class[both] == 5).double().mean()
    assert abs(second - 0.5) < 0.05  # either of two classes
    # Beta(8, 8): mean 1/2, variance 1 / (4 * 17)
    assert abs(mix.weight.mean() - 0.5) < 0.01
    assert abs(mix.weight.var() * 68 - 1) < 0.1


def test_mix_up_is_repeatable_and_beta_sharpens_it() -> None:
    labels = torch.ones(30, 10)
    draws = [draw_region_mix_up(labels, beta, torch.Generator().manual_seed(1)) for beta in (8, 8, 1, 50)]
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    flat, sharp = draws[2].weight.var(), draws[3].weight.var()
    assert abs(flat * 12 - 1) < 0.25
    assert sharp < draws[0].weight.var() < flat


def test_mix_up_without_a_label_or_with_a_partner_without_one() -> None:
    assert [len(part) for part in draw_region_mix_up(torch.zeros(3, 4))] == [0, 0, 0]
    assert [len(part) for part in draw_region_mix_up(torch.zeros(0, 4))] == [0, 0, 0]
    labels = torch.zeros(60, 4)
    labels[0] = 1
    mix = draw_region_mix_up(labels, generator=torch.Generator().manual_seed(2))
    alone = mix.partner > 0
    assert alone.any()
    assert bool((mix.weight[alone] == 1).all())


# Memory


@given(
    st.integers(0, 10**6), st.sampled_from([1, 2, 3, 8]), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.9, 1.0])
)
def test_a_batch_is_written_as_region_after_region(
    seed: int, slots: int, legacy_init: bool, legacy_intersection: bool, momentum: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    options = {"momentum": momentum, "legacy_init": legacy_init, "legacy_intersection": legacy_intersection}
    ours = bank_of(slots=slots, **options, generator=generator)
    theirs = bank_of(slots=slots, **options)
    theirs.load_state_dict(state(ours))
    for step in range(3):  # 5 images a batch, so slots are written several times in one
        inputs = batch(seed + step)
        ours.update(*inputs)
        reference_memory.update(theirs, *inputs)
        torch.testing.assert_close(state(ours), state(theirs), rtol=1e-10, atol=1e-12)


def test_slots_fill_in_order_and_wrap() -> None:
    bank = bank_of(classes=1, slots=3, channels=1, momentum=0.5)
    for value in range(1, 5):
        bank.write(torch.full((1, 1, 1), float(value)), torch.tensor([[True]]))
    assert bank.slots[0, :, 0].tolist() == [0.5 * 1 + 0.5 * 4, 2, 3]
    assert bank.pointer.item() == 1
    assert bank.filled.item() == 3


def test_noise_of_the_released_start_fades_as_the_docstring_says() -> None:
    bank = bank_of(classes=1, slots=1, channels=512, legacy_init=True, generator=torch.Generator().manual_seed(0))
    start = bank.slots.clone()
    assert abs(start.norm() - 512**0.5) < 2
    for _ in range(31):  # the median class after 30 epochs
        bank.write(torch.zeros(1, 1, 512), torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(bank.slots, 0.99**31 * start)
    assert abs(0.99**30.84 - 0.73) < 0.005


def test_only_present_and_sure_classes_are_written() -> None:
    features, cam, labels, _ = batch(4)
    labels = torch.zeros_like(labels)
    labels[:, :3] = 1
    probability = torch.tensor([0.7, 0.7 + 1e-9, 1.0, 1.0], dtype=torch.float64).expand(5, 4)
    bank = bank_of(slots=9, threshold=0.7)
    bank.update(features, cam, labels, probability)
    assert bank.filled.tolist() == [0, 5, 5, 0]  # strictly above, and present
    assert not bank.slots[[0, 3]].any()


def test_intersections_matter_for_two_classes_and_not_for_one() -> None:
    features, cam, labels, probability = batch(5)
    one = torch.zeros_like(labels)
    one[:, 1] = 1
    sure = torch.ones_like(probability)
    for tags, same in ((one, True), (torch.ones_like(labels), False)):
        plain, legacy = bank_of(slots=9), bank_of(slots=9, legacy_intersection=True)
        plain.update(features, cam, tags, sure)
        legacy.update(features, cam, tags, sure)
        assert torch.equal(plain.filled, legacy.filled)
        assert torch.allclose(plain.slots, legacy.slots, rtol=1e-12) is same


@pytest.mark.parametrize("legacy_intersection", [False, True])
def test_nothing_that_is_not_finite_or_empty_is_ever_written(legacy_intersection: bool) -> None:
    features, cam, labels, probability = batch(6)
    labels, probability = torch.ones_like(labels), torch.ones_like(probability)
    features[0, 0, 0, 0] = float("nan")
    features[1] = float("inf")
    cam[2] = 1  # constant: no region
    bank, clean = (bank_of(slots=9, legacy_intersection=legacy_intersection) for _ in range(2))
    bank.update(features, cam, labels, probability)
    clean.update(features[3:], cam[3:], labels[3:], probability[3:])
    assert torch.equal(bank.filled, torch.full((4,), 2))
    assert torch.equal(bank.slots, clean.slots)


def test_write_leaves_out_rows_that_are_not_finite() -> None:
    bank = bank_of(classes=2, channels=1)
    bank.write(torch.tensor([[[1.0], [float("nan")]], [[float("inf")], [2.0]]]), torch.ones(2, 2))
    assert bank.slots[:, :, 0].tolist() == [[1, 0, 0], [2, 0, 0]]
    assert bank.filled.tolist() == [1, 1]


def test_an_empty_batch_changes_nothing() -> None:
    bank = bank_of()
    bank.update(*batch(7))
    before = state(bank)
    bank.update(*(x[:0] for x in batch(7)))
    torch.testing.assert_close(state(bank), before, rtol=0, atol=0)


def test_a_write_leaves_other_slots_untouched_to_the_bit() -> None:
    bank = RegionMemoryBank(4, 50, 6, legacy_init=True, threshold=0.3)
    before = state(bank)
    bank.update(*(x.float() for x in batch(8)))
    count = (bank.pointer - before["pointer"]).tolist()
    for k in range(4):
        assert torch.equal(bank.slots[k, count[k] :], before["slots"][k, count[k] :])
        assert not torch.equal(bank.slots[k, : count[k]], before["slots"][k, : count[k]])


def test_state_goes_through_state_dict_and_training_goes_on_alike() -> None:
    ours, restored = bank_of(), bank_of()
    ours.update(*batch(9))
    restored.load_state_dict(state(ours))
    for bank in (ours, restored):
        bank.update(*batch(10))
    torch.testing.assert_close(state(ours), state(restored), rtol=0, atol=0)
    assert {key: value.shape for key, value in state(ours).items()} == {
        "slots": (4, 3, 6),
        "pointer": (4,),
        "filled": (4,),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_stored_in_float32(dtype: torch.dtype) -> None:
    features, cam, labels, probability = (x.to(dtype) for x in batch(11))
    bank = RegionMemoryBank(4, 9, 6, threshold=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bank.update(features, cam, labels, probability)
    exact = bank_of(slots=9)
    exact.update(features.double(), cam.double(), labels.double(), probability.double())
    assert bank.slots.dtype == torch.float32
    torch.testing.assert_close(bank.slots.double(), exact.slots, rtol=1e-5, atol=1e-6)


def test_update_compiles_and_holds_no_graph() -> None:
    eager, compiled = bank_of(), bank_of()
    step = torch.compile(compiled.update, fullgraph=True, backend="aot_eager")
    for seed in (12, 13):
        features, *rest = batch(seed)
        eager.update(features, *rest)
        step(features.requires_grad_(), *rest)
    torch.testing.assert_close(state(compiled), state(eager))
    assert not compiled.slots.requires_grad


def write_half_of_a_batch(rank: int, address: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        features, cam, labels, probability = batch(14, images=6)
        half = slice(3 * rank, 3 * rank + 3)
        bank, whole = bank_of(), bank_of()
        bank.update(features[half], cam[half], labels[half], probability[half], sync=True)
        whole.update(features, cam, labels, probability)
        torch.testing.assert_close(state(bank), state(whole))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_hold_the_memory_of_one(tmp_path) -> None:
    torch.multiprocessing.spawn(write_half_of_a_batch, args=((tmp_path / "meeting").as_uri(),), nprocs=2)


# Prototypes


def test_prototypes_find_groups_of_each_class_and_ignore_empty_slots() -> None:
    generator = torch.Generator().manual_seed(3)
    groups = 10 * torch.randn(3, 4, 5, generator=generator)
    slots = groups.repeat(1, 6, 1) + 0.01 * torch.randn(3, 24, 5, generator=generator)
    slots[1, 8:] = 1e9  # not in use
    prototypes = kmeans_prototypes(slots, 4, filled=torch.tensor([24, 8, 0]))
    torch.testing.assert_close(prototypes[:2], groups[:2], rtol=0, atol=0.02)
    assert not prototypes[2].any()
    alone = kmeans_prototypes(slots[:1], 4)
    torch.testing.assert_close(alone[0], prototypes[0])


def test_fewer_slots_in_use_than_prototypes() -> None:
    slots = torch.arange(10.0).view(1, 5, 2)
    prototypes = kmeans_prototypes(slots, 3, filled=torch.tensor([2]))
    assert prototypes.isfinite().all()
    assert {tuple(row) for row in prototypes[0].tolist()} == {(0, 1), (2, 3)}
    many = kmeans_prototypes(slots, 8)
    assert {tuple(row) for row in many[0].tolist()} == {tuple(row) for row in slots[0].tolist()}


BANK, (FEATURES, CAM, LABELS, PROBABILITY) = bank_of(), batch()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: region_mask(CAM[0]), ValueError, r"cam: expected shape \(B, K, H, W\), got \(4, 5, 6\)"),
        (lambda: region_mask(CAM.long()), TypeError, r"cam: expected a floating-point tensor"),
        (
            lambda: region_pool(FEATURES[..., 1:], CAM),
            ValueError,
            r"cam: expected shape \(5, \*, 5, 5\) to match features",
        ),
        (lambda: draw_region_mix_up(LABELS[0]), ValueError, r"labels: expected shape \(B, K\), got \(4,\)"),
        (lambda: draw_region_mix_up(LABELS, 0), ValueError, r"beta: expected a whole number of at least 1, got 0"),
        (lambda: draw_region_mix_up(LABELS, 1.5), ValueError, r"beta: expected a whole number of at least 1, got 1.5"),
        (lambda: RegionMemoryBank(0), ValueError, r"num_classes: expected at least 1, got 0"),
        (lambda: RegionMemoryBank(2, slots=0), ValueError, r"slots: expected at least 1, got 0"),
        (lambda: RegionMemoryBank(2, momentum=1.5), ValueError, r"momentum: expected a share in \[0, 1\], got 1.5"),
        (
            lambda: BANK.update(FEATURES[:, :5], CAM, LABELS, PROBABILITY),
            ValueError,
            r"features: expected shape \(\*, 6, \*, \*\) for this bank, got \(5, 5, 5, 6\)",
        ),
        (
            lambda: BANK.update(FEATURES, CAM[:, :3], LABELS, PROBABILITY),
            ValueError,
            r"cam: expected shape \(5, 4, 5, 6\) to match features and this bank",
        ),
        (lambda: BANK.update(FEATURES, CAM, LABELS[:4], PROBABILITY), ValueError, r"labels: expected shape \(5, 4\)"),
        (
            lambda: BANK.update(FEATURES, CAM, LABELS, PROBABILITY[:4]),
            ValueError,
            r"probability: expected shape \(5, 4\)",
        ),
        (lambda: BANK.write(FEATURES[:, :4, 0], LABELS[:3]), ValueError, r"selected: expected shape \(5, 4\) to match"),
        (
            lambda: BANK.write(FEATURES[:, :4, 0, :5], LABELS),
            ValueError,
            r"regions: expected shape \(\*, 4, 6\) for this",
        ),
        (lambda: kmeans_prototypes(BANK.slots[0]), ValueError, r"slots: expected shape \(K, N, D\), got \(3, 6\)"),
        (lambda: kmeans_prototypes(BANK.slots, 0), ValueError, r"prototypes: expected at least 1, got 0"),
        (
            lambda: kmeans_prototypes(BANK.slots, 2, filled=torch.tensor([1, 2])),
            ValueError,
            r"filled: expected shape \(4,\) to match slots, got \(2,\)",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_messages(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
