"""How many experts a token takes, read from the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

_CONFIG_NAMES = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
"""Names in configs, for routers that read their config at every call (gemma4, 5.23). Otherwise the router, the block
around it or the experts have an attribute `top_k`."""


def experts_per_token(model: nn.Module, experts: str) -> int | None:
    """How many experts of the module at path `experts` each token takes; None if the model does not say."""
    module = model.get_submodule(experts)
    block = model.get_submodule(experts.rpartition(".")[0])
    around = [module, block, *(child for child in block.children() if child is not module)]
    for place in around:
        if _is_count(vars(place).get("top_k")):
            return int(vars(place)["top_k"])
    return next((count for place in around for count in _counts_in(getattr(place, "config", None))), None)


def _counts_in(config: Any) -> Iterator[int]:
    for name in _CONFIG_NAMES:
        try:
            count = getattr(config, name, None)
        except RuntimeError:  # raised by a config whose layers differ in this value
            continue
        if count is not None and _is_count(count):
            yield int(count)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
