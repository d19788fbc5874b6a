"""Run mixture-of-experts models that do not fit into memory.

    from transformers import AutoModelForCausalLM
    from transformers_moe_offload import OffloadConfig

    model = AutoModelForCausalLM.from_pretrained(repo, moe_offload=OffloadConfig(cache_budget="6GiB"))

Importing this package teaches every `from_pretrained` the keyword `moe_offload`. It touches no device.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers_moe_offload.config import CacheAwareConfig, ExpertFormats, HqqFormat, OffloadConfig, PrefetchConfig
from transformers_moe_offload.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    MoeOffloadError,
    RecipeError,
    UnsupportedModelError,
)
from transformers_moe_offload.hf.install import install, uninstall
from transformers_moe_offload.hf.model import cache_aware
from transformers_moe_offload.policies import register_policy
from transformers_moe_offload.stats import CacheStats, LayerStats

if TYPE_CHECKING:
    from transformers_moe_offload.hf.model.handle import OffloadRuntime, cache_stats, restore
    from transformers_moe_offload.hf.prebuilt.quantize import quantize_checkpoint
    from transformers_moe_offload.prefetch.predictors import register_predictor

__version__ = "0.1.0.dev0"

__all__ = [
    "CacheAwareConfig",
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
    "quantize_checkpoint",
    "register_policy",
    "register_predictor",
    "restore",
    "uninstall",
]


_ON_USE = {
    "OffloadRuntime": "hf.model.handle",
    "cache_stats": "hf.model.handle",
    "restore": "hf.model.handle",
    "quantize_checkpoint": "hf.prebuilt.quantize",
    "register_predictor": "prefetch.predictors",
}
"""Names that are imported when they are first used, with their modules: what it takes to run a model is imported when
one is loaded."""


def __getattr__(name: str) -> Any:
    if name not in _ON_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ON_USE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_USE})


def _prefer_residents(model: Any, config: CacheAwareConfig) -> None:
    import_module(f"{__name__}.routing.by_config").prefer_residents(model, config)


def _prefer_no_residents(model: Any) -> None:
    import_module(f"{__name__}.routing.by_config").prefer_no_residents(model)


cache_aware.register(_prefer_residents, _prefer_no_residents)
install()
