from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.losses import reference_ppc
from tests.modules.test_refinement import LargestTensor
from wsss_losses import PixelToPrototypeContrastLoss, pixel_to_prototype_contrast_loss
from wsss_modules import cam_pseudo_labels, draw_half_of_each_class, estimate_prototypes


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Batch:
    """Two views on one grid."""

    features1: Tensor
    features2: Tensor
    cam1: Tensor
    cam2: Tensor
    labels: Tensor

    @classmethod
    def make(cls, seed: int = 0, images: int = 2, classes: int = 15, size: tuple[int, int] = (4, 5)) -> "Batch":
        features = (random(images, 6, *size, seed=seed + i) for i in (0, 100))
        cams = (random(images, classes, *size, seed=seed + i).abs() for i in (200, 300))
        labels = (random(images, classes, seed=seed + 400) > 0.5).double()
        labels[0, 0] = 1
        return cls(*features, *cams, labels)

    def __iter__(self):
        return iter((self.features1, self.features2, self.cam1, self.cam2, self.labels))

    @property
    def classes(self) -> list[Tensor]:
        return [cam_pseudo_labels(cam, self.labels) for cam in (self.cam1, self.cam2)]

    def drawn(self, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        known = 1 + self.labels.shape[1]
        return [draw_half_of_each_class(mask, known, generator=generator) for mask in self.classes]

    def prototypes(self, k: int) -> list[Tensor]:
        views = ((self.features1, self.cam1), (self.features2, self.cam2))
        return [estimate_prototypes(features, cam, k).prototypes for features, cam in views]


@given(st.integers(0, 99), st.sampled_from([15, 13, 3]))
def test_terms_and_gradients_are_those_of_the_loops(seed: int, classes: int) -> None:
    batch = Batch.make(seed, classes=classes)
    batch = replace(batch, features1=batch.features1.requires_grad_(), features2=batch.features2.requires_grad_())
    drawn = batch.drawn(seed)
    terms = pixel_to_prototype_contrast_loss(*batch, *drawn)
    ranks = (min(3, classes), min(13, 1 + classes))
    prototypes = [p.detach() for p in batch.prototypes(20 // 8)]
    features = batch.features1, batch.features2
    reference = reference_ppc.contrast(features, prototypes, batch.classes, drawn, ranks)
    for term, expected in zip(terms[1:], reference, strict=True):
        torch.testing.assert_close(term, expected)
        pairs = (torch.autograd.grad(x, features, retain_graph=True) for x in (term, expected))
        torch.testing.assert_close(*pairs)
    torch.testing.assert_close(terms.total, sum(terms[1:]))


@given(st.permutations(range(3)), st.permutations(range(5)))
def test_order_of_images_and_classes_is_of_no_account(images: list[int], classes: list[int]) -> None:
    batch = Batch.make(images=3, classes=5)
    prototypes = [torch.nn.functional.normalize(random(6, 6, seed=i), dim=1) for i in (1, 2)]
    drawn = batch.drawn()
    base = pixel_to_prototype_contrast_loss(*batch, *drawn, *prototypes)
    features1, features2, cam1, cam2 = (x[images] for x in list(batch)[:4])
    moved = pixel_to_prototype_contrast_loss(
        features1,
        features2,
        cam1[:, classes],
        cam2[:, classes],
        batch.labels[images][:, classes],
        *(x[images] for x in drawn),
        *(torch.cat([p[:1], p[1:][classes]]) for p in prototypes),
    )
    torch.testing.assert_close(moved, base)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_length_of_the_features_is_of_no_account(first: float, second: float) -> None:
    batch = Batch.make()
    drawn = batch.drawn()
    scaled = replace(batch, features1=first * batch.features1, features2=second * batch.features2)
    torch.testing.assert_close(
        pixel_to_prototype_contrast_loss(*scaled, *drawn), pixel_to_prototype_contrast_loss(*batch, *drawn)
    )


@given(st.integers(0, 99))
def test_every_term_is_positive(seed: int) -> None:
    terms = pixel_to_prototype_contrast_loss(*Batch.make(seed))
    assert all(bool(term > 0) for term in terms)


def test_draws_follow_the_generator_and_change_the_intra_view_term_only() -> None:
    batch = Batch.make()
    first, same, other = (
        pixel_to_prototype_contrast_loss(*batch, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    torch.testing.assert_close(first, same, rtol=0, atol=0)
    assert first.intra != other.intra
    torch.testing.assert_close(first[1:3], other[1:3], rtol=0, atol=0)


def test_first_view_is_brought_to_the_grid_of_the_second() -> None:
    batch = Batch.make()
    large = Batch.make(seed=7, size=(8, 9))
    mixed = replace(batch, features1=large.features1, cam1=large.cam1)
    small = [
        torch.nn.functional.interpolate(x, (4, 5), mode="bilinear", align_corners=True)
        for x in (large.features1, large.cam1)
    ]
    on_grid = replace(batch, features1=small[0], cam1=small[1])
    drawn = on_grid.drawn()
    torch.testing.assert_close(
        pixel_to_prototype_contrast_loss(*mixed, *drawn), pixel_to_prototype_contrast_loss(*on_grid, *drawn)
    )
    explicit = pixel_to_prototype_contrast_loss(*mixed, *drawn, grid=(4, 5))
    torch.testing.assert_close(explicit, pixel_to_prototype_contrast_loss(*on_grid, *drawn))


def test_gradient_reaches_features_and_no_map_or_prototype() -> None:
    batch = Batch.make()
    maps = [batch.cam1.requires_grad_(), batch.cam2.requires_grad_()]
    prototypes = [p.requires_grad_() for p in batch.prototypes(2)]
    batch.features1.requires_grad_()
    total = pixel_to_prototype_contrast_loss(*batch, None, None, *prototypes).total
    grads = torch.autograd.grad(total, [batch.features1, *maps, *prototypes], allow_unused=True)
    assert grads[0].any()
    assert grads[1:] == (None,) * 4


@given(st.sets(st.integers(0, 5)), st.sampled_from([(0, 7), (3, 13), (1, 3)]))
def test_absent_classes_can_be_left_out_as_if_there_were_none(shown: set[int], semi_hard: tuple[int, int]) -> None:
    batch, kept = Batch.make(classes=6), sorted(shown)
    labels = torch.zeros(2, 6)
    labels[:, kept] = 1
    batch = replace(batch, labels=labels)
    drawn, prototypes = batch.drawn(), batch.prototypes(2)
    dropped = pixel_to_prototype_contrast_loss(*batch, *drawn, *prototypes, drop_absent=True, semi_hard=semi_hard)
    few = replace(batch, cam1=batch.cam1[:, kept], cam2=batch.cam2[:, kept], labels=labels[:, kept])
    rows = [p[[0, *(k + 1 for k in kept)]] for p in prototypes]
    torch.testing.assert_close(dropped, pixel_to_prototype_contrast_loss(*few, *drawn, *rows, semi_hard=semi_hard))
    released = pixel_to_prototype_contrast_loss(*batch, *drawn, *prototypes, semi_hard=semi_hard)
    assert (dropped.cross_prototype < released.cross_prototype) == (len(kept) < 6)


def test_repaired_prototypes_are_estimated_from_present_classes() -> None:
    batch = Batch.make(classes=4)
    drawn = batch.drawn()
    options = {"labels": batch.labels, "background": "low_foreground"}
    views = ((batch.features1, batch.cam1), (batch.features2, batch.cam2))
    rows = [estimate_prototypes(features, cam, 20 // 8, **options).prototypes for features, cam in views]
    torch.testing.assert_close(
        pixel_to_prototype_contrast_loss(*batch, *drawn, mask_by_label=True, background_prototype="low_foreground"),
        pixel_to_prototype_contrast_loss(*batch, *drawn, *rows),
    )


def one_pixel_class() -> Batch:
    batch = Batch.make(images=1, classes=2)
    cam = torch.zeros(1, 2, 4, 5, dtype=torch.float64)
    cam[0, 0, 0, 0] = 1
    return replace(batch, cam1=cam, cam2=cam.flip(3), labels=torch.ones(1, 2))


DEGENERATE = {
    "one image": Batch.make(images=1),
    "one class": Batch.make(classes=1),
    "a class of one pixel": one_pixel_class(),
    "no label": replace(Batch.make(), labels=torch.zeros(2, 15)),
    "maps of zeros": replace(Batch.make(), cam1=torch.zeros(2, 15, 4, 5), cam2=torch.zeros(2, 15, 4, 5)),
    "features of zeros": replace(Batch.make(), features1=torch.zeros(2, 6, 4, 5), features2=torch.zeros(2, 6, 4, 5)),
    "five classes": Batch.make(classes=5),
    "one pixel": Batch.make(images=1, classes=2, size=(1, 1)),
    "a row": Batch.make(size=(1, 9)),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("repaired", [False, True], ids=["released", "repaired"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_degenerate_batches_stay_finite(name: str, repaired: bool, dtype: torch.dtype) -> None:
    batch = Batch(*(x.to(dtype) for x in DEGENERATE[name]))
    leaves = [batch.features1.requires_grad_(), batch.features2.requires_grad_()]
    options = {"mask_by_label": True, "background_prototype": "low_foreground", "drop_absent": True}
    terms = pixel_to_prototype_contrast_loss(*batch, **(options if repaired else {}))
    assert all(term.isfinite() for term in terms)
    assert all(bool(term >= 0) for term in terms)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(terms.total, leaves))


def test_class_of_one_pixel_costs_nothing_within_a_view_but_is_counted() -> None:
    batch = one_pixel_class()
    drawn, prototypes = batch.drawn(), batch.prototypes(2)
    mask = batch.classes[0]
    assert (mask == 1).sum() == 1
    terms = pixel_to_prototype_contrast_loss(*batch, *drawn, *prototypes)
    reference = reference_ppc.contrast((batch.features1, batch.features2), prototypes, batch.classes, drawn, (2, 3))
    torch.testing.assert_close(terms.intra, reference[2])
    also = [x | (y == 1) for x, y in zip(drawn, batch.classes, strict=True)]  # a draw that can't be
    torch.testing.assert_close(pixel_to_prototype_contrast_loss(*batch, *also, *prototypes).intra, terms.intra)


def test_memory_grows_with_pixels_times_classes() -> None:
    images, classes, channels, size = 2, 20, 512, 6
    batch = Batch.make(images=images, classes=classes, size=(size, size))
    pixels = images * size * size
    wide = [torch.rand(images, channels, size, size) for _ in range(2)]
    prototypes = [torch.rand(1 + classes, channels) for _ in range(2)]
    batch = replace(batch, features1=wide[0].requires_grad_(), features2=wide[1].requires_grad_())
    with LargestTensor() as ours:
        pixel_to_prototype_contrast_loss(*batch, None, None, *prototypes).total.backward()
    assert ours.elements == pixels * channels  # the features themselves
    rows = wide[0].detach().flatten(2).mT.flatten(0, 1)
    with LargestTensor() as released:
        reference_ppc.intra_costs(rows, prototypes[0], torch.zeros(pixels, dtype=torch.int64))
    assert released.elements == pixels * (1 + classes) * channels


def compare_two_processes_with_one(rank: int, address: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        batch = Batch.make()
        leaves = [batch.features1.requires_grad_(), batch.features2.requires_grad_()]
        mine = Batch(*(x.detach()[rank : rank + 1] for x in batch))
        ours = [mine.features1.requires_grad_(), mine.features2.requires_grad_()]
        drawn = batch.drawn()
        expected = pixel_to_prototype_contrast_loss(*batch, *drawn)
        result = pixel_to_prototype_contrast_loss(*mine, *(x[rank : rank + 1] for x in drawn), sync=True)
        torch.testing.assert_close(result, expected)
        whole, part = torch.autograd.grad(expected.total, leaves), torch.autograd.grad(result.total, ours)
        for a, b in zip(part, whole, strict=True):
            torch.testing.assert_close(a / 2, b[rank : rank + 1])  # as DistributedDataParallel averages
        # draws of their own: each process has another generator, and all come to one value
        generator = torch.Generator().manual_seed(rank)
        value = pixel_to_prototype_contrast_loss(*mine, generator=generator, sync=True).total.detach()
        values = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(values, value)
        assert torch.equal(*values)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_prototypes_and_draws_over_two_processes_are_those_of_one(tmp_path: Path) -> None:
    spawn: Callable = torch.multiprocessing.spawn
    spawn(compare_two_processes_with_one, args=((tmp_path / "meeting").as_uri(),), nprocs=2)


BATCH = Batch.make(classes=3)
BIGGER = Batch.make(images=3, classes=3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: pixel_to_prototype_contrast_loss(*replace(BATCH, features1=BATCH.features1[0])),
            ValueError,
            r"features1: expected shape \(B, D, H, W\), got \(6, 4, 5\)",
        ),
        (
            lambda: pixel_to_prototype_contrast_loss(*replace(BATCH, cam2=BATCH.cam2.long())),
            TypeError,
            "cam2: expected a floating-point tensor, got torch.int64",
        ),
        (
            lambda: pixel_to_prototype_contrast_loss(*replace(BATCH, labels=torch.ones(2, 4))),
            ValueError,
            r"labels: expected shape \(2, 3\) to match cam1, got \(2, 4\)",
        ),
        (
            lambda: pixel_to_prototype_contrast_loss(*replace(BATCH, features2=BIGGER.features2)),
            ValueError,
            r"features2: expected shape \(2, 6, \*, \*\) to match features1, got \(3, 6, 4, 5\)",
        ),
        (
            lambda: pixel_to_prototype_contrast_loss(*BATCH, torch.ones(2, 5, 5)),
            ValueError,
            r"drawn1: expected shape \(2, 4, 5\) for the pixels of the grid, got \(2, 5, 5\)",
        ),
        (
            lambda: pixel_to_prototype_contrast_loss(*BATCH, None, None, None, torch.ones(3, 6)),
            ValueError,
            r"prototypes2: expected shape \(4, 6\) for classes with background, and features1, got \(3, 6\)",
        ),
        (lambda: PixelToPrototypeContrastLoss(temperature=0), ValueError, "temperature: expected a positive number"),
        (lambda: PixelToPrototypeContrastLoss(confident=0), ValueError, r"confident: expected a number in \(0, 1\]"),
        (
            lambda: PixelToPrototypeContrastLoss(semi_hard=(3, 3)),
            ValueError,
            r"semi_hard: expected ranks 0 <= first < last, got \(3, 3\)",
        ),
        (lambda: PixelToPrototypeContrastLoss(hard_ratio=0.4), ValueError, r"hard_ratio: expected a number in \[0.5"),
    ],
)
def test_messages(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
