"""PPC's contrast as the released code does it: prototypes gathered for every pixel, classes one after the other."""

import torch
from torch import Tensor
from torch.nn import functional as F


def cross(pixels: Tensor, prototypes: Tensor, classes: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean cross-entropy of pixels (P, D) of length 1."""
    positive = torch.exp((pixels * prototypes[classes]).sum(1) / temperature)
    every = torch.exp(pixels @ prototypes.T / temperature).sum(1)
    return -torch.log(positive / every).mean()


def intra_costs(
    pixels: Tensor, prototypes: Tensor, classes: Tensor, ranks: tuple[int, int] = (3, 13), temperature: float = 0.1
) -> Tensor:
    """Cost of each pixel (P,), with (P, C, D) and (P, ranks, D) prototypes gathered."""
    repeated = prototypes[None].expand(len(pixels), -1, -1)
    similarity = torch.bmm(repeated.contiguous(), pixels[:, :, None])[:, :, 0]  # (P, C)
    order = similarity.sort(1, descending=True).indices[:, ranks[0] : ranks[1]]
    chosen = repeated.gather(1, order[:, :, None].expand(-1, -1, pixels.shape[1])).contiguous()
    negative = torch.exp(torch.bmm(chosen, pixels[:, :, None])[:, :, 0] / temperature).sum(1)
    positive = torch.exp((pixels * prototypes[classes]).sum(1) / temperature)
    return -torch.log(positive / (positive + negative))


def intra(
    pixels: Tensor,
    prototypes: Tensor,
    classes: Tensor,
    drawn: Tensor,
    ranks: tuple[int, int] = (3, 13),
    hard_ratio: float = 0.6,
    temperature: float = 0.1,
) -> Tensor:
    """The mean over classes of the mean over drawn and hard pixels."""
    costs = intra_costs(pixels, prototypes, classes, ranks, temperature)
    similarity = (pixels * prototypes[classes]).sum(1)
    total, present = costs.new_zeros(()), classes.unique().tolist()
    for c in present:
        mine = (classes == c).nonzero().flatten()
        count = len(mine)
        if count < 2:
            continue
        order = mine[similarity[mine].detach().argsort(stable=True)]
        last = int(hard_ratio * count)
        hard = order[last - count // 2 : last]
        random = mine[drawn[mine] > 0]
        total = total + costs[torch.cat([random, hard])].mean()
    return total / len(present)


def contrast(
    features: tuple[Tensor, Tensor],
    prototypes: tuple[Tensor, Tensor],
    classes: tuple[Tensor, Tensor],
    drawn: tuple[Tensor, Tensor],
    ranks: tuple[int, int] = (3, 13),
    weight: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-prototype, cross-CAM and intra-view terms of features (B, D, h, w) on the common grid."""
    f1, f2 = (F.normalize(x.permute(0, 2, 3, 1).flatten(0, 2), dim=1) for x in features)
    (p1, p2), (y1, y2) = prototypes, (y.flatten() for y in classes)
    return (
        weight * (cross(f1, p2, y1) + cross(f2, p1, y2)) / 2,
        weight * (cross(f1, p1, y2) + cross(f2, p2, y1)) / 2,
        weight * (intra(f1, p1, y1, drawn[0].flatten(), ranks) + intra(f2, p2, y2, drawn[1].flatten(), ranks)) / 2,
    )
