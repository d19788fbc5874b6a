"""Take the experts that the router ranks highest: a given number, or as many as have a share of the probability."""

# T tokens, K experts per token, E experts

from __future__ import annotations

from dataclasses import dataclass

import torch

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing.choice import Choice, RouterCall, best, packed
from transformers_moe_offload.routing.strategy import RoutingStrategy, check_count, check_number, register_strategy


@register_strategy("top_k")
@dataclass(frozen=True)
class TopK(RoutingStrategy):
    """The k best experts; without `k`, or with the model's own, exactly what the model does.

    Shazeer et al. 2017, "Outrageously Large Neural Networks", section 2.1 (arXiv 1701.06538), without the noise.
    """

    k: int | None = None

    def __post_init__(self) -> None:
        if self.k is not None:
            check_count("k", self.k)

    def check(self, layer: int, num_experts: int, top_k: int | None) -> None:
        """At most as many experts as the router has."""
        _check_fits("k", self.k or 1, layer, num_experts)

    def choose(self, call: RouterCall) -> Choice | None:
        """The router's own choice, or its k best."""
        return None if self.k is None or self.k == call.top_k else best(call.scores, self.k)


@register_strategy("top_p")
@dataclass(frozen=True)
class TopP(RoutingStrategy):
    """The fewest best experts with a share `p` of the router's probability together; at least one, at most `most`.

    Huang et al. 2024, "Harder Tasks Need More Experts", section 3.2 (arXiv 2403.07652).
    """

    p: float = 0.6
    most: int | None = None

    def __post_init__(self) -> None:
        check_number("p", self.p, above=0)
        if self.p > 1:
            raise ConfigError(f"p={self.p!r} is more than all of the probability; choose a share above 0 and up to 1")
        if self.most is not None:
            check_count("most", self.most)

    def check(self, layer: int, num_experts: int, top_k: int | None) -> None:
        """At most as many experts as the router has."""
        _check_fits("most", self.most or 1, layer, num_experts)

    def choose(self, call: RouterCall) -> Choice:
        """The experts for which all better ones together have less than `p`."""
        ordered, experts = call.probabilities.sort(dim=-1, descending=True)
        of_betters = ordered.cumsum(-1) - ordered
        is_wanted = of_betters < self.p
        is_wanted[:, 0] = True
        if self.most is not None:
            is_wanted[:, self.most :] = False
        is_chosen = torch.zeros_like(is_wanted).scatter(1, experts, is_wanted) & ~call.scores.isneginf()
        return packed(is_chosen, call.scores)


def _check_fits(option: str, count: int, layer: int, num_experts: int) -> None:
    """Raise `ConfigError` for more experts than a router has."""
    if count > num_experts:
        raise ConfigError(
            f"{option}={count}, but router {layer} has {num_experts} experts; choose {num_experts} or fewer"
        )
