"""What users may ask for: frozen dataclasses that are checked when they are made."""

from transformers_moe_offload.config.budget import Budget
from transformers_moe_offload.config.cache_aware import CacheAwareConfig
from transformers_moe_offload.config.formats import ExpertFormats, HqqFormat
from transformers_moe_offload.config.offload import Arithmetic, Misses, OffloadConfig
from transformers_moe_offload.config.prefetch import PrefetchConfig

__all__ = [
    "Arithmetic",
    "Budget",
    "CacheAwareConfig",
    "ExpertFormats",
    "HqqFormat",
    "Misses",
    "OffloadConfig",
    "PrefetchConfig",
]
