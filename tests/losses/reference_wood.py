"""W-OoD's distances centre by centre, as the released training loop takes them."""

from __future__ import annotations

import torch
from torch import Tensor


def distance_loop(features: Tensor, centres: Tensor, layers: int = 1) -> Tensor:
    """(B, Q) distances to (Q, C) centres, one after the other; each is first asked whether it is missing (all zero).

    The released loop runs over three layers, two of which are empty placeholders: their centres are asked too.
    """
    columns = []
    for layer in range(layers):
        of_layer = centres if layer == layers - 1 else torch.zeros_like(centres)
        for centre in of_layer:
            if centre.sum().item() == 0:
                if layer == layers - 1:
                    columns.append(torch.zeros_like(features[:, 0]))
                continue
            columns.append((features - centre).square().sum(1).sqrt())
    return torch.stack(columns, 1)


def metric_loss_loop(
    features: Tensor, labels: Tensor, class_centres: Tensor, ood_centres: Tensor, topk: float = 0.2, layers: int = 1
) -> Tensor:
    """The loss, with the threshold by indexing and the largest of the rest, read back to the host."""
    to_classes = distance_loop(features, class_centres, layers) * labels
    to_clusters = distance_loop(features, ood_centres, layers)
    present = to_clusters[to_clusters != 0]
    threshold = present.topk(int(len(present) * (1 - topk))).values.min().item()
    selected = (to_clusters < threshold).to(features.dtype)
    return (to_classes.sum() - (to_clusters * selected).sum()) / to_clusters.numel()
