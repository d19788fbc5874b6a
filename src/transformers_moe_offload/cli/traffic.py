"""Estimate how many bytes a token will read: the number of its experts is known beforehand, which ones is not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from transformers_moe_offload.expert import ExpertSpec
from transformers_moe_offload.hf.model.plan import OffloadPlan
from transformers_moe_offload.hf.routers.top_k import experts_per_token


@dataclass(frozen=True)
class Traffic:
    """Expected reads of one decoded token, with uniform routing and a full cache."""

    experts_per_token: int
    """Over all sparse layers."""
    nbytes: float
    """Bytes that are not in the cache."""


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
            nbytes += count * pool.need.all_bytes / pool.need.num_experts * absent * read_share
    return Traffic(total, nbytes)
