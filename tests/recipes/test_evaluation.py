from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassJaccardIndex

from recipes.pipeline.evaluation import FIXED, ORACLE, Confusion, Measurement, evaluate_masks, measure_seeds


@dataclass
class Masks:
    classes: tuple[str, ...]
    truth: dict[str, np.ndarray | None]
    reads: list[str] = field(default_factory=list)

    def mask(self, name: str) -> np.ndarray | None:
        self.reads.append(name)
        return self.truth[name]


def random_masks(generator: np.random.Generator, classes: int, count: int, size=(7, 9)) -> dict[str, np.ndarray]:
    values = np.array([*range(1 + classes), 255])
    return {f"i{n}": generator.choice(values, size).astype(np.uint8) for n in range(count)}


def random_cams(generator: np.random.Generator, names, classes: int, size=(7, 9), levels: int = 20):
    """CAMs on a coarse grid of values, so that ties with each other and with thresholds are common."""
    cams = {}
    for name in names:
        keys = np.flatnonzero(generator.random(classes) < 0.6) + 1
        cams[name] = (generator.integers(0, levels + 1, (len(keys), *size)) / levels).astype(np.float16), keys
    return cams


def brute_force(cams, truth, classes, threshold) -> Confusion:
    """The released way: stack the constant on top of the maps, take the argmax, read the keys."""
    confusion = Confusion(classes)
    for name, (cam, keys) in cams.items():
        scores = np.pad(cam.astype(np.float32), ((1, 0), (0, 0), (0, 0)), constant_values=threshold)
        confusion.update(np.pad(keys, (1, 0))[scores.argmax(0)], truth[name])
    return confusion


def test_confusion_counts_by_hand():
    confusion = Confusion(("cat", "dog"))
    confusion.update(np.array([[0, 1, 1], [2, 2, 0]]), np.array([[0, 1, 2], [2, 255, 255]]))
    assert confusion.matrix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert confusion.iou().tolist() == [100.0, 50.0, 50.0]
    assert confusion.miou() == pytest.approx(200 / 3)
    assert confusion.precision().tolist() == [100.0, 50.0, 100.0]
    assert confusion.recall().tolist() == [100.0, 100.0, 50.0]


def test_confusion_counts_over_the_data_set_and_not_per_image():
    confusion = Confusion(("cat",))
    confusion.update(np.ones((1, 1), int), np.ones((1, 1), int))  # IoU of cat in this image: 100 %
    confusion.update(np.ones((1, 9), int), np.zeros((1, 9), int))  # and here 0 %
    assert confusion.iou()[1] == pytest.approx(10.0)


def test_absent_class_is_nan_and_left_out_of_the_mean():
    confusion = Confusion(("cat", "dog", "cow"))
    confusion.update(np.array([[0, 1]]), np.array([[0, 2]]))
    assert np.isnan(confusion.iou()).tolist() == [False, False, False, True]
    assert np.isnan(confusion.precision()).tolist() == [False, False, True, True]
    assert np.isnan(confusion.recall()).tolist() == [False, True, False, True]
    assert confusion.miou() == pytest.approx(100 / 3)


def test_only_ignored_pixels_give_nan_and_no_warning():
    confusion = Confusion(("cat",))
    confusion.update(np.ones((2, 2), int), np.full((2, 2), 255))
    assert math.isnan(confusion.miou())
    assert confusion.measurement("mask", "seed", 1).unsure == 0.0


def test_unsure_pixel_is_a_miss_of_its_class_and_no_false_positive():
    sure, unsure = Confusion(("cat",)), Confusion(("cat",))
    truth = np.array([[1, 1, 0, 0, 255]])
    sure.update(np.array([[1, 0, 0, 0, 0]]), truth)
    unsure.update(np.array([[1, 255, 0, 0, 255]]), truth)
    assert unsure.iou()[1] == sure.iou()[1] == 50.0
    assert sure.iou()[0] == pytest.approx(200 / 3)  # the missed cat pixel was a false positive of background
    assert unsure.iou()[0] == 100.0
    assert unsure.recall().tolist() == [100.0, 50.0]
    assert unsure.measurement("mask", "seed", 1).unsure == 25.0


@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(1, 6), count=st.integers(1, 4))
def test_agrees_with_torchmetrics(seed, classes, count):
    generator = np.random.default_rng(seed)
    truth = random_masks(generator, classes, count)
    metric = MulticlassJaccardIndex(num_classes=1 + classes, ignore_index=255, average=None)
    macro = MulticlassJaccardIndex(num_classes=1 + classes, ignore_index=255)
    predictions = {name: generator.integers(0, 1 + classes, mask.shape) for name, mask in truth.items()}
    for name, mask in truth.items():
        pair = torch.from_numpy(predictions[name]), torch.from_numpy(mask.astype(np.int64))
        metric.update(*pair)
        macro.update(*pair)
    measured = evaluate_masks(predictions.__getitem__, Masks(tuple("abcdefg"[:classes]), truth), list(truth))
    ours = np.nan_to_num(np.array(list(measured.iou.values())))
    np.testing.assert_allclose(ours, 100 * metric.compute().numpy(), rtol=1e-5)
    assert measured.miou == pytest.approx(100 * macro.compute().item(), rel=1e-5)


