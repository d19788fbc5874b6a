"""Expect how many bytes a token will read: which experts it takes is up to the router, how many is known beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from transformers_moe_offload.expert import ExpertSpec
from transformers_moe_offload.hf.plan import OffloadPlan

_CONFIG_NAMES = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
"""What configs call it where the router asks its config at every call (gemma4, 5.23). Everywhere else the router, the
block around it or the experts have it as `top_k`."""


@dataclass(frozen=True)
class Traffic:
    """Expected reads of one decoded token, routing being uniform and the cache full."""

    experts_per_token: int
    """Over all sparse layers."""
    nbytes: float
    """Bytes that are not in the cache."""


def experts_per_token(model: nn.Module, experts: str) -> int | None:
    """How many experts of a module each token takes, `experts` being its path; None where the model does not say."""
    module = model.get_submodule(experts)
    block = model.get_submodule(experts.rpartition(".")[0])
    around = [module, block, *(child for child in block.children() if child is not module)]
    for place in around:
        if _is_count(vars(place).get("top_k")):
            return int(vars(place)["top_k"])
    return next((count for place in around for count in _counts_in(getattr(place, "config", None))), None)


def expect(
    model: nn.Module, experts: tuple[ExpertSpec, ...], plan: OffloadPlan, read_share: float = 1.0
) -> Traffic | None:
    """The traffic under a plan, or None where the model does not say how many experts a token takes.

    `read_share` is how many bytes are read for each byte in a slot, when the files have another dtype.
    """
    total, nbytes = 0, 0.0
    by_layer = {spec.layer: spec for spec in experts}
    for pool in plan.pools:
        absent = 1 - pool.num_slots / pool.need.num_experts
        for layer in pool.layers:
            count = experts_per_token(model, by_layer[layer].name)
            if count is None:
                return None
            total += count
            nbytes += count * by_layer[layer].expert_nbytes * absent * read_share
    return Traffic(total, nbytes)


def _counts_in(config: Any) -> Iterator[int]:
    for name in _CONFIG_NAMES:
        try:
            count = getattr(config, name, None)
        except RuntimeError:  # a config whose layers differ does not answer for all of them
            continue
        if count is not None and _is_count(count):
            yield int(count)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
