"""In which order to evaluate texts, so that each finds the experts of the one before still in the cache."""

# N texts, E experts of all routers together

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing import measures
from transformers_moe_offload.routing.trace import RoutingTrace


def reuse_order(trace: RoutingTrace) -> list[int]:
    """The texts of a trace, each followed by the one that uses the most similar experts of those left.

    For evaluations that go over the same texts several times, under other strategies or seeds: record the first time,
    and keep the order. Texts that are run one by one have the same results in any order.
    """
    uses = expert_use_by_text(trace)
    if not len(uses):
        raise ConfigError("the trace holds no text; record one that was given as token ids")
    lengths = np.linalg.norm(uses, axis=1, keepdims=True)
    directions = uses / np.where(lengths > 0, lengths, 1)
    order = [int(np.argmax(directions @ directions.mean(axis=0)))]  # the most usual one begins
    left = np.ones(len(uses), np.bool_)
    while left[order[-1]] and len(order) < len(uses):
        left[order[-1]] = False
        likeness = np.where(left, directions @ directions[order[-1]], -np.inf)
        order.append(int(np.argmax(likeness)))
    return order


def expert_use_by_text(trace: RoutingTrace) -> NDArray[np.float64]:
    """How often each text chose each expert of each router: (N, E)."""
    columns = []
    for router, facts in enumerate(trace.routers):
        counts = np.zeros((0, facts.num_experts))
        for rows in trace.rows(router):
            num_texts = int(rows.sequence.max(initial=-1)) + 1
            counts = np.pad(counts, ((0, max(0, num_texts - len(counts))), (0, 0)))
            is_text = rows.sequence >= 0
            np.add.at(counts, rows.sequence[is_text], measures.chosen_mask(rows.experts, facts.num_experts)[is_text])
        columns.append(counts)
    height = max((len(counts) for counts in columns), default=0)
    return np.concatenate([np.pad(c, ((0, height - len(c)), (0, 0))) for c in columns], axis=1)
