"""Gated pyramid pooling of class maps (AEFT): image scores that ask for agreement over scales.

Axes: B images, K foreground classes, H W cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsss_modules._checks import check_floating, check_shape

__all__ = ["GatedPyramidOutput", "GatedPyramidPooling", "SignPreservingGate"]


class SignPreservingGate(nn.Module):
    r"""Fuse a coarse and a fine class map by gates that look at both, positive and negative evidence apart.

    .. math::
        g^+ = \sigma(w^+ * [r(x); r(y)]), \qquad g^- = \sigma(w^- * [r(-x); r(-y)])

        out = \frac{g^+_0 r(x) + g^+_1 r(y)}{2} - \frac{g^-_0 r(-x) + g^-_1 r(-y)}{2}

    with x the coarse map, y the fine one, r = ReLU, and 3 x 3 convolutions w of 2K channels to two, without bias.

    Why the sigmoid of a 3 x 3 convolution? These reasons follow from the arithmetic; they were not compared with the
    paper's own:

    * A coarse level knows what is in a region, a fine one where; which of them is right differs from place to place. A
      gate is therefore computed at each pixel, from both maps, and not learnt as one number per level.
    * Cells of a pooled map are upsampled blobs whose neighbours overlap. With 3 x 3 pixels a gate sees whether it lies
      inside a response or at its rim, and whether the two scales rise towards the same side; a 1 x 1 convolution sees
      only two vectors of scores. The receptive field stays small, so that gates stay local; the fusions that follow
      widen it.
    * Two sigmoids are independent, unlike a softmax: both scales may be kept where they agree, and both refused where
      neither is to be trusted, so that a gate can lower a response and not only pass it to the other scale. Without
      bias and evidence, a gate is open by exactly one half.
    * One pair of gates serves all classes. It reads the evidence of all of them but scales them alike, so that within a
      scale it never reorders the classes of a pixel; it costs 36 K weights per sign, and no class has gates of its own
      to overfit.
    * A gate lies between 0 and 1, and each sign has its own, computed from its own evidence only. So evidence never
      changes sign in a gate, evidence against a class can't open the gate for it, and the two meet in one
      subtraction.

    Args:
        num_classes: K, foreground classes.

    Shapes:
        coarse, fine (B, K, H, W), signed -> (B, K, H, W).

    Raises:
        TypeError: a map is not floating point.
        ValueError: a shape that does not match.

    Paper:
        Yoon, Kweon, Cho, Kim and Yoon, Adversarial Erasing Framework via Triplet with Gated Pyramid Pooling Layer for
        Weakly Supervised Semantic Segmentation, ECCV 2022.

    Notes:
        Compiles with ``fullgraph=True``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> gate = SignPreservingGate(20)
        >>> gate(torch.randn(2, 20, 7, 9), torch.randn(2, 20, 7, 9)).shape
        torch.Size([2, 20, 7, 9])
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.positive = nn.Conv2d(2 * num_classes, 2, 3, padding=1, bias=False)
        self.negative = nn.Conv2d(2 * num_classes, 2, 3, padding=1, bias=False)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Fuse two maps of the same size, see the class."""
        check_floating("coarse", coarse)
        check_floating("fine", fine)
        check_shape("coarse", coarse, (None, self.num_classes, None, None), "(B, K, H, W)")
        check_shape("fine", fine, coarse.shape, "to match coarse")
        # two convolutions: one of two groups takes nearly twice the time on a CPU
        return _gated(self.positive, coarse, fine) - _gated(self.negative, -coarse, -fine)

    def extra_repr(self) -> str:
        """Show K."""
        return f"num_classes={self.num_classes}"


class GatedPyramidOutput(NamedTuple):
    """What `GatedPyramidPooling` returns.

    Attributes:
        logits: (B, K) class scores of the image.
        gpp: (B, K, H, W) the fused pyramid, signed: the map in which AEFT measures distances.
    """

    logits: Tensor
    gpp: Tensor


class GatedPyramidPooling(nn.Module):
    r"""Pool class maps at several scales, fuse them from coarse to fine, and score where map and pyramid agree.

    Level k is the average over k x k cells, upsampled to the size of the map. With gates g (`SignPreservingGate`)

    .. math::
        gpp = g_3(g_2(g_1(P_2, P_4), P_8), P_{16}), \qquad
        logits = \underset{hw}{mean}\ r(cam) r(gpp) - \underset{hw}{mean}\ r(-cam) r(-gpp)

    Only pixels where both have the same sign count, and each by what the pyramid says of its surroundings, so that a
    narrow peak scores less than the same response spread out. There is no global average of the map.

    From coarse to fine, a level passes fewer gates the finer it is: with all gates half open the four have shares of
    1/64, 1/64, 1/16 and 1/4. The finest tells places apart, the coarse ones raise or lower it by region.

    Args:
        num_classes: K, foreground classes.
        levels: Cells per side of each level, from coarse to fine, at least two.

    Shapes:
        cam (B, K, H, W), signed, before any ReLU -> `GatedPyramidOutput`. H and W may be smaller than a level.

    Raises:
        TypeError: ``cam`` is not floating point.
        ValueError: ``levels`` that don't ascend, or a wrong shape.

    Paper:
        Yoon, Kweon, Cho, Kim and Yoon, Adversarial Erasing Framework via Triplet with Gated Pyramid Pooling Layer for
        Weakly Supervised Semantic Segmentation, ECCV 2022.

    Notes:
        Logits are quadratic in the map but for the gates: with a small map they start near 0, and so does their
        gradient. Upsampling is bilinear with half-pixel centres. The products are averaged in float32 for half
        precision. Compiles with ``fullgraph=True``. Train with ``F.binary_cross_entropy_with_logits(out.logits,
        labels)``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> out = GatedPyramidPooling(20)(torch.randn(2, 20, 28, 28))
        >>> out.logits.shape, out.gpp.shape
        (torch.Size([2, 20]), torch.Size([2, 20, 28, 28]))
    """

    def __init__(self, num_classes: int, levels: Sequence[int] = (2, 4, 8, 16)) -> None:
        super().__init__()
        levels = tuple(levels)
        if len(levels) < 2 or levels[0] < 1 or any(coarse >= fine for coarse, fine in pairwise(levels)):
            raise ValueError(f"levels: expected at least two ascending numbers of cells, got {levels}")
        self.num_classes, self.levels = num_classes, levels
        self.gates = nn.ModuleList(SignPreservingGate(num_classes) for _ in levels[1:])

    def forward(self, cam: Tensor) -> GatedPyramidOutput:
        """Score the images of class maps, see the class."""
        check_floating("cam", cam)
        check_shape("cam", cam, (None, self.num_classes, None, None), "(B, K, H, W)")
        gpp, *finer = (self._level(cam, cells) for cells in self.levels)
        for gate, level in zip(self.gates, finer, strict=True):
            gpp = gate(gpp, level)
        at_least_float32 = torch.promote_types(cam.dtype, torch.float32)
        # where the signs agree the product of the two is positive, whichever sign it is
        agreement = F.relu(cam.to(at_least_float32) * gpp) * cam.sign()  # (B, K, H, W)
        return GatedPyramidOutput(agreement.mean((2, 3)).to(cam.dtype), gpp)

    @staticmethod
    def _level(cam: Tensor, cells: int) -> Tensor:
        pooled = F.adaptive_avg_pool2d(cam, cells)
        return F.interpolate(pooled, cam.shape[2:], mode="bilinear", align_corners=False)

    @staticmethod
    def released_key(name: str) -> str | None:
        """The key in our ``state_dict`` of a parameter of the released network; None for what is not of this layer.

        Args:
            name: released name: ``gconv1.att_p.0.weight`` .. ``gconv3.att_n.0.weight``.
        """
        gate, _, leaf = name.partition(".")
        number = gate.removeprefix("gconv")
        leaves = {"att_p.0.weight": "positive.weight", "att_n.0.weight": "negative.weight"}
        if number == gate or leaf not in leaves:
            return None
        return f"gates.{int(number) - 1}.{leaves[leaf]}"

    def extra_repr(self) -> str:
        """Show the options."""
        return f"num_classes={self.num_classes}, levels={self.levels}"


def _gated(gate: nn.Conv2d, coarse: Tensor, fine: Tensor) -> Tensor:
    """Evidence of one sign, fused: (B, K, H, W), at least 0."""
    coarse, fine = F.relu(coarse), F.relu(fine)
    of_coarse, of_fine = torch.sigmoid(gate(torch.cat([coarse, fine], 1))).split(1, dim=1)  # (B, 1, H, W) each
    return (coarse * of_coarse + fine * of_fine) / 2