@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.integers(1, 4),
    count=st.integers(1, 4),
    workers=st.integers(1, 3),
    threshold=st.sampled_from([0.0, 0.05, 0.15, 0.3, 0.333, 1.0]),
)
def test_sweep_equals_brute_force_at_every_threshold(seed, classes, count, workers, threshold):
    generator = np.random.default_rng(seed)
    names = tuple("abcd"[:classes])
    truth = random_masks(generator, classes, count)
    cams = random_cams(generator, truth, classes)
    thresholds = [i / 20 for i in range(20)]
    sweep = measure_seeds(
        cams.__getitem__, Masks(names, truth), list(truth), threshold=threshold, thresholds=thresholds, workers=workers
    )
    slow = [brute_force(cams, truth, names, t).measurement("seed", "seed", count, t, FIXED) for t in thresholds]
    np.testing.assert_array_equal(np.array(sweep.curve), np.array([(m.threshold, m.miou) for m in slow]))
    fixed = brute_force(cams, truth, names, threshold).measurement("seed", "seed", count, threshold, FIXED)
    assert sweep.fixed.to_dict() == fixed.to_dict()
    best = max(slow, key=lambda m: (m.miou, -m.threshold))
    assert {**sweep.best.to_dict(), "threshold_from": FIXED, "curve": []} == best.to_dict()


@pytest.mark.parametrize("value", [0.15, 0.3, 0.7])
def test_background_wins_a_tie_in_float32(value):
    """float32(0.15) is above 0.15 and float32(0.7) below 0.7: in double precision these ties would not be ties."""
    cam = np.full((1, 2, 2), value, np.float32)
    data = Masks(("cat",), {"a": np.zeros((2, 2), np.uint8)})
    sweep = measure_seeds(lambda _: (cam, np.array([1])), data, ["a"], threshold=value, thresholds=[value - 0.01])
    assert sweep.fixed.iou["background"] == 100.0
    assert sweep.best.iou["background"] == 0.0


def test_first_class_wins_a_tie():
    cam = np.full((2, 1, 1), 0.5, np.float32)
    data = Masks(("cat", "dog"), {"a": np.full((1, 1), 1, np.uint8)})
    assert measure_seeds(lambda _: (cam, np.array([1, 2])), data, ["a"], threshold=0.2).fixed.iou["cat"] == 100.0
    assert measure_seeds(lambda _: (cam, np.array([2, 1])), data, ["a"], threshold=0.2).fixed.iou["cat"] == 0.0


def test_sweep_reads_every_cam_and_truth_once():
    generator = np.random.default_rng(0)
    truth = random_masks(generator, 3, 5)
    data, cams, reads = Masks(("a", "b", "c"), truth), random_cams(generator, truth, 3), []

    def read(name):
        reads.append(name)
        return cams[name]

    measure_seeds(read, data, list(truth), threshold=0.2)
    assert sorted(reads) == sorted(data.reads) == sorted(truth)


def test_sweep_labels_the_oracle():
    data = Masks(("cat",), {"a": np.array([[0, 1]], np.uint8)})
    sweep = measure_seeds(lambda _: (np.array([[[0.4, 0.8]]]), np.array([1])), data, ["a"], threshold=0.2)
    assert (sweep.best.threshold_from, sweep.best.threshold, sweep.best.miou) == (ORACLE, 0.4, 100.0)
    assert sweep.best.oracle
    assert sweep.best.curve == sweep.curve
    assert (sweep.fixed.threshold_from, sweep.fixed.threshold, sweep.fixed.miou) == (FIXED, 0.2, 25.0)
    assert not sweep.fixed.oracle
    assert sweep.fixed.curve == ()


def test_image_without_present_class_is_all_background():
    data = Masks(("cat",), {"a": np.array([[0, 1, 255]], np.uint8)})
    sweep = measure_seeds(lambda _: (np.zeros((0, 1, 3)), np.zeros(0, int)), data, ["a"], threshold=0.0)
    assert sweep.fixed.iou == {"background": 50.0, "cat": 0.0}


