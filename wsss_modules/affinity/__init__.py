"""Affinity of pixel pairs: offsets and paths, pair labels, `LocalAffinity`, boundary maps, AffinityNet's head."""

from wsss_modules.affinity.edge import EdgeToAffinity, edge_to_affinity
from wsss_modules.affinity.head import AffinityHead, feature_affinity
from wsss_modules.affinity.local import LocalAffinity, Transition
from wsss_modules.affinity.offsets import PairIndex, PathOffsets, affinity_offsets, pair_index, path_offsets
from wsss_modules.affinity.pairs import AffinityLabels, affinity_labels, pair_displacement

__all__ = [
    "AffinityHead",
    "AffinityLabels",
    "EdgeToAffinity",
    "LocalAffinity",
    "PairIndex",
    "PathOffsets",
    "Transition",
    "affinity_labels",
    "affinity_offsets",
    "edge_to_affinity",
    "feature_affinity",
    "pair_displacement",
    "pair_index",
    "path_offsets",
]
