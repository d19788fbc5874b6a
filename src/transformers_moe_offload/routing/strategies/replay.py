"""Give tokens the experts that a recording has for them."""

# T tokens, K experts per token, E experts, N recorded tokens

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from transformers_moe_offload.config.options import choose
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing.choice import Choice, RouterCall
from transformers_moe_offload.routing.recorded_texts import RecordedTexts
from transformers_moe_offload.routing.routes import Missing, Routes
from transformers_moe_offload.routing.strategy import RoutingStrategy, register_strategy
from transformers_moe_offload.routing.trace import RoutingTrace

Weights = Literal["router", "recorded"]


@register_strategy("replay")
@dataclass(frozen=True)
class Replay(RoutingStrategy):
    """The experts that a recording has for the same token after the same tokens.

    A text is known again by its tokens, whatever batch, padding, chunks or KV cache it is read in. Weights are the
    router's own, computed for these experts, so that gradients reach it: rollout routing replay (R3), Ma et al. 2025
    (arXiv 2510.11370). Or they are the recorded ones, with `weights="recorded"`. Padding is left to the router.
    """

    trace: RoutingTrace | str | os.PathLike[str]
    """A recording, or its folder."""
    weights: Weights = "router"
    missing: Missing = "error"
    """What becomes of a token without a route: an error that names it; `"router"` leaves it to the router; `"last"`
    leaves only the token to the router that follows the last recorded one of its text, as a rollout has sampled it and
    not read it."""

    knows_texts = True

    def __post_init__(self) -> None:
        choose("weights", self.weights, get_args(Weights))
        choose("missing", self.missing, get_args(Missing))
        if isinstance(self.trace, str | os.PathLike):
            object.__setattr__(self, "trace", RoutingTrace.load(self.trace))
        if not isinstance(self.trace, RoutingTrace):
            raise ConfigError(f"trace={self.trace!r} is neither a RoutingTrace nor the folder of one")
        if self.weights == "recorded" and not self._recorded.has_weights:
            raise ConfigError(
                'weights="recorded", but the trace has routes without weights, as imported ones are; leave weights to '
                "the router"
            )

    def check_model(self, num_routers: int) -> None:
        """The trace is not of a model with more routers, and can be replayed."""
        _ = self._routes  # read now, since a trace that is refused is to change nothing
        last = max((facts.router for facts in self._trace.routers), default=-1)
        if last >= num_routers:
            raise ConfigError(
                f"the trace has router {last}, but the model has routers 0 to {num_routers - 1}; replay a trace of "
                f"this model"
            )

    def check(self, layer: int, num_experts: int, top_k: int | None) -> None:
        """The trace has this router, and it chooses as many of as many experts."""
        facts = next((facts for facts in self._trace.routers if facts.router == layer), None)
        if facts is None:
            raise ConfigError(
                f"the model has router {layer}, but the trace has routers "
                f"{', '.join(str(facts.router) for facts in self._trace.routers)}; replay a trace of this model, or "
                f"name the recorded routers with layers="
            )
        if facts.num_with_weights != num_experts:
            raise ConfigError(
                f"the trace has {facts.num_with_weights} experts of router {layer}, but the model has {num_experts}; "
                f"replay a trace of this model"
            )
        if facts.top_k != top_k:
            raise ConfigError(
                f"in the trace, a token takes {facts.top_k} experts of router {layer}, but in the model {top_k}; "
                f"replay a trace of this model"
            )

    def choose(self, call: RouterCall) -> Choice:
        """Recorded experts, and the router's own where there are none."""
        assert call.texts is not None
        places = torch.from_numpy(self._routes.find(call.texts).reshape(-1))
        number = self._number[call.layer]
        own = call.scores.topk(call.top_k, dim=-1).indices
        if not len(self._recorded.text):
            return Choice(own)
        is_known, device = places >= 0, call.scores.device
        experts = torch.from_numpy(self._recorded.experts[number])[places].long()  # place -1 is masked below
        weights = torch.from_numpy(self._recorded.weights[number])[places]
        width = max(experts.shape[1], call.top_k) if not bool(is_known.all()) else experts.shape[1]
        row = _widened(experts, width, -1).to(device)  # copy: host -> device
        is_known = is_known.to(device)
        row = torch.where(is_known[:, None], row, _widened(own, width, -1))
        is_chosen = row >= 0
        is_kept = None if bool(is_chosen.all()) else is_chosen  # sync: device -> host
        if is_kept is not None:
            row = _filled(row, call.num_experts)
        if self.weights == "router":
            return Choice(row, is_kept)
        factors = _widened(weights, width, 0.0).to(device)
        return Choice(row, is_kept, weights=factors.masked_fill(~is_known[:, None], torch.nan))

    @property
    def _trace(self) -> RoutingTrace:
        assert isinstance(self.trace, RoutingTrace)
        return self.trace

    @property
    def _recorded(self) -> RecordedTexts:
        return self._trace.whole_texts

    @cached_property
    def _routes(self) -> Routes:
        return Routes(self._recorded, self.missing)

    @cached_property
    def _number(self) -> dict[int, int]:
        """The place of each router in the trace, by its number in the model."""
        return {facts.router: number for number, facts in enumerate(self._trace.routers)}


def _widened(rows: Tensor, width: int, filling: float) -> Tensor:
    """rows (T, K) -> (T, width)."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=filling)


def _filled(experts: Tensor, num_experts: int) -> Tensor:
    """experts (T, K) with -1 for entries that only fill up a row -> the same with experts that are not in the row."""
    is_free = torch.ones(len(experts), num_experts + 1, dtype=torch.bool, device=experts.device)
    is_free.scatter_(1, experts % (num_experts + 1), False)
    fillers = is_free[:, :-1].int().argsort(dim=-1, descending=True, stable=True)[:, : experts.shape[1]]
    missing_before = (experts < 0).long().cumsum(-1) - 1
    return torch.where(experts < 0, fillers.gather(1, missing_before.clamp(min=0)), experts)