def test_result_does_not_depend_on_the_number_of_workers():
    generator = np.random.default_rng(1)
    truth = random_masks(generator, 3, 11)
    predictions = random_masks(generator, 3, 11)
    data = Masks(("a", "b", "c"), truth)
    one, *others = (evaluate_masks(predictions.__getitem__, data, list(truth), workers=n) for n in (1, 2, 5, 40))
    assert all(other == one for other in others)
    assert one.images == 11
    assert one.unsure > 0


def test_measurement_survives_json():
    data = Masks(("cat", "dog"), {"a": np.array([[0, 1]], np.uint8)})
    sweep = measure_seeds(lambda _: (np.array([[[0.4, 0.8]]]), np.array([1])), data, ["a"], threshold=0.2)
    text = json.dumps(sweep.best.to_dict(), allow_nan=False)
    again = Measurement.from_dict(json.loads(text))
    assert math.isnan(again.iou["dog"])
    assert again.to_dict() == sweep.best.to_dict()
    assert again.curve == sweep.best.curve


def test_measurement_reads_the_nan_of_pythons_json():
    values = Confusion(("cat",)).measurement("mask", "seed", 0).to_dict()
    text = json.dumps({**values, "miou": math.nan, "added_later": 1})
    assert math.isnan(Measurement.from_dict(json.loads(text)).miou)


ONE = Masks(("cat",), {"a": np.zeros((2, 3), np.uint8), "none": None})


@pytest.mark.parametrize(
    ("prediction", "error", "message"),
    [
        (np.zeros((3, 2), int), ValueError, r"prediction of image 'a': expected .*\(2, 3\), got \(3, 2\)"),
        (np.zeros((1, 2, 3), int), ValueError, r"got \(1, 2, 3\)"),
        (np.full((2, 3), 2), ValueError, r"prediction of image 'a': expected values 0\.\.1 or 255, got 2"),
        (np.full((2, 3), -1), ValueError, r"got -1"),
        (np.zeros((2, 3)), TypeError, r"expected integers .*, got float64; did you pass scores\?"),
    ],
)
def test_wrong_prediction_is_named(prediction, error, message):
    with pytest.raises(error, match=message):
        evaluate_masks(lambda _: prediction, ONE, ["a"])


@pytest.mark.parametrize(
    ("cam", "keys", "message"),
    [
        (np.zeros((1, 3, 2)), [1], r"cam of image 'a': expected shape \(1, 2, 3\), .*got \(1, 3, 2\)"),
        (np.zeros((2, 2, 3)), [1], r"expected shape \(1, 2, 3\)"),
        (np.zeros((1, 2, 3)), [0], r"keys of image 'a': expected distinct classes 1\.\.1, got \[0\]"),
        (np.zeros((2, 2, 3)), [1, 1], r"got \[1, 1\]"),
        (np.full((1, 2, 3), np.nan), [1], r"cam of image 'a': expected numbers, got nan"),
    ],
)
def test_wrong_cam_is_named(cam, keys, message):
    with pytest.raises(ValueError, match=message):
        measure_seeds(lambda _: (cam, np.array(keys)), ONE, ["a"], threshold=0.2)


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="names: expected at least one image"):
        evaluate_masks(lambda _: np.zeros((2, 3), int), ONE, [])
    with pytest.raises(ValueError, match="image 'none': expected a ground-truth mask"):
        evaluate_masks(lambda _: np.zeros((2, 3), int), ONE, ["none"])
    with pytest.raises(ValueError, match="thresholds: expected at least one"):
        measure_seeds(lambda _: (np.zeros((1, 2, 3)), np.array([1])), ONE, ["a"], threshold=0.2, thresholds=[])
    with pytest.raises(ValueError, match="thresholds: expected finite"):
        measure_seeds(lambda _: (np.zeros((1, 2, 3)), np.array([1])), ONE, ["a"], threshold=math.nan)


def test_unsure_can_be_refused():
    with pytest.raises(ValueError, match=r"image 'a': 6 pixels are 255 \(unsure\)"):
        evaluate_masks(lambda _: np.full((2, 3), 255), ONE, ["a"], unsure="refuse")
    with pytest.raises(ValueError, match="unsure: expected 'wrong' or 'refuse', got 'skip'"):
        evaluate_masks(lambda _: np.zeros((2, 3), int), ONE, ["a"], unsure="skip")


def test_truth_with_unknown_value_is_named():
    data = Masks(("cat",), {"a": np.full((2, 3), 7, np.uint8)})
    with pytest.raises(ValueError, match=r"ground truth of image 'a': expected values 0\.\.1 or 255, got 7"):
        evaluate_masks(lambda _: np.zeros((2, 3), int), data, ["a"])


def test_merge_wants_the_same_classes():
    with pytest.raises(ValueError, match="other: expected a confusion over"):
        Confusion(("cat",)).merge(Confusion(("dog",)))
