"""Choose by token id, independently of the router's scores."""

# T tokens, E experts

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transformers_moe_offload.errors import UnsupportedModelError
from transformers_moe_offload.routing.choice import Choice, RouterCall, best
from transformers_moe_offload.routing.strategy import RoutingStrategy, check_seed, register_strategy


@register_strategy("hash")
@dataclass(frozen=True)
class Hash(RoutingStrategy):
    """Each token id has experts of its own in each layer, drawn once and for all.

    Roller et al. 2021, "Hash Layers For Large Sparse Models", section 3, random hash (arXiv 2106.04426). There all
    weights are one; here the router computes them from its scores of these experts, as the model was trained.
    Experts that the architecture rules out stay out.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def choose(self, call: RouterCall) -> Choice:
        """Rank experts by a hash of seed, layer, token id and expert: needs no table and spreads ids evenly."""
        if call.token_ids is None:
            raise UnsupportedModelError(
                f"strategy 'hash' needs token ids, but the {call.num_tokens} tokens at router {call.layer} have none: "
                f"the model was called with embeddings, or the router sees something else than text; pass input_ids, "
                f"or leave router {call.layer} out of `layers`"
            )
        experts = torch.arange(call.num_experts, device=call.scores.device)
        of_token = _mixed(call.token_ids[:, None] + _mixed(torch.tensor(self.seed * 4096 + call.layer + 1).to(experts)))
        ranking = _mixed(of_token + experts * 0x9E3779B1).double()
        return best(ranking.masked_fill(call.scores.isneginf(), -torch.inf), call.top_k)


def _mixed(x: Tensor) -> Tensor:
    """Spread the bits of int64: two rounds of a multiplicative hash with shifts (finaliser of MurmurHash3, 32 bits)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
