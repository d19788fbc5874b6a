"""Statistics of each router of a trace, computed part by part."""

# N tokens at one router, K experts per token, E experts, D domains

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transformers_moe_offload.routing import measures
from transformers_moe_offload.routing.trace_data import RecordedRouting, Rows, rows_of, tokens_of, turns_of
from transformers_moe_offload.routing.trace_file import Part
from transformers_moe_offload.tracing.trace_file import MAX_TABLE, TraceError


@dataclass
class RouterStatistics:
    """One router. Entropies are in bits; figures that need scores are empty where none were recorded."""

    num_experts: int
    entropy: NDArray[np.float64] = field(repr=False, default_factory=lambda: np.empty(0))
    """(N,): zero where the router is certain."""
    margin: NDArray[np.float64] = field(repr=False, default_factory=lambda: np.empty(0))
    """(N,): least probability of a chosen expert less the greatest of a rejected one."""
    confidence: NDArray[np.float64] = field(repr=False, default_factory=lambda: np.empty(0))
    """(N,): share of the probability that the chosen experts have."""
    load: NDArray[np.int64] = field(repr=False, default_factory=lambda: np.empty(0, np.int64))
    """(E,): how many tokens chose each expert."""
    co_activation: NDArray[np.int64] = field(repr=False, default_factory=lambda: np.empty((0, 0), np.int64))
    """(E, E): tokens that chose both."""
    next_token: NDArray[np.int64] = field(repr=False, default_factory=lambda: np.empty((0, 0), np.int64))
    """(E, E): from an expert of a token to an expert of the next token of its text."""
    next_layer: NDArray[np.int64] | None = field(repr=False, default=None)
    """(E, E'): from an expert to one that the same token chooses at the next router; None at the last."""
    reuse: dict[int, int] = field(repr=False, default_factory=dict)
    """How often each distance of reuse occurs, `measures.reuse_distances`."""

    num_tokens: int = 0
    """Decisions: a token counts once for each call of the router in its forward."""
    num_followers: int = 0
    """Experts chosen by tokens that follow another token of their text."""

    @property
    def repeat_rate(self) -> float:
        """Share of the experts of a token that the token before it had chosen, too."""
        return float(np.trace(self.next_token)) / self.num_followers if self.num_followers else 0.0

    def lru_hit_rate(self, num_slots: int) -> float:
        """Share of this layer's requests that an LRU cache with this many slots of its own would hit, from empty."""
        asked = sum(self.reuse.values()) + int((self.load > 0).sum())
        return sum(count for distance, count in self.reuse.items() if distance < num_slots) / asked if asked else 0.0

    def figures(self) -> dict[str, float]:
        """The means, as plain numbers."""
        margins = self.margin[np.isfinite(self.margin)]
        return {
            "tokens": float(self.num_tokens),
            "experts_per_token": float(self.load.sum()) / self.num_tokens if self.num_tokens else 0.0,
            "entropy": float(self.entropy.mean()) if self.entropy.size else float("nan"),
            "margin": float(margins.mean()) if margins.size else float("nan"),
            "confidence": float(self.confidence.mean()) if self.confidence.size else float("nan"),
            "load_cv": measures.variation(self.load),
            "load_gini": measures.gini(self.load),
            "repeat_rate": self.repeat_rate,
        }


def statistics_of(trace: RecordedRouting, router: int) -> RouterStatistics:
    """Gather the statistics of one router."""
    num_experts = trace.routers[router].num_experts
    following = router + 1 if router + 1 < len(trace.routers) else None
    columns = trace.routers[following].num_experts if following is not None else 0
    _expect_room("pairs of experts", num_experts, max(num_experts, columns))
    load = np.zeros(num_experts, np.int64)
    pairs, onwards = np.zeros((num_experts, num_experts), np.int64), np.zeros((num_experts, num_experts), np.int64)
    to_layer = np.zeros((num_experts, columns), np.int64)
    per_token: dict[str, list[Any]] = {"entropy": [], "margin": [], "confidence": []}
    visits: list[list[int]] = []
    last: dict[tuple[int, int], NDArray[np.bool_]] = {}
    num_rows = num_followers = 0
    for part in trace.parts():
        if following is not None:
            to_layer += _to_next_layer(part, router, following, num_experts, columns)
        visits += _visits(part, router)
        for rows in _blocks(rows_of(part, router), num_experts):
            mask = measures.chosen_mask(rows.experts, num_experts)
            num_rows += len(mask)
            load += mask.sum(axis=0)
            pairs += measures.together(mask, mask)
            to_next, followers = _to_next_token(rows, mask, last)
            onwards += to_next
            num_followers += followers
            for name, values in sureness_of(trace, rows, router).items():
                per_token[name].append(values)
    joined = {name: np.concatenate([np.empty(0), *many]) for name, many in per_token.items()}
    return RouterStatistics(
        num_experts,
        **joined,
        load=load,
        co_activation=pairs,
        next_token=onwards,
        next_layer=to_layer if following is not None else None,
        reuse=dict(sorted(Counter(measures.reuse_distances(visits)).items())),
        num_tokens=num_rows,
        num_followers=num_followers,
    )


