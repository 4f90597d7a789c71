"""BBAM's detector speaks of given proposals, and its maps of each object become masks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes import bbam
from recipes.pipeline.cams import save_cam
from recipes.pipeline.data.boxes import Boxes, read_boxes
from recipes.pipeline.detection import Detector
from recipes.pipeline.instances import (
    Found,
    MaskHead,
    SeededBoxes,
    average_precision,
    find_instances,
    true_instances,
)
from recipes.pipeline.labels import read_mask, threshold_mask
from recipes.pipeline.models import build_trunk
from recipes.pipeline.run import Run, start
from tests.recipes.synthetic import make_dataset

TINY = bbam.PRESETS["tiny"]


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector(build_trunk("tf_efficientnet_lite0", "random"), 6, TINY.detect).eval()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return start("bbam", replace(TINY, out=tmp_path, workers=0, accelerator="cpu"), takes=())


def test_detections_keep_the_order_of_the_proposals(detector: Detector) -> None:
    images = torch.randn(3, 3, 96, 96)
    proposals = torch.tensor([[2, 5, 5, 40, 60], [0, 8, 3, 30, 80], [2, 1, 1, 90, 90], [0, 20, 20, 44, 44]]).float()
    with torch.no_grad():
        logits, deltas = detector.detections(images, proposals)
        for k, proposal in enumerate(proposals):
            alone = torch.cat([proposal.new_zeros(1), proposal[1:]])[None]
            image = images[int(proposal[0])][None]
            torch.testing.assert_close(detector.detections(image, alone)[0][0], logits[k], rtol=1e-3, atol=1e-3)
        assert deltas.shape == (4, 28)
        still = detector.decode(torch.zeros_like(deltas), proposals)
    torch.testing.assert_close(still, proposals[:, None, 1:].expand(-1, 7, -1))


def test_the_losses_of_a_batch_with_and_without_boxes_are_finite(detector: Detector) -> None:
    rows = torch.zeros(2, 3, 5)
    rows[0, :2] = torch.tensor([[2.0, 5, 5, 60, 60], [6.0, 30, 20, 90, 96]])
    detector.train()
    try:
        terms = detector(torch.randn(2, 3, 96, 96), rows)
        terms.total.backward()
    finally:
        detector.eval()
    assert all(term.isfinite() for term in terms)
    torch.testing.assert_close(terms.total, sum(terms[1:]))


def test_the_strides_of_the_pyramid_must_be_those_of_the_trunk() -> None:
    with pytest.raises(ValueError, match=r"strides: tf_efficientnet_lite0 has levels of"):
        Detector(build_trunk("tf_efficientnet_lite0", "random"), 6, replace(TINY.detect, strides=(8, 64)))


@pytest.mark.slow
def test_objects_become_maps_and_masks(run: Run, detector: Detector) -> None:
    boxes = read_boxes(run.dataset, run.train, optional=run.val)
    bbam.write_maps(run, detector, boxes, TINY.explain)
    name = run.train[0]
    corners, classes = boxes.tensors(name)
    objects = bbam.read_objects(run, name, len(classes))
    assert len(objects) == len(corners)
    assert all(float(one.min()) >= 0 and float(one.max()) <= 1 for one in objects)
    inside = bbam.boxes_to_masks(corners, run.dataset.size(name))
    assert not threshold_mask(run, name, 0.0)[~inside.any(0)].any()
    bbam.write_instance_masks(run, boxes, TINY.masks)
    label = torch.from_numpy(read_mask(run, name))
    assert not label[~inside.any(0)].any()
    assert set(label.unique().tolist()) <= {0, 255, *classes.tolist()}
    item = SeededBoxes(run, boxes, detector)[0]
    assert item["boxes"].shape == (boxes.most, 5)
    assert ((item["strict"] == 0) | (item["strict"] == 1)).all()
    assert not item["strict"][len(corners) :].any()


class SaysFirstClass:
    """A detector that sees the first of two classes in every proposal, the better the brighter the image is there."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def detections(self, images: torch.Tensor, proposals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append(len(images))
        light = 3 * images.mean((1, 2, 3))[proposals[:, 0].long()]
        return torch.stack([-light, light, -light], 1), torch.zeros(len(proposals), 12)

    def decode(self, deltas: torch.Tensor, proposals: torch.Tensor) -> torch.Tensor:
        return proposals[:, None, 1:].expand(-1, 3, 4)


