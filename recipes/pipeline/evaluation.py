"""Measuring masks and CAMs against ground truth: one confusion matrix over a data set, each number with its conditions.

VOC mIoU is the mean over classes of TP / (TP + FP + FN), each counted over *all* pixels of *all* images; averaging the
IoU of single images gives another, higher number. Pixels whose truth is 255 take no part. A number is only comparable
with another of the same split, images, classes, threshold rule and CRF, so a :class:`Measurement` carries all of these.

Axes: K foreground classes, k classes present in an image, H W pixels, T thresholds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

IGNORE = 255
BACKGROUND = "background"
FIXED = "fixed"
ORACLE = "oracle: searched on the ground truth of this split"
THRESHOLDS = tuple(i / 100 for i in range(100))


class Truth(Protocol):
    """What the evaluation needs of a data set; ``recipes.pipeline.data.ImageSet`` has it."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The K foreground class names."""
        ...

    def mask(self, name: str) -> np.ndarray | None:
        """The ground truth (H, W): 0 background, 1..K classes, 255 ignore; None if there is none."""
        ...


@dataclass(frozen=True)
class Measurement:
    """One evaluation and the conditions it was taken under.

    Attributes:
        what: "seed", "mask", "mask+crf", "segmentation" or "segmentation+crf".
        split: name of the list of images, "seed" or "val".
        images: number of images measured.
        threshold: background threshold of a seed; None where there is none.
        threshold_from: "fixed" (chosen without looking at ground truth), an oracle note, or "" without a threshold.
        miou: mean of ``iou`` over the classes that occur, percent.
        iou: class name (``"background"`` included) to IoU in percent; nan for a class in neither truth nor prediction.
        precision: likewise; nan for a class that was never predicted.
        recall: likewise; nan for a class that never occurs.
        unsure: percent of the measured pixels that the prediction leaves at 255. They count as wrong.
        curve: (threshold, mIoU) of every threshold tried; empty unless thresholds were searched.
    """

    what: str
    split: str
    images: int
    threshold: float | None
    threshold_from: str
    miou: float
    iou: dict[str, float]
    precision: dict[str, float]
    recall: dict[str, float]
    unsure: float = 0.0
    curve: tuple[tuple[float, float], ...] = ()

    @property
    def oracle(self) -> bool:
        """Whether ground truth took part in choosing the threshold: the figure is an upper bound, not a result."""
        return self.threshold_from.startswith("oracle")

    @property
    def mean_precision(self) -> float:
        """Mean of ``precision`` over the classes that were predicted, background included; nan without any."""
        return _mean(self.precision.values())

    @property
    def mean_recall(self) -> float:
        """Mean of ``recall`` over the classes that occur, background included; nan without any."""
        return _mean(self.recall.values())

    def to_dict(self) -> dict[str, Any]:
        """As plain types for ``metrics.json``; nan becomes None, which JSON can hold."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        """The inverse of :meth:`to_dict`."""
        known = {f.name for f in dataclasses.fields(cls)}
        taken = {key: value for key, value in values.items() if key in known}
        for key in ("iou", "precision", "recall"):
            taken[key] = {name: math.nan if x is None else float(x) for name, x in taken[key].items()}
        taken["miou"] = math.nan if taken["miou"] is None else float(taken["miou"])
        taken["curve"] = tuple((float(t), math.nan if y is None else float(y)) for t, y in taken.get("curve", ()))
        return cls(**taken)


@dataclass
class Confusion:
    """Pixel counts of truth against prediction over any number of images.

    A prediction of 255 ("unsure", as in the affinity labels of PSA and IRN) is a miss for the class of the pixel and a
    false positive for none. It is never left out, which would reward a method for keeping quiet where it is hard;
    :attr:`Measurement.unsure` says how many there were.

    Args:
        classes: the K foreground class names.

    Example:
        >>> confusion = Confusion(("cat",))
        >>> confusion.update(np.array([[1, 1], [0, 255]]), np.array([[1, 0], [0, 255]]))
        >>> confusion.iou().tolist(), confusion.miou()
        ([50.0, 50.0], 50.0)
    """

    classes: tuple[str, ...]
    matrix: np.ndarray = field(init=False)  # (1+K, 1+K) int64, rows truth, columns prediction
    unsure: np.ndarray = field(init=False)  # (1+K,) int64, pixels of each true class that were predicted 255

    def __post_init__(self) -> None:
        self.classes = tuple(self.classes)
        count = 1 + len(self.classes)
        self.matrix = np.zeros((count, count), np.int64)
        self.unsure = np.zeros(count, np.int64)

    def update(self, prediction: np.ndarray, truth: np.ndarray, name: str = "") -> None:
        """Count one image.

        Args:
            prediction: (H, W) integers, 0 background, 1..K classes, 255 unsure.
            truth: (H, W) integers, 0 background, 1..K classes, 255 left out.
            name: name of the image, for the message.

        Raises:
            ValueError: the two differ in size (nothing is ever resized here), or hold another value.
            TypeError: either is not an integer array.
        """
        where = f" of image {name!r}" if name else ""
        classes = len(self.classes)
        if prediction.shape != truth.shape or truth.ndim != 2:
            raise ValueError(
                f"prediction{where}: expected the (height, width) of its ground truth {truth.shape}, "
                f"got {prediction.shape}; nothing is resized here, bring the scores to full size before the argmax"
            )
        columns = 2 + classes  # the last one is for 255
        valid = truth != IGNORE
        rows = _indices(truth, classes, f"ground truth{where}")[valid]
        hits = _indices(prediction, classes, f"prediction{where}")[valid]
        counts = np.bincount(rows * columns + np.minimum(hits, columns - 1), minlength=(1 + classes) * columns)
        counts = counts.reshape(1 + classes, columns)
        self.matrix += counts[:, :-1]
        self.unsure += counts[:, -1]

    def merge(self, other: Confusion) -> None:
        """Add the counts of another one over the same classes."""
        if other.classes != self.classes:
            raise ValueError(f"other: expected a confusion over {self.classes}, got one over {other.classes}")
        self.matrix += other.matrix
        self.unsure += other.unsure

    def iou(self) -> np.ndarray:
        """(1+K,) IoU in percent, background first; nan where a class is in neither truth nor prediction."""
        return _percent(self._hits, self._truth + self.matrix.sum(0) - self._hits)

    def miou(self) -> float:
        """Mean of :meth:`iou` over the classes that occur in truth or prediction; nan if nothing was counted."""
        iou = self.iou()
        return float(np.mean(iou[~np.isnan(iou)])) if not np.isnan(iou).all() else math.nan

    def precision(self) -> np.ndarray:
        """(1+K,) share of the predicted pixels of a class that are right, percent; nan if it was never predicted."""
        return _percent(self._hits, self.matrix.sum(0))

    def recall(self) -> np.ndarray:
        """(1+K,) share of the true pixels of a class that were found, percent; nan if it never occurs."""
        return _percent(self._hits, self._truth)

    def measurement(
        self, what: str, split: str, images: int, threshold: float | None = None, threshold_from: str = ""
    ) -> Measurement:
        """The counts as a :class:`Measurement` with the conditions given."""
        names = (BACKGROUND, *self.classes)

        def named(values: np.ndarray) -> dict[str, float]:
            return dict(zip(names, values.tolist(), strict=True))

        pixels = int(self._truth.sum())
        return Measurement(
            what=what,
            split=split,
            images=images,
            threshold=threshold,
            threshold_from=threshold_from,
            miou=self.miou(),
            iou=named(self.iou()),
            precision=named(self.precision()),
            recall=named(self.recall()),
            unsure=100.0 * int(self.unsure.sum()) / pixels if pixels else 0.0,
        )

    @property
    def _hits(self) -> np.ndarray:
        return np.diagonal(self.matrix)

    @property
    def _truth(self) -> np.ndarray:
        return self.matrix.sum(1) + self.unsure


class SeedSweep(NamedTuple):
    """Result of :func:`measure_seeds`.

    Attributes:
        curve: (threshold, mIoU in percent) for every threshold, ascending.
        best: the measurement at the threshold of highest mIoU, labelled as an oracle, with the curve.
        fixed: the measurement at the threshold that was fixed beforehand.
    """

    curve: tuple[tuple[float, float], ...]
    best: Measurement
    fixed: Measurement


def evaluate_masks(
    predictions: Callable[[str], np.ndarray],
    dataset: Truth,
    names: Sequence[str],
    *,
    what: str = "mask",
    split: str = "seed",
    unsure: Literal["wrong", "refuse"] = "wrong",
    workers: int = 2,
) -> Measurement:
    """Compare label maps with the ground truth of ``dataset``, image by image, in one confusion matrix.

    Args:
        predictions: name to (H, W) integer map, 0 background, 1..K classes, 255 unsure.
        dataset: gives the class names and, for every one of ``names``, a ground truth.
        names: the images of the split.
        what: what is measured, see :class:`Measurement`.
        split: name of the list of images.
        unsure: "wrong" counts a pixel predicted 255 as a mistake (see :class:`Confusion`); "refuse" raises, as the VOC
            development kit does.
        workers: threads. The counts are integers, so the result does not depend on their number.

    Returns:
        The measurement.

    Raises:
        ValueError: no names, an image without ground truth, a size or value that does not fit (naming the image).
    """
    if unsure not in ("wrong", "refuse"):
        raise ValueError(f"unsure: expected 'wrong' or 'refuse', got {unsure!r}")

    def count(part: Sequence[str]) -> Confusion:
        confusion = Confusion(dataset.classes)
        for name in part:
            prediction = predictions(name)
            if unsure == "refuse" and (prediction == IGNORE).any():
                raise ValueError(
                    f"prediction of image {name!r}: {int((prediction == IGNORE).sum())} pixels are 255 (unsure); "
                    "pass unsure='wrong' to count them as mistakes"
                )
            confusion.update(prediction, _truth(dataset, name), name)
        return confusion

    total = Confusion(dataset.classes)
    for confusion in _spread(count, names, workers):
        total.merge(confusion)
    return total.measurement(what, split, len(names))


def measure_seeds(
    cams: Callable[[str], tuple[np.ndarray, np.ndarray]],
    dataset: Truth,
    names: Sequence[str],
    *,
    threshold: float,
    thresholds: Iterable[float] = THRESHOLDS,
    what: str = "seed",
    split: str = "seed",
    workers: int = 2,
) -> SeedSweep:
    """Measure CAMs as label maps at every background threshold, reading each CAM once.

    A pixel takes the class of its highest CAM if that exceeds the threshold, else background; of equal classes the
    first one wins, and background wins against an equal CAM: the argmax of [threshold, cam] in float32, as in the
    released code. Pixels are counted by (truth, best class, number of thresholds they pass) and the counts summed along
    the last axis, which gives exactly the confusion matrices of a separate evaluation at each threshold.

    Args:
        cams: name to (cam (k, H, W) floats at image size, keys (k,) distinct class indices 1..K); k may be 0.
        dataset: gives the class names and the ground truth.
        names: the images of the split.
        threshold: the threshold fixed beforehand, measured as such.
        thresholds: those of the curve.
        what: what is measured, see :class:`Measurement`.
        split: name of the list of images.
        workers: threads; the result does not depend on their number.

    Returns:
        The curve, the measurement at its best point (an oracle, it looks at ground truth) and the one at ``threshold``.

    Raises:
        ValueError: no names or thresholds, an image without ground truth, a CAM of another size, with nan, or with keys
            that are no classes (the message names the image).
    """
    tried = sorted({float(t) for t in thresholds})
    if not tried:
        raise ValueError("thresholds: expected at least one, got none")
    points = sorted({*tried, float(threshold)})
    if not np.isfinite(points).all():
        raise ValueError(f"thresholds: expected finite numbers, got {points}")
    edges = np.array(points, np.float32)
    classes = len(dataset.classes)

    def count(part: Sequence[str]) -> np.ndarray:
        counts = np.zeros((1 + classes, 1 + classes, len(edges) + 1), np.int64)  # truth, best class, thresholds passed
        for name in part:
            cam, keys = cams(name)
            truth = _truth(dataset, name)
            cam, keys = _check_cam(cam, keys, truth.shape, classes, name)
            rows = _indices(truth, classes, f"ground truth of image {name!r}")
            valid = truth != IGNORE
            if not len(keys):
                counts[:, 0, 0] += np.bincount(rows[valid], minlength=1 + classes)
                continue
            best = cam.argmax(0)[valid]
            # background wins at threshold t if cam <= t: `passed` is the number of thresholds below the CAM
            passed = np.searchsorted(edges, cam.max(0)[valid], side="left")
            flat = (rows[valid] * len(keys) + best) * (len(edges) + 1) + passed
            shape = (1 + classes, len(keys), len(edges) + 1)
            counts[:, keys] += np.bincount(flat, minlength=math.prod(shape)).reshape(shape)
        return counts

    counts = sum(_spread(count, names, workers))
    pixels = counts.sum((1, 2))  # (1+K,)
    foreground = counts[:, 1:, ::-1].cumsum(-1)[..., ::-1][..., 1:]  # (1+K, K, T): pixels that pass threshold t

    measured: dict[float, Measurement] = {}
    for index, point in enumerate(points):
        confusion = Confusion(dataset.classes)
        confusion.matrix[:, 1:] = foreground[..., index]
        confusion.matrix[:, 0] = pixels - foreground[..., index].sum(1)
        measured[point] = confusion.measurement(what, split, len(names), point, FIXED)

    curve = tuple((point, measured[point].miou) for point in tried)
    top = max(tried, key=lambda point: (measured[point].miou, -point))
    best = dataclasses.replace(measured[top], threshold_from=ORACLE, curve=curve)
    return SeedSweep(curve, best, measured[float(threshold)])


def _truth(dataset: Truth, name: str) -> np.ndarray:
    truth = dataset.mask(name)
    if truth is None:
        raise ValueError(f"image {name!r}: expected a ground-truth mask to measure against, found none")
    return truth


def _indices(mask: np.ndarray, classes: int, what: str) -> np.ndarray:
    """``mask`` as int64 for arithmetic, after a look at its values."""
    if not np.issubdtype(mask.dtype, np.integer):
        raise TypeError(f"{what}: expected integers 0..{classes} or {IGNORE}, got {mask.dtype}; did you pass scores?")
    wrong = ((mask < 0) | (mask > classes)) & (mask != IGNORE)
    if wrong.any():
        raise ValueError(
            f"{what}: expected values 0..{classes} or {IGNORE}, got {int(mask[wrong][0])}; "
            "was it made for other classes?"
        )
    return mask.astype(np.int64)


def _check_cam(
    cam: np.ndarray, keys: np.ndarray, size: tuple[int, ...], classes: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    keys = np.asarray(keys, np.int64)
    if cam.shape != (len(keys), *size):
        raise ValueError(
            f"cam of image {name!r}: expected shape ({len(keys)}, {', '.join(map(str, size))}), one map per key at the "
            f"size of the ground truth, got {cam.shape}"
        )
    if len(set(keys.tolist())) != len(keys) or ((keys < 1) | (keys > classes)).any():
        raise ValueError(f"keys of image {name!r}: expected distinct classes 1..{classes}, got {keys.tolist()}")
    cam = cam.astype(np.float32)
    if np.isnan(cam).any():
        raise ValueError(f"cam of image {name!r}: expected numbers, got nan")
    return cam, keys


def _percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, 100.0 * part / np.maximum(whole, 1), np.nan)


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _spread(count: Callable[[Sequence[str]], Any], names: Sequence[str], workers: int) -> Iterable[Any]:
    """``count`` of interleaved parts of ``names``, in threads: decoding, most of the work, frees the GIL."""
    if not names:
        raise ValueError("names: expected at least one image to measure, got none")
    workers = max(1, min(workers, len(names)))
    if workers == 1:
        return [count(names)]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(count, [names[i::workers] for i in range(workers)]))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
