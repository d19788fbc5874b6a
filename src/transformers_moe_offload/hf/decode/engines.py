"""Build the engines of a plan: pinned arenas that hold all experts, and the slots on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn
from transformers.utils import logging

from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.device_decode.arena import Arena
from transformers_moe_offload.device_decode.engine import DeviceEngine
from transformers_moe_offload.device_decode.forward import OnDevice
from transformers_moe_offload.hf.decode.decoding import AddressedLayer
from transformers_moe_offload.hf.decode.obstacles import record_layout
from transformers_moe_offload.hf.model.experts_module import experts_at
from transformers_moe_offload.hf.model.plan import OffloadPlan, PoolPlan
from transformers_moe_offload.hf.model.pools import workers_of
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.policies import make_policy
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.layer_source import LayerSource


def build_engines(plan: OffloadPlan, sources: Sequence[LayerSource], config: OffloadConfig) -> dict[int, DeviceEngine]:
    """Sparse layer -> its engine; one engine for each pool that the plan has an arena for.

    Raises `PageLockError` if the system does not grant the pinned memory, and the errors of reading experts.
    """
    pools = [pool for pool in plan.pools if pool.arena_bytes]
    store = ExpertStore(sources, past_cache=plan.reads_past_cache)
    engines: list[DeviceEngine] = []
    found: dict[int, DeviceEngine] = {}
    try:
        with logging.tqdm(total=plan.arena_bytes, unit="B", unit_scale=True, desc="Reading experts") as bar:
            for pool in pools:
                arena = _arena(store, pool, config, bar.update)
                try:
                    engines.append(_engine(store, pool, arena, config))
                except BaseException:
                    arena.close()
                    raise
                found |= dict.fromkeys(pool.layers, engines[-1])
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return found


def addressed_layers(
    model: nn.Module,
    layers: Sequence[SparseLayer],
    sources: Mapping[int, LayerSource],
    engines: Mapping[int, DeviceEngine],
    obstacles: Mapping[str, str],
) -> dict[int, AddressedLayer]:
    """The layers that decode on the device, by index."""
    found = {}
    for layer in layers:
        if layer.index in engines and layer.name not in obstacles:
            source = sources[layer.index]
            assert layer.mlp is not None
            module, codec = experts_at(model, layer.name), source.codecs.usual
            compute = OnDevice(layer.mlp, record_layout(source), codec, layer.num_experts, module)
            found[layer.index] = AddressedLayer(layer.index, compute, engines[layer.index])
    return found


def _arena(store: ExpertStore, pool: PoolPlan, config: OffloadConfig, advance: Callable[[int], object]) -> Arena:
    return Arena(
        store,
        pool.layers,
        pool.device,
        budget_bytes=pool.arena_bytes,
        workers=workers_of(config),
        advance=advance,
    )


def _engine(store: ExpertStore, pool: PoolPlan, arena: Arena, config: OffloadConfig) -> DeviceEngine:
    num_experts = {layer: store.layers[layer].spec.num_experts for layer in pool.layers}
    return DeviceEngine(arena, num_experts, pool.num_slots, make_policy(config.policy), pool.device)
