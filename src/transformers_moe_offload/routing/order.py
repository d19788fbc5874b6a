"""Order texts for evaluation so that each finds the experts of the one before still in the cache.

By recorded use of experts, or without a recording by tokens: texts with similar tokens choose similar experts.
"""

# N texts, E experts of all routers together, D dimensions

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing import measures
from transformers_moe_offload.routing.trace import RoutingTrace

_AT_A_TIME = 4096
"""Texts that are compared with one another: the time grows with their square, to some seconds here."""
_DIMENSIONS = 1024
"""Dimensions of a text's token counts: ids are counted modulo this, so tokens of a large vocabulary share some."""


def reuse_order(trace: RoutingTrace) -> list[int]:
    """The texts of a trace, each followed by the remaining text whose use of experts is most similar.

    For evaluations that go over the same texts several times, under other strategies or seeds: record the first run,
    and keep the order. Texts that are run one by one have the same results in any order.
    """
    uses = expert_use_by_text(trace)
    if not len(uses):
        raise ConfigError("the trace holds no text; record one that was given as token ids")
    return _chain(uses)


def token_order(texts: Sequence[Sequence[int]]) -> list[int]:
    """Texts of token ids, each followed by the remaining text that has the most tokens in common with it.

    Needs no model and no recording. Texts are first sorted by their tokens, and then ordered in blocks of 4096.
    """
    alike = sorted(range(len(texts)), key=lambda number: tuple(texts[number]))
    order: list[int] = []
    for start in range(0, len(alike), _AT_A_TIME):
        block = alike[start : start + _AT_A_TIME]
        order += [block[number] for number in _chain(_bags([texts[number] for number in block]))]
    return order


def _bags(texts: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """How often each text has each token, (N, D)."""
    bags = np.zeros((len(texts), _DIMENSIONS))
    for bag, text in zip(bags, texts, strict=True):
        np.add.at(bag, np.asarray(text, np.int64) % _DIMENSIONS, 1)
    return bags


def _chain(vectors: NDArray[np.float64]) -> list[int]:
    """All rows of (N, D): first the one nearest to the mean, each followed by the most similar remaining row."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions = vectors / np.where(lengths > 0, lengths, 1)
    order = [int(np.argmax(directions @ directions.mean(axis=0)))]
    left = np.ones(len(vectors), np.bool_)
    left[order[0]] = False
    while left.any():
        likeness = np.where(left, directions @ directions[order[-1]], -np.inf)
        order.append(int(np.argmax(likeness)))
        left[order[-1]] = False
    return order


def expert_use_by_text(trace: RoutingTrace) -> NDArray[np.float64]:
    """How often each text chose each expert of each router: (N, E)."""
    columns = [np.zeros((0, 0))]  # also of a recording without routers
    for router, facts in enumerate(trace.routers):
        counts = np.zeros((0, facts.num_experts))
        for rows in trace.rows(router):
            num_texts = int(rows.sequence.max(initial=-1)) + 1
            counts = np.pad(counts, ((0, max(0, num_texts - len(counts))), (0, 0)))
            is_text = rows.sequence >= 0
            np.add.at(counts, rows.sequence[is_text], measures.chosen_mask(rows.experts, facts.num_experts)[is_text])
        columns.append(counts)
    height = max(map(len, columns))
    return np.concatenate([np.pad(c, ((0, height - len(c)), (0, 0))) for c in columns], axis=1)