def test_an_object_that_no_proposal_finds_has_an_empty_map_and_costs_no_pass() -> None:
    image, config = torch.ones(1, 3, 48, 48), replace(TINY.explain, proposals=200, at_once=2)
    boxes = torch.tensor([[4, 4, 30, 30], [10, 10, 40, 40], [8, 2, 36, 44]]).float()
    both, alone = SaysFirstClass(), SaysFirstClass()
    missed, first, second = bbam.explain_image(both, image, boxes, torch.tensor([2, 1, 1]), config, seed=3)
    assert not missed.any()
    assert max(both.seen) == 2
    assert both.seen[1:] == [1] + [2] * config.steps, "the two that are found, together"
    expected = bbam.explain_image(alone, image, boxes, torch.tensor([1, 1, 1]), config, seed=3)
    torch.testing.assert_close((first, second), tuple(expected[1:]))
    assert first.any()
    assert second.any()


def instances(*masks: list[list[int]], classes: list[int], scores: list[float]) -> Found:
    return Found(np.array(masks, dtype=bool).reshape(-1, 1, 8), np.array(classes), np.array(scores))


def test_it_says_how_many_objects_the_detector_does_not_find(run: Run, capsys) -> None:
    seen, unseen = torch.full((4, 4), 0.5), torch.zeros(4, 4)
    first, second = run.train[:2]
    boxes = Boxes("annotations", {name: np.zeros((2, 5), np.float32) for name in (first, second)})
    for name, maps in ((first, (seen, unseen)), (second, (unseen, unseen))):
        save_cam(run, name, torch.tensor([1]), seen[None], **{f"object_{k}": one for k, one in enumerate(maps)})
    bbam.tell_unexplained(run, boxes)
    assert "3 of 4 objects have an empty map" in capsys.readouterr().out
    save_cam(run, second, torch.tensor([1]), seen[None], object_0=seen, object_1=seen)
    bbam.tell_unexplained(run, Boxes("annotations", {second: boxes.of[second]}))
    assert capsys.readouterr().out == ""


def test_average_precision_counts_each_instance_once() -> None:
    left, right, most = [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0]
    truth = {"a": instances(left, right, classes=[1, 1], scores=[1, 1])}
    known = {"a": np.zeros((1, 8), dtype=bool)}

    def ap(*masks: list[int], scores: list[float], overlap: float = 0.5) -> float:
        found = {"a": instances(*masks, classes=[1] * len(masks), scores=scores)}
        return average_precision(found, truth, known, overlap)[1]

    assert ap(left, right, scores=[0.9, 0.8]) == 1
    assert ap(left, scores=[0.9]) == 0.5
    assert ap(left, most, right, scores=[0.9, 0.8, 0.7]) == pytest.approx((1 + 2 / 3) / 2), "found twice"
    assert ap(most, right, scores=[0.9, 0.8], overlap=0.8) == pytest.approx(0.25), "the surer one is wrong"
    assert ap(scores=[]) == 0
    nobody = {"a": instances(left, classes=[2], scores=[0.9])}
    assert average_precision(nobody, truth, known) == {1: 0.0}, "of another class"
    known["a"][0, 3] = True
    assert ap(most, right, scores=[0.9, 0.8], overlap=0.99) == 1, "an ignored pixel takes no part"


def test_true_instances_are_told_apart_by_boxes_or_not_at_all(tmp_path: Path) -> None:
    photos = make_dataset(tmp_path)
    boxes = read_boxes(photos, photos.train, "components_of_masks")
    name = photos.train[0]
    truth = true_instances(photos, boxes, name)
    assert np.array_equal(truth.masks[0], photos.mask(name) == truth.classes[0])
    twice = Boxes("annotations", {name: np.repeat(boxes.of[name], 2, 0)})
    assert true_instances(photos, twice, name) is None
    assert true_instances(photos, boxes, photos.val[0]) is None, "no boxes"


@pytest.mark.slow
def test_the_mask_head_leaves_the_detector_alone_and_out_of_its_checkpoint(run: Run, detector: Detector) -> None:
    head = MaskHead(detector, 6, 8)
    detector.zero_grad()
    assert all(name.startswith("layers.") for name in head.state_dict())
    boxes = torch.tensor([[0, 5, 5, 60, 60], [1, 30, 20, 90, 90]]).float()
    head(torch.randn(2, 3, 96, 96), boxes).sum().backward()
    assert all(parameter.grad is None for parameter in detector.parameters())
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    found = find_instances(detector, head, image, score=0.0)
    assert found.masks.shape == (len(found.classes), 50, 70)
    assert len(found.scores) == len(found.classes)
