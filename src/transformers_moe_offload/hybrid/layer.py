"""The host's part in one sparse layer: which of the absent experts it takes over, and what it needs for that."""

# T tokens, H hidden

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.compute.mlp import ExpertMlp, ExpertWeights
from transformers_moe_offload.compute.token_grouping import Grouping
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.hybrid.cpu_experts import HostCompute, HostRows
from transformers_moe_offload.hybrid.split import MissRates, split

Share = dict[int, Sequence[int]]
"""The experts that the host computes, each with the tokens that want it."""


@dataclass(frozen=True)
class HostSide:
    """What the host can do for the layers of one accelerator."""

    compute: HostCompute
    rates: MissRates
    is_at_hand: Callable[[ExpertId], bool]
    """Whether an expert is in host memory."""
    hold: Callable[[ExpertId], AbstractContextManager[ExpertWeights]]
    """Opens an expert in host memory; its weights are valid until it is closed."""

    def share(self, cache: ExpertCache, layer: int, grouping: Grouping, loads_under_way: int = 0) -> Share:
        """The experts that the host should compute in a layer that is about to be visited. Another thread's visit may
        come between; experts that it loads are then computed here for nothing."""
        absent = [expert for expert in grouping.by_last_use if cache.is_absent(ExpertId(layer, expert))]
        tokens = {expert: len(grouping.tokens[expert]) for expert in absent}
        at_hand = {expert for expert in absent if self.is_at_hand(ExpertId(layer, expert))}
        computed = split(tokens, self.rates, at_hand, loads_under_way).computed
        return {expert: list(grouping.tokens[expert]) for expert in computed}

    def start(self, mlp: ExpertMlp, experts: nn.Module, hidden_states: Tensor, layer: int, share: Share) -> HostRows:
        """Begin to compute a share: hidden_states (T, H) on the accelerator."""
        return self.compute.start(mlp, experts, hidden_states, share, lambda expert: self.hold(ExpertId(layer, expert)))