def sureness_of(trace: RecordedRouting, rows: Rows, router: int) -> dict[str, NDArray[np.float64]]:
    """Entropy, margin and confidence of a router's decisions, (N,) each; nothing where no scores were recorded."""
    if rows.scores is None:
        return {}
    chances, experts = trace.probabilities(rows, router), rows.experts
    return {
        "entropy": measures.entropy(chances),
        "margin": measures.margin(chances, experts),
        "confidence": measures.confidence(chances, experts),
    }


def preferences_of(trace: RecordedRouting, router: int) -> NDArray[np.float64]:
    """How often each domain chose each expert, 1 being the router's average over domains: (D, E)."""
    if not trace.domains:
        raise TraceError("the trace has no domains; set recorder.domain while recording")
    _expect_room("experts by domain", len(trace.domains), trace.routers[router].num_experts)
    counts = np.zeros((len(trace.domains), trace.routers[router].num_experts))
    for whole in trace.rows(router):
        for rows in _blocks(whole, counts.shape[1]):
            mask = measures.chosen_mask(rows.experts, counts.shape[1])
            for domain in np.unique(rows.domain[rows.domain >= 0]):
                counts[domain] += mask[rows.domain == domain].sum(axis=0)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    mean = shares.mean(axis=0, keepdims=True)
    return np.where(mean > 0, shares / np.where(mean > 0, mean, 1), 1.0)


def _expect_room(what: str, rows: int, columns: int) -> None:
    """Refuse to fill a table that would be too large."""
    if rows * columns > MAX_TABLE:
        raise TraceError(
            f"{what} need a table of {rows:,} by {columns:,} entries, but at most {MAX_TABLE:,} entries are supported"
        )


def _blocks(rows: Rows, num_experts: int) -> Iterator[Rows]:
    """The same rows in blocks of `measures.blocks`, small enough for a table with a column for each expert."""
    for block in measures.blocks(len(rows.experts), num_experts):
        yield rows.at(block)


def _to_next_token(
    rows: Rows, mask: NDArray[np.bool_], last: dict[tuple[int, int], NDArray[np.bool_]]
) -> tuple[NDArray[np.int64], int]:
    """Pairs of experts of neighbouring tokens, and how many experts the later ones have.

    Each turn of a router that runs several times in a forward is compared with the same turn of the next token. `last`
    carries the last token of each text and turn from part to part.
    """
    order = np.lexsort((rows.position, rows.sequence, rows.turn))
    sequence, position, turn = rows.sequence[order], rows.position[order], rows.turn[order]
    ordered = mask[order]
    is_new = (sequence[1:] != sequence[:-1]) | (turn[1:] != turn[:-1])
    is_next = ~is_new & (position[1:] == position[:-1] + 1)
    counts = measures.together(ordered[:-1][is_next], ordered[1:][is_next])
    followers = int(ordered[1:][is_next].sum())
    if not len(sequence):
        return counts, followers
    for start in np.flatnonzero(np.r_[True, is_new]):
        before = last.get((int(sequence[start]), int(turn[start])))
        if before is not None and position[start] > 0:
            counts += measures.together(before[None], ordered[start : start + 1])
            followers += int(ordered[start].sum())
    for end in np.flatnonzero(np.r_[is_new, True]):
        last[int(sequence[end]), int(turn[end])] = ordered[end]
    return counts, followers


def _to_next_layer(part: Part, router: int, following: int, num_experts: int, columns: int) -> NDArray[np.int64]:
    """Pairs of experts of the same tokens at two routers, without padding and tokens that only one of them routed.

    Routers that run several times in a forward are paired turn by turn; a router with fewer turns than the one before
    it is paired with the last turns of that.
    """
    token, turn = tokens_of(part, router), turns_of(part, router).astype(np.int64)
    next_token, next_turn = tokens_of(part, following), turns_of(part, following).astype(np.int64)
    most, next_most = int(turn.max(initial=0)), int(next_turn.max(initial=0))
    turn -= max(0, most - next_most)
    num_turns = max(most, next_most) + 1
    is_here, is_there = (token >= 0) & (turn >= 0), next_token >= 0
    here, there = token * num_turns + turn, next_token * num_turns + next_turn
    both, first, second = np.intersect1d(here[is_here], there[is_there], return_indices=True)
    is_text = part["is_padding"][both // num_turns] == 0
    first, second = first[is_text], second[is_text]
    one, other = part[f"experts.{router}"][is_here][first], part[f"experts.{following}"][is_there][second]
    counts = np.zeros((num_experts, columns), np.int64)
    for block in measures.blocks(len(one), max(num_experts, columns)):
        counts += measures.together(
            measures.chosen_mask(one[block], num_experts), measures.chosen_mask(other[block], columns)
        )
    return counts


def _visits(part: Part, router: int) -> list[list[int]]:
    """The experts wanted in each call of a router, ascending."""
    experts, calls = part[f"experts.{router}"], part["calls"]
    own = calls[calls[:, 0] == router].tolist()
    return [[e for e in np.unique(experts[first : first + count]).tolist() if e >= 0] for _, first, count, *_ in own]
