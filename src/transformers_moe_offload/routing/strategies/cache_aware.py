"""Prefer experts that are resident: fewer loads, for experts that the router ranks a little lower.

After Skliar et al. 2024, "Mixture of Cache-Conditional Experts for Efficient Mobile Device Inference", section 3.2
(arXiv 2412.00099): residents are raised for the choice only, by a share of the range that scores have on average; the
chosen experts have the weights that the router gives them. Three things differ from the paper, each because predictions
then diverge less for as many misses (docs/decisions/0016):

- affinities are raised, where the paper raises logits, so that an expert is displaced where it would have had little
  more weight than the one in its place;
- the range is the mean over all routers: with its own, a router that is surer than others lost more weight to a miss;
- the first router raises by half as much: its layer loses two to three times as much as others for a miss less.

What a model writes then depends on what is resident: on the size of the cache, on its policy, and on what it has
computed before. That is true of no other part of the package. Given the same cache and the same mean, the choice is the
same; with loads ahead of demand, what is resident is a matter of time.
"""

# T tokens, K experts per token, E experts; S scores per token, which may be more than E (LongCat's identities)

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from transformers_moe_offload.config import CacheAwareConfig
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing.choice import Choice, RouterCall
from transformers_moe_offload.routing.strategy import RoutingStrategy, register_strategy

FIRST_SHARE = 0.5
"""How much of the strength the first router has."""


class MeanRange:
    """The distance between a router's best and worst score of a token: the mean of all tokens and routers so far,
    prompts included.

    It stays on the routers' device, without a sync; routers on several devices have a mean for each. Threads that share
    a model share it, as they come.
    """

    def __init__(self) -> None:
        self._sums: dict[torch.device, Tensor] = {}

    def sums(self, device: torch.device) -> Tensor:
        """(2,) float64: the sum of all ranges, and their number; changed in place by those that count tokens."""
        held = self._sums.get(device)
        if held is None:
            with torch.inference_mode(False):  # it outlives an inference-mode block that may be open
                held = self._sums[device] = torch.zeros(2, dtype=torch.float64, device=device)
        return held

    def follow(self, scores: Tensor) -> Tensor:
        """The mean once these tokens are counted: scores (T, S), minus infinity for experts ruled out -> float64."""
        sums = self.sums(scores.device)
        worst = torch.where(scores.isneginf(), torch.inf, scores).amin(-1)
        ranges = (scores.amax(-1) - worst).sum(dtype=torch.float64)
        sums += torch.stack([ranges, torch.full_like(ranges, len(scores))])
        return sums[0] / sums[1]


@register_strategy("cache_aware")
@dataclass(frozen=True, kw_only=True)
class CacheAware(CacheAwareConfig, RoutingStrategy):
    """In steps of decoding, the best experts once residents are raised by `strength` times the routers' mean range.

    The first router raises them by half as much. The `protect` best ones are always among them. Prompts are left to the
    router: they want most experts anyway. Compared are affinities, corrected where the architecture corrects them for
    the choice; of a router that ranks logits their softmax.
    """

    follows_cache = True

    @property
    def is_neutral(self) -> bool:
        """True for strength 0."""
        return self.strength == 0

    def memory(self) -> MeanRange:
        """The range of the routers' scores so far."""
        return MeanRange()

    def strength_of(self, layer: int) -> float:
        """The strength of a router, by its number."""
        return self.strength if layer else FIRST_SHARE * self.strength

    def check(self, layer: int, num_experts: int, top_k: int | None) -> None:
        """A token takes more experts than are protected."""
        if top_k is not None and self.protect >= top_k and not self.is_neutral:  # None: `choose` checks it
            raise ConfigError(
                f"protect={self.protect}, but a token takes {top_k} of the experts of router {layer}, so the choice "
                f"would always be the router's own; protect {top_k - 1}{' or fewer' if top_k > 1 else ''}"
            )

    def choose(self, call: RouterCall) -> Choice | None:
        """The experts, in the order of their own scores."""
        if self.is_neutral or not call.is_ranked:
            return None
        self.check(call.layer, call.num_experts, call.top_k)
        scores = _affinities(call)
        mean = call.memory.follow(scores)
        resident = call.resident if call.is_step else None
        if resident is None:
            return None
        num_others = scores.shape[1] - len(resident)  # experts without weights need no load
        raised = scores + (self.strength_of(call.layer) * mean).float() * functional.pad(
            resident, (0, num_others), value=True
        )
        if self.protect:
            raised = raised.scatter(1, scores.topk(self.protect, dim=-1).indices, torch.inf)
        chosen = raised.topk(call.top_k, dim=-1).indices
        order = scores.gather(1, chosen).argsort(dim=-1, descending=True, stable=True)
        return Choice(chosen.gather(1, order))


def _affinities(call: RouterCall) -> Tensor:
    """(T, S) float32, minus infinity for experts that the architecture rules out."""
    scores = call.scores.detach().float()
    return scores if call.has_affinities else scores.softmax(-1).masked_fill(scores.isneginf(), -torch.inf)
