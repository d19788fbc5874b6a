"""Input and output of a routing strategy: a `RouterCall` in, a `Choice` out, both of tensors. Independent of models."""

# T tokens, K experts per token, E experts, H hidden

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transformers_moe_offload.routing.texts import Texts


class Choice(NamedTuple):
    """The experts of some tokens."""

    experts: Tensor
    """(T, K) int64, no expert twice in a row."""
    is_kept: Tensor | None = None
    """(T, K) bool: False for entries that only fill the row up, because the token takes fewer experts than others;
    None where all entries count."""
    is_raised: Tensor | None = None
    """(T, K) bool: True for experts whose score is to count as the token's best, for their weight as well; None for
    scores as they are."""
    weights: Tensor | None = None
    """(T, K) float: the factors of the experts' outputs in place of those that the router computes, which stay where
    this is NaN. None where all stay, which is also what gradients for the router need."""


@dataclass(frozen=True)
class RouterCall:
    """One call of one router, as a strategy sees it."""

    scores: Tensor
    """(T, E) float: the values that the architecture ranks experts by; minus infinity for experts that it rules out,
    for example by a limit to groups of experts."""
    top_k: int
    """How many experts the architecture would take."""
    has_affinities: bool
    """Whether `scores` come from a softmax or sigmoid, not straight from the router's matrix."""
    is_ranked: bool = True
    """Whether the architecture takes the experts with the largest scores; False where it looks them up by token id."""
    layer: int = 0
    """Which of the model's routers, in the order of the model."""
    forward: int = 0
    """How many forwards of the model came before this one since the strategy was set."""
    hidden: Tensor | None = None
    """(T, H): the router's input."""
    token_ids: Tensor | None = None
    """(T,) int64; None where the router's rows are not the model's tokens."""
    texts: Texts | None = None
    """Which text every token is of; None unless the strategy `knows_texts`."""
    is_step: bool = False
    """Whether this is a step of decoding: every text goes on by one token, or by a few that a draft has proposed."""
    memory: Any = None
    """What `RoutingStrategy.memory` made when the strategy was set, for all routers that it was set for."""
    find_resident: Callable[[], Tensor | None] = lambda: None
    """Called for `resident`."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.scores.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.scores.shape[1]

    @cached_property
    def resident(self) -> Tensor | None:
        """(E,) bool: the experts that need no load, because they are resident or on their way to it.

        None if nothing has to be loaded, whichever are chosen: experts are not offloaded, or all of them are resident.
        """
        return self.find_resident()

    @cached_property
    def logits(self) -> Tensor:
        """(T, E) float32: their softmax is `probabilities`, and they rank experts in the order of `scores`."""
        scores = self.scores.detach().float()
        if not self.has_affinities:
            return scores
        # A correction that is added to affinities can make them negative: the clamp leaves them next to no probability.
        positive = scores.clamp(min=torch.finfo(torch.float32).tiny).log()
        return torch.where(scores.isneginf(), scores, positive)

    @cached_property
    def probabilities(self) -> Tensor:
        """(T, E) float32: the softmax of logits, or affinities divided by their sum."""
        return self.logits.softmax(-1)

    def generator(self, seed: int) -> torch.Generator:
        """A generator whose numbers depend on the seed, the layer and the forward only, not on earlier draws.

        So a layer that is recomputed for its gradients (gradient checkpointing) chooses the same experts again, and a
        layer that runs several times in a forward draws the same numbers each time.
        """
        mixed = (
            seed * 0x9E3779B97F4A7C15 + self.layer * 0xBF58476D1CE4E5B9 + self.forward * 0x94D049BB133111EB
        ) % 2**63
        return torch.Generator(device=self.scores.device).manual_seed(mixed ^ (mixed >> 31))


def best(ranking: Tensor, k: int) -> Choice:
    """The k experts that rank highest: ranking (T, E), minus infinity for excluded experts -> (T, K).

    K is min(k, E). A token with fewer than k experts that are not excluded takes those; `is_kept` marks them.
    """
    values, experts = ranking.topk(min(k, ranking.shape[-1]), dim=-1)
    is_kept = ~values.isneginf()
    return Choice(experts, None if bool(is_kept.all()) else is_kept)  # sync: device -> host


def packed(is_chosen: Tensor, ranking: Tensor) -> Choice:
    """A choice with a number of experts for each token: is_chosen (T, E) bool, sorted by ranking (T, E)."""
    width = max(1, int(is_chosen.sum(-1).max())) if len(is_chosen) else 1  # sync: device -> host
    return best(ranking.float().masked_fill(~is_chosen, -torch.inf), width)
