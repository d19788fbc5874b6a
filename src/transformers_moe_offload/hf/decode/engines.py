"""Which layers of a model decode on the device, or why they cannot, and the engines that they decode with: page-locked
arenas that hold all experts, and the slots on the device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from torch import nn
from transformers.utils.logging import tqdm

from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.device_decode.arena import Arena
from transformers_moe_offload.device_decode.engine import DeviceEngine
from transformers_moe_offload.device_decode.forward import OnDevice, missing_on_device
from transformers_moe_offload.hf.decode.decoding import AddressedLayer
from transformers_moe_offload.hf.model.experts_module import experts_at
from transformers_moe_offload.hf.model.plan import OffloadPlan, PoolPlan
from transformers_moe_offload.hf.model.pools import workers_of
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.policies import make_policy
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.layer_source import LayerSource
from transformers_moe_offload.store.record import RecordLayout

logger = logging.getLogger(__name__)


def obstacles_of(
    layers: Sequence[SparseLayer], sources: Mapping[int, LayerSource], config: OffloadConfig
) -> dict[str, str]:
    """Module path of a layer -> why it cannot decode on the device."""
    found = {layer.name: obstacle(layer, sources[layer.index], config) for layer in layers}
    return {name: reason for name, reason in found.items() if reason is not None}


def obstacle(layer: SparseLayer, source: LayerSource, config: OffloadConfig) -> str | None:
    """Why a layer cannot decode on its device; None if it can."""
    if config.decode == "host":
        return "decode='host'"
    if config.arithmetic == "exact":
        return "arithmetic='exact' computes with the model's own code"
    if layer.mlp is None:
        return f"the arithmetic of {layer.plain_class.__name__} is not supported"
    return missing_on_device(layer.mlp, record_layout(source), source.codecs, layer.device)


def record_layout(source: LayerSource) -> RecordLayout:
    """The layout of the records of a layer's experts, except hot ones."""
    codec = source.codecs.usual
    return RecordLayout(source.spec.fields if codec is None else codec.stored)


def report(obstacles: Mapping[str, str], num_layers: int, config: OffloadConfig) -> None:
    """Log, once per loaded model, which layers do not decode on the device although the config asks for it."""
    if config.decode == "host" or not obstacles:
        return
    if len(obstacles) == num_layers and len(set(obstacles.values())) == 1:
        reason = next(iter(obstacles.values()))
        logger.warning(f"decode={config.decode!r} has no effect: {reason}")
        return
    for reason in dict.fromkeys(obstacles.values()):
        names = [name for name, other in obstacles.items() if other == reason]
        logger.warning(f"{len(names)} of {num_layers} sparse layers, {names[0]} first, decode on the host: {reason}")


def build_engines(plan: OffloadPlan, sources: Sequence[LayerSource], config: OffloadConfig) -> dict[int, DeviceEngine]:
    """Sparse layer -> its engine; one engine for each pool that the plan has an arena for.

    Raises `PageLockError` if the system does not grant the pinned memory, and the errors of reading experts.
    """
    pools = [pool for pool in plan.pools if pool.arena_bytes]
    store = ExpertStore(sources, past_cache=plan.reads_past_cache)
    engines: list[DeviceEngine] = []
    found: dict[int, DeviceEngine] = {}
    try:
        with tqdm(total=plan.arena_bytes, unit="B", unit_scale=True, desc="Reading experts") as bar:
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
