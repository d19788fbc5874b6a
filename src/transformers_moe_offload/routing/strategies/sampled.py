"""Draw experts: uniformly, by the router's probabilities, with noise on its scores, or once for each token id.

Every other number drawn depends on the seed, the layer and the forward only (`RouterCall.generator`): setting a
strategy again repeats the same choices, and another seed gives others.
"""

# T tokens, E experts

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from transformers_moe_offload.config.options import choose
from transformers_moe_offload.errors import UnsupportedModelError
from transformers_moe_offload.routing.choice import Choice, RouterCall, best
from transformers_moe_offload.routing.strategy import RoutingStrategy, check_number, check_seed, register_strategy

Weighting = Literal["uniform", "proportional"]


@register_strategy("random")
@dataclass(frozen=True)
class Random(RoutingStrategy):
    """Random experts, as many as the model takes, uniform or in proportion to the router's probabilities.

    Uniform as in Zuo et al. 2022, "Taming Sparsely Activated Transformer with Stochastic Experts" (THOR), section 3
    (arXiv 2110.04260). Proportional is `gumbel` at temperature 1. Experts that the architecture rules out stay out.
    """

    weighting: Weighting = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        choose("weighting", self.weighting, get_args(Weighting))
        check_seed(self.seed)

    def choose(self, call: RouterCall) -> Choice:
        """The top k of noise alone, or of logits with noise."""
        noise = gumbel_noise(call, self.seed)
        if self.weighting == "proportional":
            return best(call.logits + noise, call.top_k)
        return best(noise.masked_fill(call.scores.isneginf(), -torch.inf), call.top_k)


@register_strategy("temperature")
@register_strategy("gumbel")
@dataclass(frozen=True)
class Gumbel(RoutingStrategy):
    """Draw experts without replacement, in proportion to softmax(logits / temperature).

    Done with Gumbel noise: the k largest of logits / temperature + noise are such a sample (Kool et al. 2019,
    "Stochastic Beams and Where to Find Them", section 2.3, arXiv 1903.06059). `temperature` and `gumbel` are two names
    for it. Low temperatures come close to the router's own choice, high ones to chance.
    """

    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, above=0)
        check_seed(self.seed)

    def choose(self, call: RouterCall) -> Choice:
        """The best of noisy logits."""
        return best(call.logits / self.temperature + gumbel_noise(call, self.seed), call.top_k)


@register_strategy("noise")
@dataclass(frozen=True)
class Noise(RoutingStrategy):
    """Choose by logits with normal noise of standard deviation `std`; weights are computed from clean logits.

    The noise of Shazeer et al. 2017, section 2.1, equation 4 (arXiv 1701.06538), with a given width instead of a
    learned one.
    """

    std: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("std", self.std, least=0)
        check_seed(self.seed)

    def choose(self, call: RouterCall) -> Choice:
        """The best of noisy logits."""
        generator = call.generator(self.seed)
        noise = torch.randn(call.logits.shape, generator=generator, device=call.logits.device)
        return best(call.logits + self.std * noise, call.top_k)


def gumbel_noise(call: RouterCall, seed: int) -> Tensor:
    """(T, E) float32, standard Gumbel."""
    shape, device = call.scores.shape, call.scores.device
    # The negative logarithm of a uniform number is exponential, and that of an exponential one is Gumbel.
    return -torch.empty(shape, device=device).exponential_(generator=call.generator(seed)).log()


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
