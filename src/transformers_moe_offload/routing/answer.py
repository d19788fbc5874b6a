"""Read a router's output in any of its forms, correct it, and check that it contains a strategy's choice.

Four forms of Transformers 5.23: experts and weights for each token (nearly all); a row of scores that is zero for all
experts but the chosen ones (Llama 4); a one-hot row for one expert (Switch Transformers); and pairs sorted by expert
(JetMoE). An output in another form, or with another choice than the strategy's, raises an error; otherwise a model
could ignore a strategy silently.

Watching every function of a router costs as much as the router. Most routers return logits, weights and experts, and
rank experts by the logits themselves, their softmax or their sigmoid. `find_reading` checks that while a prompt is
watched; the decode steps that follow are then read without watching. The next prompt is watched again.
"""

# B sequences, S their length, T = B * S tokens, K experts per token, E experts, P = T * K pairs

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transformers_moe_offload.errors import UnsupportedModelError
from transformers_moe_offload.routing.choice import Choice
from transformers_moe_offload.routing.interception import Interception


class Answer(NamedTuple):
    """A router's output, read."""

    outputs: tuple[Any, ...]
    """The output itself, corrected."""
    experts: Tensor
    """(T, K) int64: the chosen experts. The output may name others in place of experts without weights."""
    weights: Tensor
    """(T, K), zero for entries that only fill up a row."""
    places: tuple[int, int] | None = None
    """Indices of experts and weights among the outputs; None where the output has neither as they are."""


def read_answer(outputs: tuple[Any, ...], seen: Interception) -> Answer:
    """Read the output of a router that `seen` has watched; raises `UnsupportedModelError` if it cannot be read."""
    if seen.choice is None:
        raise UnsupportedModelError(
            "cannot watch how the router chooses its experts: neither by topk or max over all experts, nor from a table"
        )
    if seen.own_experts is not None:
        outputs = tuple(seen.choice.experts if out is seen.own_experts else out for out in outputs)
    for read in (_indexed, _dense, _one_hot, _sorted):
        found = read(outputs, seen, seen.choice)
        if found is not None:
            return found
    shapes = ", ".join(str(tuple(out.shape)) for out in outputs if isinstance(out, Tensor))
    raise UnsupportedModelError(
        f"the router was to take experts {tuple(seen.choice.experts.shape)} and answered with {shapes}, in which "
        f"they cannot be found; it may be made for its own number of experts alone"
    )


def _indexed(outputs: tuple[Any, ...], seen: Interception, choice: Choice) -> Answer | None:
    """(T, K) experts and (T, K) weights."""
    shape = choice.experts.shape
    experts = next((i for i, out in enumerate(outputs) if _is_indices(out) and out.shape == shape), None)
    place = next((i for i, out in enumerate(outputs) if _is_later(out, seen) and out.shape == shape), None)
    if experts is None or place is None:
        return None
    weights = _given(outputs[place], choice)
    outputs = (*outputs[:place], weights, *outputs[place + 1 :])
    return Answer(outputs, choice.experts, weights.detach(), (experts, place))


def _dense(outputs: tuple[Any, ...], seen: Interception, choice: Choice) -> Answer | None:
    """(T, E) scores, zero for the experts that are not chosen."""
    assert seen.scores is not None
    if any(_is_indices(out) for out in outputs):
        return None
    place = next((i for i, out in enumerate(outputs) if _is_later(out, seen) and out.shape == seen.scores.shape), None)
    if place is None:
        return None
    experts = choice.experts
    if choice.is_kept is not None or choice.weights is not None:
        weights = _given(outputs[place].gather(1, experts), choice)
        dense = torch.zeros_like(outputs[place]).scatter(1, experts, weights)
        outputs = (*outputs[:place], dense, *outputs[place + 1 :])
    return Answer(outputs, experts, outputs[place].detach().gather(1, experts))


def _one_hot(outputs: tuple[Any, ...], seen: Interception, choice: Choice) -> Answer | None:
    """(B, S, E) zeros and a one, and (B, S, 1) weights."""
    assert seen.scores is not None
    hot = next((out for out in outputs if _is_indices(out) and out.shape[-1] == seen.scores.shape[-1]), None)
    weights = next((out for out in outputs if _is_later(out, seen) and out.shape[-1] == 1), None)
    if hot is None or hot.dim() != 3 or weights is None or choice.experts.shape[-1] != 1:
        return None
    # Tokens beyond an expert's capacity are dropped: their row is all zeros.
    is_routed = hot.reshape(seen.scores.shape).gather(1, choice.experts)
    if choice.weights is not None:
        given = _given(weights.reshape(-1, 1), choice).reshape(weights.shape)
        outputs = tuple(given if out is weights else out for out in outputs)
        weights = given
    return Answer(outputs, choice.experts, weights.detach().reshape(-1, 1) * is_routed)


def _sorted(outputs: tuple[Any, ...], seen: Interception, choice: Choice) -> Answer | None:
    """(P,) places of pairs in the order of their experts, (P,) their tokens, (P,) their weights."""
    experts = choice.experts
    order, tokens, weights = (*outputs, None, None, None)[:3]
    if not all(isinstance(out, Tensor) and out.shape == (experts.numel(),) for out in (order, tokens, weights)):
        return None
    if not torch.equal(order // experts.shape[-1], tokens):
        return None
    flat = torch.empty_like(weights).index_copy(0, order, weights).reshape(experts.shape)
    if choice.is_kept is not None or choice.weights is not None:
        flat = _given(flat, choice)
        outputs = (order, tokens, flat.flatten()[order], *outputs[3:])
    return Answer(outputs, experts, flat.detach())


def _given(weights: Tensor, choice: Choice) -> Tensor:
    """The factors (T, K) of the chosen experts: the router's own, or those that the choice brings; zero if not kept."""
    if choice.weights is not None:
        given = choice.weights.to(weights.dtype)
        weights = torch.where(given.isnan(), weights, given)
    return weights if choice.is_kept is None else weights.masked_fill(~choice.is_kept, 0)


def _is_indices(out: Any) -> bool:
    return isinstance(out, Tensor) and not out.is_floating_point()


def _is_later(out: Any, seen: Interception) -> bool:
    return isinstance(out, Tensor) and seen.came_later(out) and out.is_floating_point()


_SCORINGS: tuple[Callable[[Tensor], Tensor], ...] = (lambda x: x, lambda x: x.softmax(-1), torch.sigmoid)


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
