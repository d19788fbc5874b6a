"""Caches over small stores, and what tests read off them."""

import torch

from copiers import FakeCopier
from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.policies import LRU
from transformers_moe_offload.slots.buffers import CopiedSlots, SlotPool
from transformers_moe_offload.slots.transfer import HostCopier

NUM_LAYERS, NUM_EXPERTS = 3, 8
CPU = torch.device("cpu")


def cache_of(store, num_slots, copier=None, layers=(0,)):
    """A cache over FakeCopier, whose slots stay as they are, unless another copier is given."""
    slots = CopiedSlots(store, SlotPool(store.layout(0, 0).nbytes, CPU), copier or FakeCopier())
    return ExpertCache(slots, num_slots, dict.fromkeys(layers, NUM_EXPERTS), LRU())


def reading_cache_of(store, num_slots, layers=(0,), workers=2):
    return cache_of(store, num_slots, HostCopier(store.fill, workers), layers)


def visit_all(cache, layer, wanted):
    with cache.turn, cache.visit(layer, wanted) as visit:
        return [expert for expert, _ in visit]


def numbers_in(weights):
    """The distinct values in an expert's weights: one number if the weights are one expert's."""
    return {value for tensor in weights.values() for value in tensor.flatten().tolist()}


def counts(stats):
    return stats.hits, stats.late_hits, stats.misses


def residents(cache):
    return sorted(expert.expert for expert in cache.residency.residents)
