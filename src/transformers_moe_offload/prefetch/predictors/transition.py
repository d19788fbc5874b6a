"""`transition`: learn which expert follows which."""

# E experts, H hidden

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from transformers_moe_offload.prefetch.predictors.base import LayerShape, Prediction, Router, register_predictor
from transformers_moe_offload.prefetch.predictors.ranking import RankedGuesses, best_first


@register_predictor("transition")
class Transition:
    """Learns which expert of one layer is followed by which of another, from what it observes.

    For each pair of layers that it is asked about, it has a table: the share of uses of expert e of the first layer
    that were followed by a use of expert f of the second. It learns from visits of single tokens only, because the
    experts of many tokens together say little about the transitions of each.
    """

    def __init__(self, layers: Sequence[LayerShape], routers: Mapping[int, Router]) -> None:
        self._shapes = {shape.layer: shape for shape in layers}
        self._tables: dict[int, dict[int, NDArray[np.float32]]] = {shape.layer: {} for shape in layers}
        """Shares (E of the first, E of the second) by second and first layer."""
        self._num_bytes = 0
        self._last: dict[int, list[int]] = {}
        self._guesses = RankedGuesses(layers)

    def observe(self, layer: int, wanted: Sequence[int]) -> None:
        """Learn which experts of layers before, this one's at the last token included, led to these."""
        now = list(wanted)
        self._guesses.judge(layer, now)
        if self._is_one_token(layer, now):
            for first, table in self._tables[layer].items():
                before = self._last.get(first, [])
                if self._is_one_token(first, before):
                    shares = table[before] * (1 - _SHARE_STEP)
                    shares[:, now] += _SHARE_STEP
                    table[before] = shares
        self._last[layer] = now

    def predict(self, layer: int, targets: Sequence[int], hidden: Tensor | None) -> list[Prediction]:
        """Rank by the mean share over the experts that the layer has just used."""
        now = self._last.get(layer)
        if not now:
            return []
        predictions: list[Prediction] = []
        for target in targets:
            table = self._table(layer, target)
            if table is not None:
                ranked = table[now].mean(axis=0).argsort()[: -self._shapes[target].num_ranked - 1 : -1]
                predictions += self._guesses.guess(layer, target, ranked.tolist())
        return best_first(predictions)

    def _is_one_token(self, layer: int, experts: Sequence[int]) -> bool:
        return len(experts) <= self._shapes[layer].top_k

    def _table(self, first: int, second: int) -> NDArray[np.float32] | None:
        """The table of a pair, made when first asked for; None where all of them would take too much memory."""
        tables = self._tables[second]
        if first not in tables:
            before, after = self._shapes[first], self._shapes[second]
            num_bytes = before.num_experts * after.num_experts * 4
            if self._num_bytes + num_bytes > _MOST_TABLE_BYTES:
                return None
            self._num_bytes += num_bytes
            share = after.top_k / after.num_experts
            tables[first] = np.full((before.num_experts, after.num_experts), share, dtype=np.float32)
        return tables[first]


_SHARE_STEP = 1 / 16
"""The best of the halvings from 1/4 to 1/256: of a token's experts in tiny-moe, one layer ahead, 63 % are among the
first four guesses; with 1/32 it is 62 %, with 1/256 57 %. Transitions depend on the text."""

_MOST_TABLE_BYTES = 64 * 2**20
"""Enough for the neighbours of 60 layers with 256 experts, or four layers ahead of 60 layers with 128."""
