"""Run mixture-of-experts models that do not fit into memory.

    from transformers import AutoModelForCausalLM
    from transformers_moe_offload import OffloadConfig

    model = AutoModelForCausalLM.from_pretrained(repo, moe_offload=OffloadConfig(cache_budget="6GiB"))

Importing this package teaches every `from_pretrained` the keyword `moe_offload`. It touches no device.
"""

from transformers_moe_offload.config import ExpertFormats, HqqFormat, OffloadConfig, PrefetchConfig
from transformers_moe_offload.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    MoeOffloadError,
    RecipeError,
    UnsupportedModelError,
)
from transformers_moe_offload.hf.install import install, uninstall
from transformers_moe_offload.hf.model.handle import OffloadRuntime, cache_stats, restore
from transformers_moe_offload.policies import register_policy
from transformers_moe_offload.prefetch.predictors import register_predictor
from transformers_moe_offload.stats import CacheStats, LayerStats

__version__ = "0.1.0.dev0"

__all__ = [
    "CacheStats",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "ExpertFormats",
    "HqqFormat",
    "LayerStats",
    "MoeOffloadError",
    "OffloadConfig",
    "OffloadRuntime",
    "PrefetchConfig",
    "RecipeError",
    "UnsupportedModelError",
    "cache_stats",
    "install",
    "register_policy",
    "register_predictor",
    "restore",
    "uninstall",
]

install()
