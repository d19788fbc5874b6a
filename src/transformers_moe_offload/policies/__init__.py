"""Who leaves when somebody needs room. Plain Python: no tensors, no clock."""

from transformers_moe_offload.policies.base import EvictionPolicy, make_policy, policy_names, register_policy
from transformers_moe_offload.policies.lru import LRU

__all__ = ["LRU", "EvictionPolicy", "make_policy", "policy_names", "register_policy"]
