"""How often guesses come true, rank by rank, and predictions with that rate as their confidence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.prefetch.predictors.base import LayerShape, Prediction


class HitRates:
    """How often guesses came true, recent ones counting more: one rate for each rank."""

    def __init__(self, num_ranks: int, expected: float) -> None:
        self._rates = [expected] * num_ranks

    def learn(self, hits: Sequence[float]) -> None:
        """Which of the guesses, or what share of them, came true at each rank."""
        self._rates = [rate + _RATE_STEP * (hit - rate) for rate, hit in zip(self._rates, hits, strict=True)]

    def confidences(self) -> list[float]:
        """Confidence in the next guess of each rank, never rising with it."""
        return list(accumulate(self._rates, min))


_RATE_STEP = 1 / 32
"""Remembers some thirty tokens: long enough for a rate, short enough to follow a change of text."""


class RankedGuesses:
    """Turns rankings into predictions, with the hit rate of earlier guesses of the same rank as confidence.

    Each pair of layers, the one that guesses and the target, has rates of its own. They start from `expected`; None
    means the hit rate of random guesses.
    """

    def __init__(self, layers: Sequence[LayerShape], expected: float | None = None) -> None:
        self._expected = expected
        self._shapes = {shape.layer: shape for shape in layers}
        self._rates: dict[tuple[int, int], HitRates] = {}
        self._pending: dict[int, dict[int, list[int]]] = {shape.layer: {} for shape in layers}
        """Rankings to be judged when the target is observed, by target and layer of the guess."""

    def judge(self, target: int, wanted: Sequence[int]) -> None:
        """Compare what was guessed about a layer with what it really used."""
        pending = self._pending[target]
        if pending:
            used = set(wanted)
            for layer, ranked in pending.items():
                self.rates(layer, target).learn([expert in used for expert in ranked])
            pending.clear()

    def guess(self, layer: int, target: int, ranked: list[int]) -> list[Prediction]:
        """Predict the experts of a ranking, best first, to be judged later."""
        self._pending[target][layer] = ranked
        confidences = self.rates(layer, target).confidences()
        return [Prediction(ExpertId(target, e), confidence) for e, confidence in zip(ranked, confidences, strict=True)]

    def rates(self, layer: int, target: int) -> HitRates:
        """The hit rates of a layer's guesses about a target."""
        if (layer, target) not in self._rates:
            shape = self._shapes[target]
            expected = shape.top_k / shape.num_experts if self._expected is None else self._expected
            self._rates[layer, target] = HitRates(shape.num_ranked, expected)
        return self._rates[layer, target]


def best_first(predictions: list[Prediction]) -> list[Prediction]:
    """Predictions by confidence, the highest first."""
    return sorted(predictions, key=lambda prediction: -prediction.confidence)
