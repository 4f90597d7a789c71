"""RCA's contrast as the released code does it: one region after the other, the whole memory normalised for each."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.modules.reference_memory import regions
from wsss_modules import RegionMixUp


def region_cost(query: Tensor, memory: Tensor, own: int, temperature: float, log_floor: float | None) -> Tensor:
    """Cost of one embedding (D,) as a region of class ``own``."""
    query = F.normalize(query, dim=0)
    others = torch.cat([memory[:own], memory[own + 1 :]]).flatten(0, 1)
    positive = F.normalize(memory[own], dim=1) @ query / temperature  # (N,)
    negative = F.normalize(others, dim=1) @ query / temperature
    largest = (F.normalize(memory.flatten(0, 1), dim=1) @ query / temperature).max().detach()
    total = torch.exp(negative - largest).sum() + torch.exp(positive - largest)
    return -(positive - largest - torch.log(total if log_floor is None else total.clamp(min=log_floor))).mean()


def regional_contrast(
    embedding: Tensor,
    cam: Tensor,
    labels: Tensor,
    memory: Tensor,
    mix: RegionMixUp,
    temperature: float = 0.07,
    log_floor: float | None = None,
) -> Tensor:
    """Cost of each image (B,). No region may be empty."""
    costs, draws = [], zip(*mix, strict=True)
    for image in range(len(labels)):
        own_mask, own_costs = regions(cam[image]), []
        for own in labels[image].nonzero().flatten().tolist():
            partner, other, weight = next(draws)
            mask = regions(cam[partner])[other]
            first = (embedding[image] * own_mask[own]).sum((1, 2)) / own_mask[own].sum()
            second = (embedding[partner] * mask).sum((1, 2)) / mask.sum()
            query = weight * first + (1 - weight) * second
            own_cost = region_cost(query, memory, own, temperature, log_floor)
            other_cost = region_cost(query, memory, int(other), temperature, log_floor)
            own_costs.append(weight * own_cost + (1 - weight) * other_cost)
        costs.append(torch.stack(own_costs).mean())
    return torch.stack(costs)
