"""From a class boundary map to the affinity of pixel pairs: a pair is close if no boundary lies between (IRN).

Axis letters: B batch, P offsets in path order, n sources, H W map size.
"""

from __future__ import annotations

from torch import Tensor, nn

from wsss_modules._checks import check_floating, check_shape
from wsss_modules.affinity.local import LocalAffinity
from wsss_modules.affinity.offsets import Border, check_crop, path_offsets
from wsss_modules.affinity.path_maxima import path_maxima


def edge_to_affinity(edge: Tensor, radius: int, *, border: Border = "released") -> Tensor:
    r"""Affinity of each pair: one minus the largest boundary probability on the path between the two pixels.

    .. math:: a_{ij} = 1 - \max_{k \in \Pi_{ij}} edge_k

    Args:
        edge: (B, 1, H, W) float, boundary probability in [0, 1].
        radius: radius in pixels; released: 10 for training, 5 for the walk.
        border: ``"released"``: the sources are the crop of :func:`pair_index`. ``"full"``: all H·W pixels are sources,
            and pairs with a partner outside have affinity 0.

    Returns:
        (B, P, n) float in [0, 1], in the order of :func:`path_offsets`, in the dtype of ``edge``.

    Raises:
        TypeError: if ``edge`` is not floating point.
        ValueError: if its shape is not (B, 1, H, W), or the map is too small for the released crop.

    Paper:
        Ahn, Cho and Kwak, "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations", CVPR 2019,
        arXiv:1904.05044, eq. 3.

    Notes:
        The gradient of a pair goes to one pixel that attains the maximum. Values are bit-identical to a gather of all
        path pixels, at 173 elementwise maxima instead of 1,982 for radius 10; the backward pass computes them again
        instead of storing them. Works inside ``torch.compile(fullgraph=True)``.

    Example:
        >>> import torch
        >>> from wsss_modules import edge_to_affinity, path_offsets
        >>> edge = torch.tensor([0.0, 0.25, 0.75, 0.0]).view(1, 1, 1, 4)
        >>> affinity = edge_to_affinity(edge, radius=4, border="full")
        >>> affinity[0, path_offsets(4).offsets.index((0, 3)), 0]
        tensor(0.2500)
    """
    check_shape("edge", edge, (None, 1, None, None), "(B, 1, H, W)")
    check_floating("edge", edge)
    size = (edge.shape[2], edge.shape[3])
    check_crop(size, radius, border)
    maxima = path_maxima(edge[:, 0], radius, border == "full")  # (B, P, h, w)
    return (1 - maxima).flatten(2)


class EdgeToAffinity(nn.Module):
    """Turn a boundary map into a :class:`LocalAffinity` over all pairs of the map; see :func:`edge_to_affinity`.

    Args:
        radius: radius in pixels; 5 in the released random walk.

    Differences:
        The released walk pads the map with boundary 1 and crops afterwards, which is the same as leaving out pairs with
        a partner outside.

    Example:
        >>> import torch
        >>> from wsss_modules import EdgeToAffinity
        >>> affinity = EdgeToAffinity(radius=2)(torch.zeros(1, 1, 1, 3))
        >>> affinity.degree()
        tensor([[[2., 3., 2.]]])
    """

    def __init__(self, radius: int = 5) -> None:
        super().__init__()
        self.radius = radius
        path_offsets(radius)  # an unusable radius is refused here, not in the first forward

    def forward(self, edge: Tensor) -> LocalAffinity:
        """(B, 1, H, W) boundary probability -> affinity of the map."""
        pairs = edge_to_affinity(edge, self.radius, border="full")
        return LocalAffinity(path_offsets(self.radius).offsets, pairs.unflatten(2, edge.shape[2:]))

    def extra_repr(self) -> str:
        """Show the radius."""
        return f"radius={self.radius}"
