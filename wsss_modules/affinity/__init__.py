"""Affinity of pixel pairs: offsets, paths, labels, `LocalAffinity`, boundary maps, the heads of AffinityNet and AFA."""

from wsss_modules.affinity.attention import (
    AttentionAffinityHead,
    labels_to_affinity,
    local_window_mask,
    window_offsets,
)
from wsss_modules.affinity.edge import EdgeToAffinity, edge_to_affinity
from wsss_modules.affinity.head import AffinityHead, feature_affinity
from wsss_modules.affinity.local import LocalAffinity, Transition
from wsss_modules.affinity.offsets import PairIndex, PathOffsets, affinity_offsets, pair_index, path_offsets
from wsss_modules.affinity.pairs import AffinityLabels, affinity_labels, pair_displacement

__all__ = [
    "AffinityHead",
    "AffinityLabels",
    "AttentionAffinityHead",
    "EdgeToAffinity",
    "LocalAffinity",
    "PairIndex",
    "PathOffsets",
    "Transition",
    "affinity_labels",
    "affinity_offsets",
    "edge_to_affinity",
    "feature_affinity",
    "labels_to_affinity",
    "local_window_mask",
    "pair_displacement",
    "pair_index",
    "path_offsets",
    "window_offsets",
]
