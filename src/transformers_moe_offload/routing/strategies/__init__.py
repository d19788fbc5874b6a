"""The strategies that come with the package, by idea. Importing this registers them."""

from transformers_moe_offload.routing.strategies.ablation import Drop, Fixed
from transformers_moe_offload.routing.strategies.balanced import ExpertChoice, LinearAssignment
from transformers_moe_offload.routing.strategies.cache_aware import CacheAware
from transformers_moe_offload.routing.strategies.clusters import KMeans
from transformers_moe_offload.routing.strategies.ranked import TopK, TopP
from transformers_moe_offload.routing.strategies.replay import Replay
from transformers_moe_offload.routing.strategies.sampled import Gumbel, Hash, Noise, Random
from transformers_moe_offload.routing.strategies.steer import Steer

__all__ = [
    "CacheAware",
    "Drop",
    "ExpertChoice",
    "Fixed",
    "Gumbel",
    "Hash",
    "KMeans",
    "LinearAssignment",
    "Noise",
    "Random",
    "Replay",
    "Steer",
    "TopK",
    "TopP",
]
