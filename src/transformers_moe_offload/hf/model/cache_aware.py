"""Let a model's routers prefer residents, as its config says, and end that.

`routing` does it, which is above this package and is not imported by it: the package's `__init__.py` registers both
functions, and imports `routing` when one of them is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers_moe_offload.config import CacheAwareConfig
from transformers_moe_offload.registry import Registry

_begin: Registry[Callable[[Any, CacheAwareConfig], None]] = Registry("way to prefer residents")
_end: Registry[Callable[[Any], None]] = Registry("way to prefer residents no more")

_NAME = "routing"


def register(begin: Callable[[Any, CacheAwareConfig], None], end: Callable[[Any], None]) -> None:
    """Say how routers of a model come to prefer residents, and how they cease to."""
    _begin.register(_NAME, exist_ok=True)(begin)
    _end.register(_NAME, exist_ok=True)(end)


def prefer_residents(model: Any, config: CacheAwareConfig) -> None:
    """Let all routers of a model that has just been loaded prefer residents."""
    _begin[_NAME](model, config)


def prefer_no_residents(model: Any) -> None:
    """Let the routers of a model choose as they would, as far as they prefer residents."""
    _end[_NAME](model)
