"""`OffloadConfig.cache_aware`: set the strategy of that name in a model that has been loaded, and take it out again."""

from __future__ import annotations

from typing import Any

from transformers_moe_offload.config import CacheAwareConfig
from transformers_moe_offload.routing.strategies.cache_aware import CacheAware
from transformers_moe_offload.routing.switching import followed, reset, set_routing


def prefer_residents(model: Any, config: CacheAwareConfig) -> None:
    """Let all routers prefer residents."""
    set_routing(model, CacheAware(strength=config.strength, protect=config.protect))


def prefer_no_residents(model: Any) -> None:
    """Let those routers that prefer residents choose as they would."""
    reset(model, layers=[index for index, strategy in followed(model).items() if strategy.follows_cache])
