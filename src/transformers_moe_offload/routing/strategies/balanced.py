"""Give every expert its share of the tokens: experts choose tokens, or a linear assignment maximises the sum of scores.

Both look at all tokens of a call at once, later ones included. So a token's experts depend on its batch and on the
tokens after it: suitable for encoders and for studies of whole sequences, but not for generating text. When one token
is decoded at a time, both take the router's own experts, because there are no other tokens to balance it with.
"""

# T tokens, K experts per token, E experts, C tokens per expert

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.errors import MoeOffloadError
from transformers_moe_offload.routing.choice import Choice, RouterCall, best, packed
from transformers_moe_offload.routing.strategy import RoutingStrategy, check_number, register_strategy


@register_strategy("expert_choice")
@dataclass(frozen=True)
class ExpertChoice(RoutingStrategy):
    """Each expert takes the tokens that want it most, T * top_k * capacity_factor / E of them.

    Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", section 3.2 (arXiv 2202.09368). Tokens get
    differing numbers of experts, and some get none. A capacity that is not a whole number is rounded up, and of all
    pairs of token and expert only the best T * top_k * capacity_factor stay.
    """

    capacity_factor: float = 1.0

    def __post_init__(self) -> None:
        check_number("capacity_factor", self.capacity_factor, above=0)

    def choose(self, call: RouterCall) -> Choice:
        """The best tokens of each expert."""
        num_tokens, num_experts = call.scores.shape
        num_pairs = max(1, round(num_tokens * call.top_k * self.capacity_factor))
        capacity = min(num_tokens, math.ceil(num_pairs / num_experts))
        tokens = call.probabilities.topk(capacity, dim=0).indices  # (C, E)
        is_chosen = torch.zeros_like(call.scores, dtype=torch.bool).scatter_(0, tokens, value=True)
        is_chosen &= ~call.scores.isneginf()
        if capacity * num_experts > num_pairs:
            ranking = call.probabilities.masked_fill(~is_chosen, -1).flatten()
            is_among_best = torch.zeros_like(is_chosen).flatten()
            is_among_best[ranking.topk(num_pairs).indices] = True
            is_chosen &= is_among_best.reshape(is_chosen.shape)
        return packed(is_chosen, call.scores)


@register_strategy("linear_assignment")
@dataclass(frozen=True)
class LinearAssignment(RoutingStrategy):
    """Each expert gets the same number of tokens, with the largest sum of scores that this allows.

    Lewis et al. 2021, "BASE Layers", section 3.1 (arXiv 2103.16716), solved exactly by scipy instead of by auction. A
    token takes its experts in rounds, one in each, never the same twice. Time grows with the cube of the tokens: a few
    hundred at a time are a matter of milliseconds, thousands of seconds. Needs the extra `research`.
    """

    def check(self, layer: int, num_experts: int, top_k: int | None) -> None:
        """scipy is installed."""
        _solver()

    def choose(self, call: RouterCall) -> Choice:
        """Round by round."""
        if call.num_tokens == 1:
            return best(call.scores, call.top_k)
        left = call.logits.clamp(min=-1e4)  # finite for experts ruled out, so that there is always a solution
        columns = []
        for _ in range(call.top_k):
            column = _assigned(left)
            columns.append(column)
            left = left.scatter(1, column[:, None], -1e6)
        experts = torch.stack(columns, dim=1)
        is_kept = ~call.scores.gather(1, experts).isneginf()
        return Choice(experts, None if bool(is_kept.all()) else is_kept)


def _assigned(scores: Tensor) -> Tensor:
    """One expert for each token, at most ceil(T / E) tokens for an expert: scores (T, E) -> (T,) int64."""
    num_tokens, num_experts = scores.shape
    capacity = math.ceil(num_tokens / num_experts)
    seats = scores.double().cpu().repeat_interleave(capacity, dim=1)  # sync: device -> host
    _, taken = _solver()(seats.numpy(), maximize=True)
    return torch.from_numpy(taken).to(scores.device) // capacity


def _solver() -> Any:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MoeOffloadError(
            "strategy 'linear_assignment' needs scipy; run: pip install 'transformers-moe-offload[research]'"
        ) from error
    return linear_sum_assignment
