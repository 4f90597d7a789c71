"""Spatial-BCE's thresholds: the rank statistic, the head that learns them, their schedule and their use on CAMs.

Axes: B images, K foreground classes, D feature channels, H W pixels, h w cells of the threshold branch.

How the threshold t of an (image, class) pair is made and updated. The prior is a foreground ratio per image and class,
constant within a phase of training: the share of the image's area that the masks of the phase before give to the class.
Training alternates, by default in cycles of 80 + 20 steps (`AlternatingSchedule`), from the first step to the last:

- Network steps take the t that splits the *current* prediction at the prior: the k-th largest probability with
  k = ratio · HW (`rank_threshold`). It is computed anew at each step; nothing is stored, averaged or learnt.
- Threshold steps take t = sigmoid(mean of the threshold branch) and fit that branch, by gradient, to predictions that
  stand still (:func:`wsss_losses.spatial_bce_threshold_loss`). "Updating t" means updating that branch's weights.

The learnt t never reaches the network steps. It is there for inference, where it takes the place of a background
threshold that would have to be searched (`adaptive_cam_threshold`). After a phase, new masks give new ratios.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32
from wsss_modules.cam import normalize_cam

__all__ = [
    "AdaptiveCam",
    "AdaptiveCamThreshold",
    "AlternatingSchedule",
    "SpatialBCEHead",
    "SpatialBCEOutput",
    "adaptive_cam_threshold",
    "mean_threshold",
    "rank_threshold",
    "threshold_without_temperature",
]


def rank_threshold(prob: Tensor, foreground_ratio: Tensor) -> Tensor:
    r"""Threshold that leaves a given share of each map's pixels above it.

    .. math:: t = p_{(k)}, \qquad k = \min(\lfloor \rho \cdot HW \rfloor, HW - 1)

    where :math:`p_{(0)} \ge p_{(1)} \ge \dots` are the values of the map in descending order. At most k pixels are
    strictly above t, and t is itself the value of a pixel.

    Args:
        prob: (B, K, H, W) float, e.g. probabilities; logits give the same pixel, since only the order counts.
        foreground_ratio: (B, K) share of the pixels in [0, 1]; 0 for absent classes.

    Returns:
        (B, K) in the dtype of ``prob``, without gradient. A ratio of 0 gives the maximum of the map.

    Raises:
        TypeError: ``prob`` or ``foreground_ratio`` is not floating point.
        ValueError: a wrong shape, or maps without a pixel.

    Paper:
        Wu, Gao, Huang, Wei, Wei and Liu, Adaptive Spatial-BCE Loss for Weakly Supervised Semantic Segmentation,
        ECCV 2022.

    Differences:
        The released code fails at a ratio of 1; here t is then the minimum of the map. It sorts the maps of all
        classes; here only those with k > 0, which gives the same values.

    Notes:
        The product :math:`\rho \cdot HW` is truncated in the precision of the ratio, at least float32. O(B K HW) for
        the maxima, and O(HW log HW) per map with k > 0; on CUDA all maps are sorted, which spares a synchronisation.
        One operation for ``torch.compile``, also with ``fullgraph=True``.

    Example:
        >>> prob = torch.tensor([[[[0.1, 0.9], [0.6, 0.3]]]])
        >>> rank_threshold(prob, torch.tensor([[0.5]])), rank_threshold(prob, torch.tensor([[0.0]]))
        (tensor([[0.3000]]), tensor([[0.9000]]))
    """
    check_ndim("prob", prob, 4, "(B, K, H, W)")
    check_floating("prob", prob)
    check_shape("foreground_ratio", foreground_ratio, prob.shape[:2], "to match prob")
    check_floating("foreground_ratio", foreground_ratio)
    n_pixels = prob.shape[2] * prob.shape[3]
    if n_pixels == 0:
        raise ValueError(f"prob: expected maps with at least one pixel, got {tuple(prob.shape)}")
    rank = (at_least_float32(foreground_ratio.detach()) * n_pixels).long().clamp(0, n_pixels - 1)
    return value_of_rank(prob.detach().flatten(2), rank)


@torch.library.custom_op("wsss::value_of_rank", mutates_args=(), schema="(Tensor maps, Tensor rank) -> Tensor")
def value_of_rank(maps: Tensor, rank: Tensor) -> Tensor:
    """The value of each row of ``maps`` (B, K, n) at place ``rank`` (B, K) of its descending order: (B, K)."""
    if maps.is_cuda:  # which rows to sort would have to be asked from the device
        return maps.sort(dim=-1, descending=True).values.gather(-1, rank[..., None]).squeeze(-1)
    result = maps.amax(-1)
    rows = rank > 0
    ordered = maps[rows].sort(dim=-1, descending=True).values
    result[rows] = ordered.gather(-1, rank[rows][:, None]).squeeze(-1)
    return result


@value_of_rank.register_fake
def _(maps: Tensor, rank: Tensor) -> Tensor:
    return maps.new_empty(rank.shape)


def mean_threshold(threshold_logits: Tensor) -> Tensor:
    """The learnt threshold of each image and class: the mean of the threshold branch, then a sigmoid.

    Args:
        threshold_logits: (B, K, h, w) of `SpatialBCEHead`.

    Returns:
        (B, K) in (0, 1), in the dtype of ``threshold_logits``, with gradient.

    Raises:
        TypeError: ``threshold_logits`` is not floating point.
        ValueError: it does not have four axes.

    Example:
        >>> mean_threshold(torch.tensor([[[[-1.0, 1.0]]]]))
        tensor([[0.5000]])
    """
    check_ndim("threshold_logits", threshold_logits, 4, "(B, K, h, w)")
    check_floating("threshold_logits", threshold_logits)
    return at_least_float32(threshold_logits).mean((2, 3)).sigmoid().to(threshold_logits.dtype)


def threshold_without_temperature(threshold: Tensor, temperature: Tensor) -> Tensor:
    r"""Bring a threshold from probabilities of scaled logits to those of the bare map.

    .. math:: t' = \sigma(e^{-\tau} \, \sigma^{-1}(t))

    so that :math:`\sigma(a) > t'` exactly where :math:`\sigma(e^\tau a) > t`.

    Args:
        threshold: (B, K) probability in [0, 1].
        temperature: (K,) logarithm of the scale, see `SpatialBCEHead`.

    Returns:
        (B, K) in [0, 1], in the dtype of ``threshold``; monotone in ``threshold``, and equal to it where
        ``temperature`` is 0.

    Raises:
        TypeError: ``threshold`` is not floating point.
        ValueError: a wrong shape.

    Differences:
        The released code finds the same number by a numeric root search for each image and class.

    Example:
        >>> threshold_without_temperature(torch.tensor([[0.2, 0.5]]), torch.tensor([2.3, 2.3]))
        tensor([[0.4653, 0.5000]])
    """
    check_ndim("threshold", threshold, 2, "(B, K)")
    check_floating("threshold", threshold)
    check_shape("temperature", temperature, threshold.shape[1:], "to match threshold")
    logit = torch.special.logit(at_least_float32(threshold))
    return torch.sigmoid(logit * torch.exp(-at_least_float32(temperature))).to(threshold.dtype)


class AdaptiveCam(NamedTuple):
    """What `adaptive_cam_threshold` returns.

    Attributes:
        scores: (B, K, H, W) in (0, 1]: how far a pixel is above the threshold of its class; -1 elsewhere. With a
            background score of 0 the argmax is the mask: ``cam_to_mask(scores, 0.0)``.
        threshold: (B, K) t' in [0, 1], the thresholds of ``cam``.
        cam: (B, K, H, W) in [0, 1]: each pixel's strongest present class, 0 for the others.
    """

    scores: Tensor
    threshold: Tensor
    cam: Tensor


def adaptive_cam_threshold(
    cam: Tensor,
    labels: Tensor,
    threshold: Tensor,
    temperature: Tensor,
    *,
    normalize: bool = True,
    eps: float = 1e-8,
) -> AdaptiveCam:
    """Part CAMs from background by the thresholds that the network itself predicts for each image and class.

    The map of each present class passes a sigmoid; at each pixel only the largest (or several equal ones) remain; each
    map is divided by its maximum; what exceeds t' (`threshold_without_temperature`) is foreground.

    Args:
        cam: (B, K, H, W) float of any sign: the head's maps without temperature, averaged over scales and flips.
        labels: (B, K) multi-hot.
        threshold: (B, K) probability, see `mean_threshold`; over several views, of the mean over all of them.
        temperature: (K,) of the head; zeros if ``cam`` includes the temperature.
        normalize: Divide each map by its maximum (released).
        eps: Added to the maximum.

    Returns:
        `AdaptiveCam` in the dtype of ``cam``. An image without a class is -1 everywhere.

    Raises:
        TypeError: ``cam`` or ``threshold`` is not floating point.
        ValueError: a wrong shape.

    Paper:
        Wu, Gao, Huang, Wei, Wei and Liu, Adaptive Spatial-BCE Loss for Weakly Supervised Semantic Segmentation,
        ECCV 2022.

    Differences:
        The threshold is learnt on maps that are not divided by their maximum, and then, as in the released code,
        compared with maps that are. ``normalize=False`` compares like with like; the two agree where the network is
        sure of some pixel, whose probability is then near 1.

    Notes:
        Shapes do not depend on the data: compiles with ``fullgraph=True``.

    Example:
        >>> cam = torch.tensor([[[[2.0, 0.1, -2.0]], [[1.0, 3.0, 3.0]]]])  # the second class is absent
        >>> out = adaptive_cam_threshold(cam, torch.tensor([[1, 0]]), torch.tensor([[0.7, 0.7]]), torch.full((2,), 2.3))
        >>> out.scores[0, 0], out.threshold[0, 0]
        (tensor([[ 0.4788,  0.0748, -1.0000]]), tensor(0.5212))
    """
    check_ndim("cam", cam, 4, "(B, K, H, W)")
    check_floating("cam", cam)
    check_shape("labels", labels, cam.shape[:2], "to match cam")
    check_shape("threshold", threshold, cam.shape[:2], "to match cam")
    level = threshold_without_temperature(threshold, temperature)
    present = (labels > 0)[:, :, None, None]
    values = torch.where(present, torch.sigmoid(at_least_float32(cam)), 0.0)
    if cam.shape[1] > 0:
        values = torch.where(values >= values.amax(1, keepdim=True), values, 0.0)
    if normalize:
        values = normalize_cam(values, eps)
    above = values - level[:, :, None, None]
    scores = torch.where(above > 0, above, -1.0)
    return AdaptiveCam(scores.to(cam.dtype), level, values.to(cam.dtype))


class AdaptiveCamThreshold(nn.Module):
    """Part CAMs from background by predicted thresholds; see `adaptive_cam_threshold`.

    Args:
        normalize: Divide each map by its maximum (released).
        eps: Added to the maximum.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> head = SpatialBCEHead(16, num_classes=3)
        >>> out = head(torch.randn(1, 16, 6, 7))
        >>> labels, t = torch.tensor([[1, 0, 1]]), mean_threshold(out.threshold_logits)
        >>> AdaptiveCamThreshold()(out.cam, labels, t, head.temperature).scores.shape
        torch.Size([1, 3, 6, 7])
    """

    def __init__(self, *, normalize: bool = True, eps: float = 1e-8) -> None:
        super().__init__()
        self.normalize, self.eps = normalize, eps

    def forward(self, cam: Tensor, labels: Tensor, threshold: Tensor, temperature: Tensor) -> AdaptiveCam:
        """(B, K, H, W) maps, their tags and thresholds -> `AdaptiveCam`."""
        return adaptive_cam_threshold(cam, labels, threshold, temperature, normalize=self.normalize, eps=self.eps)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"normalize={self.normalize}, eps={self.eps}"


@dataclass(frozen=True)
class AlternatingSchedule:
    """Which of the two steps a training takes: the network's, then the threshold's, in cycles without end.

    Args:
        cycle: Steps of a cycle.
        network_steps: How many of them, at its start, train the network; the rest train the threshold.

    Raises:
        ValueError: ``cycle`` is less than 1, or ``network_steps`` is not in ``0..cycle``.

    Paper:
        Wu, Gao, Huang, Wei, Wei and Liu, ECCV 2022.

    Notes:
        The released training of several phases counts its steps from 0 in each of them. The choice is a plain ``bool``
        of the step number, the same on all processes of a distributed run.

    Example:
        >>> schedule = AlternatingSchedule()
        >>> [schedule.is_network_step(step) for step in (0, 79, 80, 99, 100)]
        [True, True, False, False, True]
    """

    cycle: int = 100
    network_steps: int = 80

    def __post_init__(self) -> None:
        if self.cycle < 1:
            raise ValueError(f"cycle: expected at least 1 step, got {self.cycle}")
        if not 0 <= self.network_steps <= self.cycle:
            raise ValueError(f"network_steps: expected 0..{self.cycle}, the steps of a cycle, got {self.network_steps}")

    def is_network_step(self, step: int) -> bool:
        """Whether step number ``step``, counted from 0, trains the network."""
        return step % self.cycle < self.network_steps


class SpatialBCEOutput(NamedTuple):
    """What `SpatialBCEHead` returns.

    Attributes:
        logits: (B, K, H, W) scaled class scores of the pixels, for the losses.
        threshold_logits: (B, K, H, W) of the threshold branch; their mean over pixels, through a sigmoid, is t.
        cam: (B, K, H, W) class scores without the scale, of any sign, for inference.
    """

    logits: Tensor
    threshold_logits: Tensor
    cam: Tensor


class SpatialBCEHead(nn.Module):
    r"""Pixel classifier with a learnt scale per class, and a branch that predicts the thresholds.

    .. math:: f = \mathrm{ReLU}(x), \quad cam = W_2 W_1 f, \quad logits_c = e^{\tau_c} cam_c, \quad
        threshold\_logits = W_t f

    Args:
        in_channels: Channels D of the features.
        num_classes: K, foreground classes.
        mid_channels: Channels between the two 1 x 1 convolutions of the classifier.

    Shape:
        features (B, D, H, W) before their last ReLU, which is applied here -> `SpatialBCEOutput`.

    Raises:
        ValueError: features without D channels.

    Paper:
        Wu, Gao, Huang, Wei, Wei and Liu, Adaptive Spatial-BCE Loss for Weakly Supervised Semantic Segmentation,
        ECCV 2022.

    Differences:
        The released classifier has one convolution for each class after ``reduce``; here it is one for all of them,
        which is the same. :meth:`load_released_state_dict` reads released weights.

    Notes:
        Convolutions start Xavier uniform, :math:`\tau` (``temperature``, a logarithm) at log 10. The released training
        gives ``temperature`` the learning rate of the head and no weight decay. The threshold branch sees the features
        without a stop of the gradient, so that threshold steps move the backbone as well. Compiles with
        ``fullgraph=True``.

    Example:
        >>> head = SpatialBCEHead(16, num_classes=20, mid_channels=8)
        >>> out = head(torch.randn(2, 16, 5, 7))
        >>> out.logits.shape, out.threshold_logits.shape
        (torch.Size([2, 20, 5, 7]), torch.Size([2, 20, 5, 7]))
        >>> torch.allclose(out.logits, 10 * out.cam)
        True
    """

    def __init__(self, in_channels: int, num_classes: int, mid_channels: int = 128) -> None:
        super().__init__()
        self.threshold = nn.Conv2d(in_channels, num_classes, 1, bias=False)
        self.reduce = nn.Conv2d(in_channels, mid_channels, 1, bias=False)
        self.classifier = nn.Conv2d(mid_channels, num_classes, 1, bias=False)
        self.temperature = nn.Parameter(torch.full((num_classes,), math.log(10)))
        for convolution in (self.threshold, self.reduce):
            nn.init.xavier_uniform_(convolution.weight)
        bound = math.sqrt(6 / (mid_channels + 1))  # Xavier for K convolutions to one channel each
        nn.init.uniform_(self.classifier.weight, -bound, bound)

    def forward(self, features: Tensor) -> SpatialBCEOutput:
        """Classify pixels and predict thresholds, see the class."""
        check_shape("features", features, (None, self.reduce.in_channels, None, None), "for this head")
        active = F.relu(features)
        reduced = self.reduce(active)
        # a matrix product, whose rounding does not change with the number of threads as that of a convolution does
        cam = (self.classifier.weight.flatten(1) @ reduced.flatten(2)).unflatten(2, reduced.shape[2:])
        logits = cam * torch.exp(self.temperature)[:, None, None]
        return SpatialBCEOutput(logits, self.threshold(active), cam)

    @staticmethod
    def from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of the released network under the names of this head; those of its backbone are left out.

        Args:
            state: released names: ``threshold.weight``, ``mask_layer_downsample.weight``, ``fc_list.0.weight`` ...,
                ``temperature``, with or without a leading ``module.``.
        """
        bare = {key.removeprefix("module."): value for key, value in state.items()}
        count = sum(key.startswith("fc_list.") for key in bare)
        return {
            "threshold.weight": bare["threshold.weight"],
            "reduce.weight": bare["mask_layer_downsample.weight"],
            "classifier.weight": torch.cat([bare[f"fc_list.{index}.weight"] for index in range(count)]),
            "temperature": bare["temperature"],
        }

    def load_released_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the head's weights from a released checkpoint."""
        self.load_state_dict(self.from_released(state))
