"""Reasoning over a small graph that the whole map is projected to (GloRe, as in NSROM).

Axes: B images, C channels, H W cells, N = H W, M nodes, S = 2 M states of a node.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsss_modules._checks import check_floating, check_ndim, check_shape
from wsss_modules._precision import at_least_float32


class GlobalReasoningUnit(nn.Module):
    r"""Gather the cells of a map in a few nodes, let the nodes reason with each other, and add what they found.

    .. math::
        P = W_p x + b_p, \quad V = (W_s x + b_s) P^\top, \quad
        G = W_2 \operatorname{relu}(V + V W_1^\top + b_1), \quad y = x + \operatorname{BN}(W_e G P)

    with x (C, N), assignments P (M, N) of cells to nodes, node states V and G (S, M). So cells that are far apart, such
    as the face and the plain body of an animal, reach each other in one layer.

    Args:
        channels: C, channels in and out.
        nodes: M; NSROM has 64 for 512 channels.
        normalize: Divide V by N, which makes the result independent of the size of the map.
        zero_init: Start the batch norm's weight at 0, so that the unit is the identity at first.
        eps: Of the batch norm.

    Raises:
        ValueError: a size below 1.

    Paper:
        Chen, Rohrbach, Yan, Shuicheng, Feng and Kalantidis, Graph-Based Global Reasoning Networks, CVPR 2019,
        arXiv:1811.12814; in Yao et al., Non-Salient Region Object Mining for Weakly Supervised Semantic Segmentation,
        CVPR 2021, arXiv:2103.14581.

    Differences:
        ``normalize`` and ``zero_init`` are off, as in the released code of NSROM: V grows with the number of cells, so
        a network trained on one size of images gives other maps at another, and the unit is no identity at the start.
        The original unit starts at zero.

    Notes:
        All is linear but the ReLU, so the products are taken in another order than they are written:
        :math:`V = W_s (x P^\top) + b_s (P 1)^\top` and :math:`(W_e G) P`. That is 3 C M products a cell instead of
        2 C S + C M + 2 S M (98,000 for 180,000 at 512 channels and 64 nodes), and no (S, N) map is made. Mean and
        variance of the map that comes back follow from those of the nodes, so the batch norm is folded into the last
        product. A batch of a single cell, which batch norm refuses, has a variance of 0; one without a cell leaves the
        statistics as they are. The sums over cells are
        taken in float32 at least, also under autocast. A ``SyncBatchNorm`` in place of ``norm`` works, unfolded. Works
        in ``torch.compile(fullgraph=True)``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> unit, x = GlobalReasoningUnit(8, nodes=2, zero_init=True), torch.rand(2, 8, 5, 6)
        >>> bool((unit(x) == x).all())
        True
    """

    def __init__(
        self, channels: int, nodes: int, *, normalize: bool = False, zero_init: bool = False, eps: float = 1e-4
    ) -> None:
        super().__init__()
        for name, size in (("channels", channels), ("nodes", nodes)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.normalize = normalize
        states = 2 * nodes
        self.state = nn.Conv2d(channels, states, 1)
        self.project = nn.Conv2d(channels, nodes, 1)
        self.node_mix = nn.Conv1d(nodes, nodes, 1)
        self.state_mix = nn.Conv1d(states, states, 1, bias=False)
        self.extend = nn.Conv2d(states, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels, eps=eps)
        if zero_init:
            nn.init.zeros_(self.norm.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Add to each cell what the graph found.

        Args:
            features: (B, C, H, W) float.

        Returns:
            (B, C, H, W), in the dtype of ``features``.

        Raises:
            TypeError: ``features`` is not floating point.
            ValueError: a wrong shape.
        """
        check_ndim("features", features, 4, "(B, C, H, W)")
        check_floating("features", features)
        check_shape("features", features, (None, self.project.in_channels, None, None), "for this unit")
        cells = features.flatten(2)  # (B, C, N)
        # a product, not the layer: half the time of a 1 x 1 convolution and its gradients on a CPU
        offset = self.project.get_parameter("bias")[:, None].expand(len(cells), -1, cells.shape[2])
        weight = self.project.weight.flatten(1).expand(len(cells), -1, -1)
        assignment = at_least_float32(torch.baddbmm(offset, weight, cells))  # (B, M, N)
        with torch.autocast(features.device.type, enabled=False):
            cells = at_least_float32(cells)
            back = self._found(cells, assignment)  # (B, C, M)
            if type(self.norm) is not nn.BatchNorm2d:  # such as one that takes statistics over processes
                return features + self.norm((back @ assignment).view(features.shape)).to(features.dtype)
            scale, shift = self._normalized(back, assignment)
            # one product adds the scaled map and the shift to the cells, which are read and written once
            factors = torch.cat([scale[:, None] * back, shift[:, None].expand(len(back), -1, 1)], 2)
            places = torch.cat([assignment, torch.ones_like(assignment[:, :1])], 1)
            return torch.baddbmm(cells, factors, places).view(features.shape).to(features.dtype)

    def _normalized(self, back: Tensor, assignment: Tensor) -> tuple[Tensor, Tensor]:
        """Batch norm of ``back @ assignment`` as scale and shift (C,), its statistics from those of the nodes."""
        norm = self.norm
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None  # for mypy: the statistics are tracked
        assert variance is not None
        if norm.training and assignment.numel() > 0:  # nothing is learnt of a batch without a cell
            centre = assignment.mean(2, keepdim=True)  # (B, M, 1)
            deviation = assignment - centre
            spread = deviation @ deviation.mT / max(1, assignment.shape[2])  # (B, M, M), covariance of the nodes
            means = (back @ centre)[..., 0]  # (B, C), of each image
            mean = means.mean(0)
            within = ((back @ spread) * back).sum(2)  # (B, C)
            variance = (within + (means - mean).square()).mean(0).clamp(min=0)
            self._track(mean.detach(), variance.detach(), count=len(back) * assignment.shape[2])
        scale = at_least_float32(norm.weight) * (at_least_float32(variance) + norm.eps).rsqrt()
        return scale, at_least_float32(norm.bias) - scale * at_least_float32(mean)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics as batch norm does."""
        norm = self.norm
        assert norm.num_batches_tracked is not None  # for mypy
        norm.num_batches_tracked.add_(1)
        momentum = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        for kept, seen in ((norm.running_mean, mean), (norm.running_var, variance * (count / max(1, count - 1)))):
            assert kept is not None  # for mypy
            kept.copy_((1 - momentum) * kept + momentum * seen)

    def _found(self, cells: Tensor, assignment: Tensor) -> Tensor:
        """What the nodes tell each other, as channels: (B, C, M)."""
        states, bias = _matrix(self.state.weight), at_least_float32(self.state.get_parameter("bias"))
        nodes = states @ (cells @ assignment.mT) + bias[:, None] * assignment.sum(2)[:, None]  # (B, S, M)
        if self.normalize:
            nodes = nodes / max(1, cells.shape[2])
        mixed = nodes @ _matrix(self.node_mix.weight).mT + at_least_float32(self.node_mix.get_parameter("bias"))
        found = _matrix(self.state_mix.weight) @ (nodes + mixed).relu()
        return _matrix(self.extend.weight) @ found

    @staticmethod
    def released_key(name: str) -> str:
        """The key in our ``state_dict`` of a tensor of the released unit, such as ``gcn.conv1.weight``."""
        module, _, leaf = name.rpartition(".")
        places = {
            "conv_state": "state",
            "conv_proj": "project",
            "gcn.conv1": "node_mix",
            "gcn.conv2": "state_mix",
            "conv_extend": "extend",
            "blocker": "norm",
        }
        return f"{places[module]}.{leaf}"

    def extra_repr(self) -> str:
        """Show the options."""
        return f"channels={self.project.in_channels}, nodes={self.project.out_channels}, normalize={self.normalize}"


def _matrix(weight: Tensor) -> Tensor:
    """The weight (out, in) of a layer that is linear at each cell."""
    return at_least_float32(weight.flatten(1))
