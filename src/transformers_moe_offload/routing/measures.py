"""Formulas on arrays: confidence of a router, balance of its load, co-activation and reuse of experts.

Pure; `statistics.py` supplies the arrays.
"""

# N tokens, K experts per token, E experts

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.integer[Any]]

_BLOCK_ENTRIES = 2**21
"""Entries of a table with a column for each expert: 16 MiB of float64."""


def probabilities(scores: NDArray[Any], *, has_affinities: bool) -> Floats:
    """The softmax of logits, or affinities divided by their sum: scores (N, E) -> (N, E).

    Minus infinity marks experts that are ruled out, and affinities below zero count as zero.
    """
    scores = scores.astype(np.float64)
    if has_affinities:
        positive = np.where(np.isneginf(scores), 0, scores).clip(min=0)
    else:
        positive = np.exp(scores - scores.max(axis=1, keepdims=True))
    sums = positive.sum(axis=1, keepdims=True)
    # Nothing above zero: the router prefers no expert.
    return np.where(sums > 0, positive / np.where(sums > 0, sums, 1), 1 / scores.shape[1])


def entropy(probabilities: Floats) -> Floats:
    """In bits: (N, E) -> (N,). Zero where a router is certain, log2(E) where it has no preference."""
    logs = np.log2(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
    return np.asarray(-(probabilities * logs).sum(axis=1) + 0.0)


def margin(probabilities: Floats, experts: Ints) -> Floats:
    """The least probable expert that was chosen, less the most probable one that was not: (N, E), (N, K) -> (N,).

    Negative where a strategy chose others than the router would have. NaN where all or none were chosen.
    """
    is_chosen = chosen_mask(experts, probabilities.shape[1])
    worst = np.where(is_chosen, probabilities, np.inf).min(axis=1)
    best = np.where(is_chosen, -np.inf, probabilities).max(axis=1)
    return np.where(np.isfinite(worst) & np.isfinite(best), worst - np.where(np.isfinite(best), best, 0), np.nan)


def confidence(probabilities: Floats, experts: Ints) -> Floats:
    """The share of the probability that the chosen experts have: (N, E), (N, K) -> (N,)."""
    return np.asarray((probabilities * chosen_mask(experts, probabilities.shape[1])).sum(axis=1))


def chosen_mask(experts: Ints, num_experts: int) -> NDArray[np.bool_]:
    """experts (N, K), where -1 fills up -> (N, E) bool."""
    mask = np.zeros((len(experts), num_experts + 1), np.bool_)
    np.put_along_axis(mask, np.where(experts < 0, num_experts, experts).astype(np.int64), values=True, axis=1)
    return mask[:, :-1]


def blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices of a table's rows, each of a few MiB."""
    step = max(1, _BLOCK_ENTRIES // num_columns)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def stacked(many: Sequence[NDArray[Any]], filling: int) -> NDArray[Any]:
    """Arrays (N, K) below one another, all filled up with `filling` to the largest K."""
    width = max(array.shape[1] for array in many)
    pad: Callable[..., NDArray[Any]] = np.pad
    return np.concatenate(
        [pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=filling) for array in many]
    )


def jaccard(one: Ints, other: Ints, num_experts: int) -> Floats:
    """Share of the experts of either choice that are in both: (N, K), (N, K') -> (N,). One for two empty choices."""
    first, second = chosen_mask(one, num_experts), chosen_mask(other, num_experts)
    either = (first | second).sum(axis=1)
    return np.where(either > 0, (first & second).sum(axis=1) / np.maximum(either, 1), 1.0)


def variation(load: NDArray[Any]) -> float:
    """Coefficient of variation of the experts' loads: zero where all are equal, sqrt(E - 1) where one has it all."""
    mean = float(load.mean()) if load.size else 0.0
    return float(load.std() / mean) if mean else 0.0


def gini(load: NDArray[Any]) -> float:
    """Gini coefficient of the experts' loads: zero where all are equal, (E - 1) / E where one has everything."""
    ordered, total = np.sort(load.astype(np.float64)), float(load.sum())
    if not total:
        return 0.0
    ranks = np.arange(1, len(ordered) + 1)
    return float((2 * (ranks * ordered).sum()) / (len(ordered) * total) - (len(ordered) + 1) / len(ordered))


def together(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> NDArray[np.int64]:
    """In how many rows each expert of one mask occurs with each of another: (N, E), (N, E') bool -> (E, E')."""
    return (one.T.astype(np.float32) @ other.astype(np.float32)).round().astype(np.int64)


def reuse_distances(visits: list[list[int]]) -> list[int]:
    """LRU stack distances: for each repeated use of an expert, how many other experts were wanted since its last one.

    Mattson et al. 1970, "Evaluation techniques for storage hierarchies": an LRU cache of c slots for this layer hits
    exactly the uses of a distance below c. `visits` are the experts of each visit, those of one visit in order.
    """
    recent: list[int] = []  # the most recent one last
    distances = []
    for wanted in visits:
        for expert in wanted:
            if expert in recent:
                place = recent.index(expert)
                distances.append(len(recent) - 1 - place)
                recent.pop(place)
            recent.append(expert)
    return distances


def rank_correlation(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Spearman's: 1 where both rise together, -1 where one falls; NaN where either is constant."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])


def _ranks(values: NDArray[Any]) -> Floats:
    """Ranks, those of equal values averaged."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse], np.float64)
