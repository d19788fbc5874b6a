"""Decide which layers of a model the host helps to compute, by measured rates.

Only for layers on an accelerator whose experts are in host memory. Rates are measured once for each pool, when its
cache is built.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.compute.mlp import ExpertWeights
from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.expert import ExpertId, ExpertSpec
from transformers_moe_offload.hf.model.experts_module import experts_at
from transformers_moe_offload.hf.model.plan import OffloadPlan, PoolPlan
from transformers_moe_offload.hf.model.pools import copier_for
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.hf.routers.top_k import experts_per_token
from transformers_moe_offload.hybrid.cpu_experts import HostCompute, HostSide, is_portable
from transformers_moe_offload.hybrid.profiling import measured_rates
from transformers_moe_offload.hybrid.split import MissRates, pays
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.host_tier import HostTier
from transformers_moe_offload.store.record import whole

logger = logging.getLogger(__name__)


def host_sides(
    model: nn.Module, layers: Sequence[SparseLayer], plan: OffloadPlan, host: HostTier, config: OffloadConfig
) -> dict[int, HostSide]:
    """Sparse layer -> the host's part in its misses; without layers whose misses are all fetched."""
    if config.misses == "fetch":
        return {}
    if all(pool.device.type == "cpu" for pool in plan.pools):
        if config.misses == "compute":
            logger.warning("misses='compute' has no effect: experts are computed on the CPU anyway")
        return {}
    if config.misses == "auto" and config.arithmetic == "exact":
        return {}
    by_index = {layer.index: layer for layer in layers}
    found: dict[int, HostSide] = {}
    try:
        for pool in plan.pools:
            members = [by_index[index] for index in pool.layers]
            if pool.device.type == "cpu" or pool.arena_bytes or not all(_is_portable(model, one) for one in members):
                continue
            side = _side_of(model, members[0], pool, host, config)
            if config.misses == "compute" or pays(side.rates, experts_per_token(model, members[0].name) or 1):
                found |= dict.fromkeys(pool.layers, side)
            else:
                side.compute.close()
    except BaseException:
        for side in set(found.values()):
            side.compute.close()
        raise
    return found


def _is_portable(model: nn.Module, layer: SparseLayer) -> bool:
    return layer.mlp is not None and is_portable(layer.mlp, experts_at(model, layer.name))


def miss_rates(
    model: nn.Module, layer: SparseLayer, pool: PoolPlan, store: ExpertStore, config: OffloadConfig, host: HostCompute
) -> MissRates:
    """Measured times to serve absent experts of one layer of a pool."""
    module, spec = experts_at(model, layer.name), store.layers[layer.index].spec
    hot_experts = store.layers[layer.index].codecs.hot_experts
    usual = ExpertId(spec.layer, next(expert for expert in range(spec.num_experts) if expert not in hot_experts))
    assert layer.mlp is not None
    return measured_rates(
        layer.mlp,
        module,
        token_of(model, layer, spec, pool.device),
        pool.need.slot_bytes,
        lambda record: _opened(store, usual, record),
        lambda read_into: copier_for(pool, whole(read_into, pool.need.slot_bytes), config),
        host,
    )


def token_of(model: nn.Module, layer: SparseLayer, spec: ExpertSpec, device: torch.device) -> Tensor:
    """A token of zeros, (1, H) in a layer's dtype, for measurements."""
    hidden_size = spec.fields[0].shape[-2 if layer.layout.is_transposed(experts_at(model, layer.name)) else -1]
    return torch.zeros(1, hidden_size, dtype=torch_dtype(spec.fields[0].dtype), device=device)


def _side_of(model: nn.Module, layer: SparseLayer, pool: PoolPlan, host: HostTier, config: OffloadConfig) -> HostSide:
    store, compute = host.store, HostCompute()
    try:
        rates = miss_rates(model, layer, pool, store, config, compute)
    except BaseException:
        compute.close()
        raise

    @contextmanager
    def hold(expert: ExpertId) -> Iterator[ExpertWeights]:
        with host.hold(expert) as record:
            yield _opened(store, expert, record)

    return HostSide(compute, rates, host.has, hold)


def _opened(store: ExpertStore, expert: ExpertId, record: Tensor) -> Any:
    weights, codec = store.layout(*expert).views(record), store.layers[expert.layer].codecs.of(expert.expert)
    return weights if codec is None else codec.matrices(weights)
