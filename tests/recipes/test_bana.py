"""BANA's networks: a classifier of boxes, and a segmentation network that ends in cosines."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes import bana
from recipes.pipeline.data.boxes import read_boxes
from recipes.pipeline.files import save_mask
from recipes.pipeline.run import Run, start
from recipes.pipeline.training import crop_transform

TINY = bana.PRESETS["tiny"]
BOX = replace(TINY.box, weights="random", crop=64)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return start("bana", replace(TINY, out=tmp_path, workers=0, accelerator="cpu"), takes=())


@pytest.mark.parametrize("architecture", ["deeplabv3plus", "largefov"])
def test_the_segmentation_network_ends_in_cosines(architecture: str) -> None:
    config = replace(TINY.segment, architecture=architecture, weights="random")
    model = bana.CosineSegmenter(config, 4, temperature=20.0).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 64, 64))
    assert logits.shape[1] == 4
    assert logits.abs().max() <= 20
    assert logits.std() > 0
    names = {id(p) for head in model.head_modules for p in head.parameters()}
    assert all(p.requires_grad for p in model.parameters() if id(p) in names)
    crf = model.crf_settings
    deviations = crf.bilateral_sxy, crf.bilateral_srgb, crf.gaussian_sxy
    assert deviations == ((121, 5, 3) if architecture == "largefov" else (67, 3, 1)), "of VGG-16 and of ResNet-101"
    assert (crf.bilateral_weight, crf.gaussian_weight) == (4, 3)


def test_both_labels_are_cut_alike(run: Run) -> None:
    for name in run.train:
        mask = np.random.default_rng(0).integers(0, 3, run.dataset.size(name)).astype(np.uint8)
        for folder in ("mask", "mask_crf"):
            save_mask(run.path(folder, f"{name}.png"), mask, run.dataset.palette_index)
    transform = crop_transform(bana.RandomScale(0.5, 1.5), 64, (0.0,) * 3, (1.0,) * 3)
    for index in range(4):
        both = bana.TwoLabelCrops(run, transform)[index]["mask"]
        assert both.shape == (2, 64, 64)
        assert torch.equal(both[0], both[1])


def test_a_batch_without_boxes_or_without_background_costs_something_finite(run: Run) -> None:
    net = bana.BoxNet(bana.make_trunk(run, BOX, 16), 6, BOX)
    images = torch.randn(2, 3, 64, 64)
    covering = torch.tensor([[[2.0, 0, 0, 64, 64]], [[1.0, 0, 0, 64, 64]]])
    inside = torch.ones(2, 1, 64, 64)
    for rows, part in ((covering, inside), (covering * 0, inside), (covering * 0, inside * 0)):
        loss = net(images, rows, part)
        loss.backward()
        assert loss.isfinite()


@pytest.mark.slow
def test_labels_lie_in_the_boxes(run: Run) -> None:
    boxes = read_boxes(run.dataset, run.train, optional=run.val)
    net = bana.BoxNet(bana.make_trunk(run, BOX, 16), 6, BOX)
    bana.write_labels(run, net, boxes, BOX)
    for name in run.train:
        corners, classes = boxes.tensors(name)
        for folder in ("mask", "mask_crf"):
            mask = torch.from_numpy(bana.read_mask(run, name, folder))
            inside = (
                bana.background_mask_from_boxes(torch.nn.functional.pad(corners, (1, 0)), 1, tuple(mask.shape)) == 0
            )
            assert not mask[~inside[0, 0]].any()
            assert set(mask.unique().tolist()) <= {0, *classes.tolist()}
    assert len(list(run.path("cam").glob("*.npz"))) == len(run.train) + len(run.val)
    assert not run.path("mask", f"{run.val[0]}.png").exists()
