"""Global weighted rank pooling: between the average and the maximum of a map.

Axes: B images, K foreground classes, H W cells, N = H * W.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsss_modules._checks import check_floating
from wsss_modules._precision import at_least_float32

__all__ = ["GlobalWeightedRankPool", "global_weighted_rank_pool"]


def global_weighted_rank_pool(maps: Tensor, *, decay: float = 0.996) -> Tensor:
    r"""Average every map with weights that fall with the rank of a value.

    .. math:: z = \sum_{r=0}^{N-1} d^r m_{(r)} \Big/ \sum_{r=0}^{N-1} d^r

    with :math:`m_{(0)} \ge m_{(1)} \ge \dots` and d the decay. d = 1 is the average, d = 0 the maximum.

    Args:
        maps: (B, K, H, W) or (B, K, N) floating point, signed.
        decay: d in [0, 1]: .996 in SEC and MCTformer+.

    Returns:
        (B, K), in the dtype of ``maps``.

    Raises:
        TypeError: ``maps`` is not floating point.
        ValueError: a wrong shape, a map without a cell, or a ``decay`` outside [0, 1].

    Paper:
        Kolesnikov and Lampert, Seed, Expand and Constrain, ECCV 2016, arXiv:1603.06098; as in Xu et al., MCTformer+,
        2023, arXiv:2308.03005.

    Differences:
        The released code of MCTformer+ computes the weights in float32 also for float64 maps, an error of 3e-8.

    Notes:
        Sorting is O(N log N) a map; at .996 and 28 x 28 cells the last rank still weighs 4 % of the first, so that none
        can be left out. Half precision is summed in float32. Compiles with ``fullgraph=True``.

    Example:
        >>> global_weighted_rank_pool(torch.tensor([[[1.0, 3.0, 2.0]]]), decay=0.5)
        tensor([[2.4286]])
    """
    check_floating("maps", maps)
    if maps.ndim not in (3, 4) or 0 in maps.shape[2:]:
        raise ValueError(f"maps: expected shape (B, K, H, W) or (B, K, N) with N >= 1, got {tuple(maps.shape)}")
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: expected a number in [0, 1], got {decay}")
    values = at_least_float32(maps.flatten(2))
    if decay == 0:
        return values.amax(2).to(maps.dtype)
    ranked = values.sort(2, descending=True).values
    ranks = torch.arange(values.shape[2], device=maps.device, dtype=torch.float64)
    weights = decay**ranks
    return (ranked * (weights / weights.sum()).to(values.dtype)).sum(2).to(maps.dtype)


class GlobalWeightedRankPool(nn.Module):
    """Global weighted rank pooling as a layer; see :func:`global_weighted_rank_pool`.

    Args:
        decay: d, what each rank weighs of the one above.

    Example:
        >>> GlobalWeightedRankPool()(torch.rand(2, 20, 14, 14)).shape
        torch.Size([2, 20])
    """

    def __init__(self, decay: float = 0.996) -> None:
        super().__init__()
        self.decay = decay

    def forward(self, maps: Tensor) -> Tensor:
        """Pool maps, see the function."""
        return global_weighted_rank_pool(maps, decay=self.decay)

    def extra_repr(self) -> str:
        """Show the option."""
        return f"decay={self.decay}"
