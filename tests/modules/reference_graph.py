"""The global reasoning unit as it is written in the paper and done in the released code: all maps are made."""

import torch
from torch import Tensor

from wsss_modules import GlobalReasoningUnit


def global_reasoning(unit: GlobalReasoningUnit, features: Tensor) -> Tensor:
    """States and assignments of all cells (S, N) and (M, N), and the states brought back (S, N)."""
    states = unit.state(features).flatten(2)
    assignment = unit.project(features).flatten(2)
    nodes = torch.matmul(states, assignment.transpose(1, 2))  # (B, S, M)
    if unit.normalize:
        nodes = nodes / states.shape[2]
    mixed = unit.node_mix(nodes.transpose(1, 2)).transpose(1, 2) + nodes
    found = unit.state_mix(torch.relu(mixed))
    back = torch.matmul(found, assignment).view(len(features), -1, *features.shape[2:])
    return features + unit.norm(unit.extend(back))
