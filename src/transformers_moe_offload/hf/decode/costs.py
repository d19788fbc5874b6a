"""`decode="auto"`: find the pools that decode faster on their device than from the host, by measured rates.

The formulas are in `device_decode/cost_model.py`; the rates are measured on the first layer of a pool that can decode
on the device, with meaningless weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing

from torch import nn

from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.device_decode.cost_model import DecodeRates, costs
from transformers_moe_offload.device_decode.profiling import decode_rates
from transformers_moe_offload.hf.decode.obstacles import record_layout
from transformers_moe_offload.hf.model.experts_module import experts_at
from transformers_moe_offload.hf.model.host_sides import miss_rates, token_of
from transformers_moe_offload.hf.model.plan import OffloadPlan, PoolPlan
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.hf.routers.top_k import experts_per_token
from transformers_moe_offload.hybrid.cpu_experts import HostCompute, is_portable
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.layer_source import LayerSource

logger = logging.getLogger(__name__)


def slower_on_device(
    model: nn.Module,
    layers: Sequence[SparseLayer],
    sources: Mapping[int, LayerSource],
    plan: OffloadPlan,
    config: OffloadConfig,
) -> dict[PoolPlan, str]:
    """The pools of a plan that could decode on their devices but are not faster there -> the reason.

    `layers` are those that can decode on the device.
    """
    found = {}
    for pool in plan.pools:
        if pool.arena_bytes:
            layer = next(layer for layer in layers if layer.index in pool.layers)
            reason = _why_not(model, layer, sources, pool, config)
            if reason is not None:
                found[pool] = reason
    return found


def rates_of(
    model: nn.Module, layer: SparseLayer, sources: Mapping[int, LayerSource], pool: PoolPlan, config: OffloadConfig
) -> DecodeRates:
    """Measured times of a decode step in a layer of a pool."""
    source, module = sources[layer.index], experts_at(model, layer.name)
    assert layer.mlp is not None
    with closing(HostCompute()) as host:
        misses = miss_rates(model, layer, pool, ExpertStore([source]), config, host)
    return decode_rates(
        layer.mlp,
        module,
        token_of(model, layer, source.spec, pool.device),
        _num_wanted(model, layer),
        record_layout(source),
        source.codings.usual,
        misses,
    )


def _why_not(
    model: nn.Module, layer: SparseLayer, sources: Mapping[int, LayerSource], pool: PoolPlan, config: OffloadConfig
) -> str | None:
    rates = rates_of(model, layer, sources, pool, config)
    assert layer.mlp is not None
    found = costs(
        rates,
        _num_wanted(model, layer),
        pool.num_slots / pool.need.num_experts,
        computes=config.misses != "fetch" and is_portable(layer.mlp, experts_at(model, layer.name)),
    )
    logger.info(
        f"{pool.device}: a sparse layer decodes in {1e6 * found.from_host_s:.0f} us from the host and in "
        f"{1e6 * found.on_device_s:.0f} us on the device, by measured rates; an absent expert is moved in "
        f"{1e6 * rates.misses.fetch_s:.0f} us, read in place in {1e6 * rates.read_s:.0f} us and computed by the host "
        f"in {1e6 * rates.misses.expert_s:.0f} us"
    )
    if found.is_device_faster:
        return None
    return f"from the host it takes {1e6 * found.from_host_s:.0f} us, on the device {1e6 * found.on_device_s:.0f} us"


def _num_wanted(model: nn.Module, layer: SparseLayer) -> int:
    return min(experts_per_token(model, layer.name) or 1, layer.num_experts)
