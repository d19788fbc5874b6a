"""Build the caches that a plan describes: slots, and the copiers that fill them from the tiers below."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.disk_io.reader_pool import default_workers
from transformers_moe_offload.hf.model.plan import OffloadPlan, PoolPlan
from transformers_moe_offload.policies import make_policy
from transformers_moe_offload.slots.base import Slots
from transformers_moe_offload.slots.buffers import CopiedSlots, SlotPool
from transformers_moe_offload.slots.cuda.copier import CudaCopier
from transformers_moe_offload.slots.direct_io import DirectSlots
from transformers_moe_offload.slots.inline_reads import InlineReads
from transformers_moe_offload.slots.mapped import MappedSlots
from transformers_moe_offload.slots.transfer import Copier, HostCopier, StartHere, no_start
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.host_tier import HostTier
from transformers_moe_offload.store.layer_source import LayerSource
from transformers_moe_offload.store.record import OpenFill
from transformers_moe_offload.system.host_memory import PageMemory


class Caches(NamedTuple):
    """The caches of a plan, and the host tier behind them."""

    of_layer: dict[int, ExpertCache]
    """One cache for each pool: layer -> the cache it uses."""
    host: HostTier


def build_caches(plan: OffloadPlan, sources: Sequence[LayerSource], config: OffloadConfig) -> Caches:
    """The caches of a plan, empty, except those of pools with an arena, which `decode/engines.py` builds."""
    store = ExpertStore(sources, past_cache=plan.reads_past_cache)
    host = HostTier(store, plan.host_bytes)
    caches: dict[int, ExpertCache] = {}
    for pool in (pool for pool in plan.pools if not pool.arena_bytes):
        num_experts = {layer: store.layers[layer].spec.num_experts for layer in pool.layers}
        new_policy = partial(make_policy, config.policy)
        cache = ExpertCache(_slots(store, host, pool, config), pool.num_slots, num_experts, new_policy(), new_policy)
        caches |= dict.fromkeys(pool.layers, cache)
    return Caches(caches, host)


def _slots(store: ExpertStore, host: HostTier, pool: PoolPlan, config: OffloadConfig) -> Slots:
    if pool.is_mapped:
        return MappedSlots(store, workers_of(config))
    if pool.spare_bytes is not None and store.past_cache:
        return DirectSlots(store, pool.sizes[0], pool.spare_bytes, workers_of(config))
    fill = store.fill if pool.device.type == "cpu" else host.fill
    copier = copier_for(pool, fill, config, InlineReads(store).start)
    pages = PageMemory() if pool.device.type == "cpu" else None
    return CopiedSlots(store, SlotPool(pool.sizes[0], pool.device, pages), copier)


def copier_for(pool: PoolPlan, fill: OpenFill, config: OffloadConfig, small: StartHere = no_start) -> Copier:
    """The copier that fills the slots of a pool with records; on a CPU `small` may read small experts inline."""
    if pool.device.type == "cpu":
        return HostCopier(fill, workers_of(config), small)
    is_pinned = config.pin_memory is not False
    return CudaCopier(fill, workers_of(config), pool.device, pool.need.largest_bytes, is_pinned)


def workers_of(config: OffloadConfig) -> int:
    """Threads that read experts."""
    return config.io_workers or default_workers()
