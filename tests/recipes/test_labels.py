"""Maps and masks on disk, what a CRF makes of them, and how much of an image they cover."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recipes import cam
from recipes.pipeline.cams import read_cam, share_of_classes, write_maps
from recipes.pipeline.labels import masks_by_threshold, read_mask, refine_masks, write_masks
from recipes.pipeline.ratios import foreground_ratio, read_ratios, write_ratios
from recipes.pipeline.run import Run, start
from wsss_modules import cam_to_mask


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return start("cam", cam.Config(data="demo:tiny", out=tmp_path, workers=0, accelerator="cpu"))


def halves(run: Run, name: str) -> Tensor:
    """The first tagged class on the left of an image and background on the right: (H, W)."""
    mask = torch.zeros(run.dataset.size(name), dtype=torch.int64)
    mask[:, : mask.shape[1] // 2] = int(run.dataset.labels(name).argmax()) + 1
    return mask


@given(st.integers(0, 99))
def test_shares_above_one_half_are_the_argmax_with_the_background(seed: int) -> None:
    scores = torch.rand(4, 6, 7, generator=torch.Generator().manual_seed(seed))
    scores[:, 0, 0] = 0  # nothing at all is background
    shares = share_of_classes(scores)
    assert ((shares >= 0) & (shares <= 1)).all()
    assert torch.equal(cam_to_mask(shares[None], 0.5)[0], scores.argmax(0))


def test_maps_are_read_as_they_were_written_and_become_masks(run: Run) -> None:
    def maps_of(name: str) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        half = halves(run, name)
        return {"keys": half.amax()[None], "cam": (half > 0).float()[None] * 0.75}

    write_maps(run, run.train, maps_of)
    masks_by_threshold(run, 0.5, everywhere=True)
    for name in run.train:
        assert read_cam(run, name).cam.max() == 0.75
        assert np.array_equal(read_mask(run, name), halves(run, name))
        assert run.path("mask_crf", f"{name}.png").exists()


def test_masks_may_be_refined_by_something_else_and_where_they_are_measured_only(run: Run) -> None:
    run.dataset = type(run.dataset)(**{**vars(run.dataset), "seed": run.train[:2]})
    write_masks(run, run.train, lambda name: halves(run, name))
    refine_masks(run, False, lambda name: halves(run, name).flip(1))
    assert {path.stem for path in run.path("mask_crf").glob("*.png")} == set(run.train[:2])
    assert np.array_equal(read_mask(run, run.train[0], "mask_crf"), halves(run, run.train[0]).flip(1))


def test_ratios_are_those_of_the_masks_at_any_size(run: Run) -> None:
    sizes = set()

    def mask_of(image: Tensor, labels: Tensor) -> Tensor:
        sizes.add(tuple(image.shape[1:]))
        return torch.full(image.shape[1:], int(labels.argmax()) + 1)

    write_ratios(run, mask_of, 0.5, "ratios1")
    assert sizes == {tuple(round(side / 2) for side in run.dataset.size(name)) for name in run.train}
    first = np.stack([run.dataset.labels(name) for name in run.train]).argmax(1)
    assert torch.equal(read_ratios(run, "ratios1"), torch.eye(len(run.dataset.classes))[first])


def test_ratio_counts_pixels_of_classes() -> None:
    mask = np.array([[0, 1, 1], [3, 255, 0]], np.uint8)
    assert foreground_ratio(mask, 3).tolist() == [2 / 6, 0, 1 / 6]
