"""Read a router's own decision from its output alone, where the output contains all of it.

Watching every function of a router costs as much as the router. Most routers return logits, weights and experts, and
rank experts by the logits themselves, their softmax or their sigmoid. `find_reading` checks that while a prompt is
watched; the decode steps that follow are then read without watching. The next prompt is watched again.
"""

# T tokens, K experts per token, E experts

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transformers_moe_offload.routing.answer import Answer
from transformers_moe_offload.routing.interception import Interception

_SCORINGS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda logits: logits,
    lambda logits: logits.softmax(-1),
    lambda logits: logits.sigmoid(),
)


class Reading(NamedTuple):
    """How to read an answer."""

    logits: int
    """Place of the (T, E) logits in the answer."""
    experts: int
    weights: int
    scoring: Callable[[Tensor], Tensor]
    """From logits to the scores that experts are ranked by."""
    has_affinities: bool

    def fits(self, outputs: Any) -> bool:
        """Whether an output has all three places."""
        return isinstance(outputs, tuple) and len(outputs) > max(self.logits, self.experts, self.weights)


def find_reading(answer: Answer, seen: Interception) -> Reading | None:
    """How to read outputs like the watched one; None where they do not contain the whole decision."""
    if answer.places is None or seen.is_ours or seen.scores is None or seen.choice is None:
        return None
    experts, weights = answer.places
    if not torch.equal(answer.outputs[experts], seen.choice.experts):
        return None
    for place, logits in enumerate(answer.outputs):
        if place in answer.places or not isinstance(logits, Tensor) or logits.shape != seen.scores.shape:
            continue
        for scoring in _SCORINGS:
            if torch.equal(scoring(logits.detach().float()).to(seen.scores.dtype), seen.scores):
                return Reading(place, experts, weights, scoring, seen.has_affinities)
    return None
