"""Eviction policies: which residents leave first when a load needs a slot. Plain Python: no tensors, no clock."""

from transformers_moe_offload.policies.base import ORACLE, EvictionPolicy, make_policy, policy_names, register_policy
from transformers_moe_offload.policies.belady import Belady
from transformers_moe_offload.policies.least_stale import LeastStale
from transformers_moe_offload.policies.lfru import LFRU
from transformers_moe_offload.policies.lfu import LFU
from transformers_moe_offload.policies.lru import LRU
from transformers_moe_offload.policies.random import Random
from transformers_moe_offload.policies.sieve import Sieve
from transformers_moe_offload.policies.slru import SLRU

__all__ = [
    "LFRU",
    "LFU",
    "LRU",
    "ORACLE",
    "SLRU",
    "Belady",
    "EvictionPolicy",
    "LeastStale",
    "Random",
    "Sieve",
    "make_policy",
    "policy_names",
    "register_policy",
]
