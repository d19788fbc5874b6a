"""What a routing strategy is asked, and what it answers: tensors in, a choice out. Nothing here knows a model."""

# T tokens, K experts per token, E experts, H hidden

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Choice(NamedTuple):
    """The experts of some tokens."""

    experts: Tensor
    """(T, K) int64, no expert twice in a row."""
    is_kept: Tensor | None = None
    """(T, K) bool: False for entries that only fill the row up, because the token takes fewer experts than others;
    None where all entries count."""


@dataclass(frozen=True)
class RouterCall:
    """One call of one router, as a strategy sees it."""

    scores: Tensor
    """(T, E) float: what the architecture ranks experts by; minus infinity for those that it rules out, as a limit to
    groups of experts does."""
    top_k: int
    """How many experts the architecture would take."""
    has_affinities: bool
    """Whether `scores` come from a softmax or sigmoid, not straight from the router's matrix."""
    layer: int = 0
    """Which of the model's routers, in the order of the model."""
    forward: int = 0
    """How many forwards of the model came before this one since the strategy was set."""
    hidden: Tensor | None = None
    """(T, H): what the router was given."""
    token_ids: Tensor | None = None
    """(T,) int64, where the model reads tokens."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.scores.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.scores.shape[1]

    @cached_property
    def logits(self) -> Tensor:
        """(T, E) float32, whose softmax is `probabilities`, and which rank experts as `scores` do."""
        scores = self.scores.detach().float()
        if not self.has_affinities:
            return scores
        # A correction that is added to affinities can take them below zero: such an expert is as good as impossible.
        positive = scores.clamp(min=torch.finfo(torch.float32).tiny).log()
        return torch.where(scores.isneginf(), scores, positive)

    @cached_property
    def probabilities(self) -> Tensor:
        """(T, E) float32: the softmax of logits, or affinities divided by their sum."""
        return self.logits.softmax(-1)

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers that depend on the seed, the layer and the forward, and on nothing that was drawn before.

        So a layer that is computed again for its gradients (gradient checkpointing) chooses the same experts again; and
        one that runs several times in a forward draws the same numbers each time.
        """
        mixed = (
            seed * 0x9E3779B97F4A7C15 + self.layer * 0xBF58476D1CE4E5B9 + self.forward * 0x94D049BB133111EB
        ) % 2**63
        return torch.Generator(device=self.scores.device).manual_seed(mixed ^ (mixed >> 31))


def best(ranking: Tensor, k: int) -> Choice:
    """The k experts that rank highest: ranking (T, E), where minus infinity means never -> (T, K).

    K is k, or E where there are fewer. A token that may take fewer than k experts takes those.
    """
    values, experts = ranking.topk(min(k, ranking.shape[-1]), dim=-1)
    is_kept = ~values.isneginf()
    return Choice(experts, None if bool(is_kept.all()) else is_kept)  # sync: device -> host


def packed(is_chosen: Tensor, ranking: Tensor) -> Choice:
    """A choice of differing numbers of experts, is_chosen (T, E) bool, each token's by its ranking (T, E)."""
    width = max(1, int(is_chosen.sum(-1).max())) if len(is_chosen) else 1  # sync: device -> host
    return best(ranking.float().masked_fill(~is_chosen, -torch.inf), width)
