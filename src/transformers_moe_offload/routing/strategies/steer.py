"""Promote some experts and suppress others."""

# T tokens, K experts per token, E experts

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing.choice import Choice, RouterCall, best
from transformers_moe_offload.routing.strategies.ablation import Experts
from transformers_moe_offload.routing.strategy import RoutingStrategy, register_strategy


@register_strategy("steer")
@dataclass(frozen=True)
class Steer(RoutingStrategy):
    """Every token takes the experts of `promote`, as if the router had found them best, and none of `suppress`.

    SteerMoE, Fayyaz et al. 2025, section 3.2 (arXiv 2509.09660): a promoted expert's score becomes the greatest of its
    token, for its weight as well, and a suppressed one's the least, so that it is taken only where too few others are
    left. Experts that the architecture rules out for a token stay out. `RoutingTrace.contrast` finds experts to steer
    by.
    """

    promote: Experts = field(default_factory=dict)
    """Numbers of experts, the same for all routers, or a list for some of them, by the number of the router."""
    suppress: Experts = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option in ("promote", "suppress"):
            experts = getattr(self, option)
            is_by_router = isinstance(experts, Mapping)
            if is_by_router and not all(_is_number(router) for router in experts):
                raise ConfigError(f"{option}={experts!r} has keys that are not numbers of routers")
            for one in experts.values() if is_by_router else [experts]:
                if not isinstance(one, Sequence) or isinstance(one, str) or not all(map(_is_number, one)):
                    raise ConfigError(f"{option}={one!r} is not a list of numbers of experts")
                if len(set(one)) < len(one):
                    raise ConfigError(f"{option}={one!r} names an expert twice")
        if not self.promote and not self.suppress:
            raise ConfigError("neither promote nor suppress names an expert; name one at least")
        routers = {router for one in (self.promote, self.suppress) if isinstance(one, Mapping) for router in one}
        for router in routers or {0}:
            both = set(_of(self.promote, router)) & set(_of(self.suppress, router))
            if both:
                raise ConfigError(
                    f"expert {min(both)} of router {router} is in promote and in suppress; leave it in one"
                )

    def check_model(self, num_routers: int) -> None:
        """The model has the routers that are named."""
        for option in ("promote", "suppress"):
            experts = getattr(self, option)
            last = max(experts, default=0) if isinstance(experts, Mapping) else 0
            if last >= num_routers:
                raise ConfigError(f"{option} names router {last}, but the model has routers 0 to {num_routers - 1}")

    def check(self, layer: int, num_experts: int, top_k: int | None) -> None:
        """The router has the experts, and a token has room for those that are promoted."""
        promoted, suppressed = _of(self.promote, layer), _of(self.suppress, layer)
        for option, experts in (("promote", promoted), ("suppress", suppressed)):
            if experts and max(experts) >= num_experts:
                raise ConfigError(
                    f"{option} has expert {max(experts)}, but router {layer} has experts 0 to {num_experts - 1}"
                )
        if top_k is not None and len(promoted) > top_k:
            raise ConfigError(
                f"promote has {len(promoted)} experts of router {layer}, but a token takes {top_k}; promote {top_k} or "
                f"fewer"
            )
        left = num_experts - len(suppressed)
        if left < (top_k or 1):
            raise ConfigError(
                f"suppress leaves router {layer} with {left} of {num_experts} experts, and a token takes {top_k or 1}; "
                f"suppress fewer"
            )

    def choose(self, call: RouterCall) -> Choice | None:
        """Promoted experts first, suppressed ones last."""
        promoted, suppressed = (_of(one, call.layer) for one in (self.promote, self.suppress))
        if not promoted and not suppressed:
            return None
        scores = call.scores.float()
        is_out = scores.isneginf()
        lowest = scores.masked_fill(is_out, torch.inf).amin(-1, keepdim=True)
        highest = scores.amax(-1, keepdim=True)
        # Two ranges apart, so that the order among the promoted, and among the suppressed, stays the router's.
        distance = 2 * (highest - lowest) + 1
        shift = torch.zeros(call.num_experts, device=scores.device)
        shift[promoted], shift[suppressed] = 1.0, -1.0
        choice = best((scores + shift * distance).masked_fill(is_out, -torch.inf), call.top_k)
        return choice._replace(is_raised=_are_in(choice.experts, promoted)) if promoted else choice


def _of(experts: Experts, layer: int) -> list[int]:
    """The experts of a router."""
    return list(experts.get(layer, ())) if isinstance(experts, Mapping) else list(experts)


def _are_in(experts: Tensor, some: list[int]) -> Tensor:
    """experts (T, K) -> (T, K) bool."""
    return torch.isin(experts, torch.tensor(some, device=experts.device))


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
