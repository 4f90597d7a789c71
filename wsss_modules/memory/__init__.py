"""What RCA remembers: region embeddings of the whole data set, and attention maps of every training image."""

from wsss_modules.memory.accumulation import OnlineAttentionAccumulator, attention_to_uint8
from wsss_modules.memory.aggregation import SemanticAggregation
from wsss_modules.memory.bank import RegionMemoryBank, kmeans_prototypes
from wsss_modules.memory.regions import RegionMixUp, RegionPool, draw_region_mix_up, region_mask, region_pool

__all__ = [
    "OnlineAttentionAccumulator",
    "RegionMemoryBank",
    "RegionMixUp",
    "RegionPool",
    "SemanticAggregation",
    "attention_to_uint8",
    "draw_region_mix_up",
    "kmeans_prototypes",
    "region_mask",
    "region_pool",
]
