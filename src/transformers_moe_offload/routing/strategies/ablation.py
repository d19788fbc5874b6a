"""Ablations: remove some experts, or allow only some."""

# T tokens, E experts

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing.choice import Choice, RouterCall, best
from transformers_moe_offload.routing.strategy import RoutingStrategy, register_strategy

Experts = Sequence[int] | Mapping[int, Sequence[int]]
"""The same experts in all layers, or a list for each layer, by the number of the router."""


@dataclass(frozen=True)
class _Named(RoutingStrategy):
    """A strategy with a list of experts."""

    experts: Experts

    def __post_init__(self) -> None:
        lists = self.experts.values() if isinstance(self.experts, Mapping) else [self.experts]
        if not lists:
            raise ConfigError("experts={} names no layer")
        for experts in lists:
            is_list = isinstance(experts, Sequence) and not isinstance(experts, str)
            if not is_list or not all(isinstance(e, int) and not isinstance(e, bool) and e >= 0 for e in experts):
                raise ConfigError(f"experts={experts!r} is not a list of numbers of experts")
            if not experts or len(set(experts)) < len(experts):
                raise ConfigError(f"experts={experts!r} names {'an expert twice' if experts else 'no expert'}")

    def of_layer(self, layer: int) -> list[int]:
        """The experts named for a layer."""
        if not isinstance(self.experts, Mapping):
            return list(self.experts)
        if layer not in self.experts:
            raise ConfigError(f"experts names those of routers {sorted(self.experts)}, and not of router {layer}")
        return list(self.experts[layer])

    def check(self, layer: int, num_experts: int, top_k: int | None) -> None:
        """The router has these experts."""
        largest = max(self.of_layer(layer))
        if largest >= num_experts:
            raise ConfigError(f"experts has {largest}, but router {layer} has experts 0 to {num_experts - 1}")


@register_strategy("fixed")
@dataclass(frozen=True)
class Fixed(_Named):
    """The same experts for every token, as many as are given, weighted as the router scores them.

    The forced experts of ablation studies, as in Fedus et al. 2022, "A Review of Sparse Expert Models", section 6
    (arXiv 2209.01667). Experts that the architecture rules out for a token are taken, too.
    """

    def choose(self, call: RouterCall) -> Choice:
        """The same row for all tokens."""
        row = torch.tensor(self.of_layer(call.layer), device=call.scores.device)
        return Choice(row.expand(call.num_tokens, -1).contiguous())


@register_strategy("drop")
@dataclass(frozen=True)
class Drop(_Named):
    """The router's own choice among the experts that are left when some are removed.

    Expert pruning without retraining: Lu et al. 2024, "Not All Experts are Equal", section 3.2 (arXiv 2402.14800).
    """

    def check(self, layer: int, num_experts: int, top_k: int | None) -> None:
        """At least as many experts stay as a token takes."""
        super().check(layer, num_experts, top_k)
        left = num_experts - len(self.of_layer(layer))
        if left < (top_k or 1):
            raise ConfigError(
                f"dropping {num_experts - left} of {num_experts} experts leaves router {layer} with {left}, and a "
                f"token takes {top_k or 1}; drop fewer, or use strategy 'fixed' with those that shall stay"
            )

    def choose(self, call: RouterCall) -> Choice:
        """The best of the experts that stay."""
        gone = torch.tensor(self.of_layer(call.layer), device=call.scores.device)
        return best(call.scores.index_fill(1, gone, -torch.inf), call.top_k)
