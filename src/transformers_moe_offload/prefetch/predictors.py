"""Guess which experts the sparse layers ahead will want.

A predictor is told what each layer really used and is asked about layers ahead; whether a guess is worth a load is
decided elsewhere. Confidences are shares of earlier guesses that came true, so that those of different predictors,
layers and distances can be compared.
"""

# T tokens, E experts, H hidden, R experts that are ranked for a layer

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.expert import ExpertId


class LayerShape(NamedTuple):
    """What a predictor needs to know about a sparse layer."""

    layer: int
    num_experts: int
    top_k: int
    """Experts that a token takes."""

    @property
    def num_ranked(self) -> int:
        """Most experts that are guessed for one token: beyond twice what it takes, few guesses come true."""
        return min(2 * self.top_k, self.num_experts)


class Prediction(NamedTuple):
    """An expert that is likely to be wanted, and how likely."""

    expert: ExpertId
    confidence: float


Router = Callable[[Tensor], Tensor]
"""Scores of a layer's experts for the hidden states that `predict` is given: (T, H) -> (T, E), higher is likelier."""


class Predictor(Protocol):
    """Guesses the experts of layers ahead."""

    def observe(self, layer: int, wanted: Sequence[int]) -> None:
        """What a layer really used, each expert once. Called at every visit, in the order of the visits."""

    def predict(self, layer: int, targets: Sequence[int], hidden: Tensor | None) -> list[Prediction]:
        """Experts that the layers in `targets` may want, best first, right after `layer` was observed.

        hidden (T, H) is what reached the layer, or None. A target that does not come after `layer` in the model is
        meant at the next token. About targets it knows nothing of, a predictor is silent.
        """


PredictorFactory = Callable[[Sequence[LayerShape], Mapping[int, Router]], Predictor]

_FACTORIES: dict[str, PredictorFactory] = {}


def register_predictor(name: str, *, exist_ok: bool = False) -> Callable[[PredictorFactory], PredictorFactory]:
    """Class decorator that makes a predictor available by name.

    The class is called with the sparse layers in the order in which a token passes them, and the routers of those
    whose router is known, by layer. A name that is taken is an error unless `exist_ok`.
    """

    def register(factory: PredictorFactory) -> PredictorFactory:
        if name in _FACTORIES and not exist_ok:
            raise ConfigError(f"a predictor named {name!r} is already registered; choose another name")
        _FACTORIES[name] = factory
        return factory

    return register


def predictor_names() -> list[str]:
    """The names that `make_predictor` accepts."""
    return sorted(_FACTORIES)


def make_predictor(name: str, layers: Sequence[LayerShape], routers: Mapping[int, Router]) -> Predictor:
    """A fresh predictor by its registered name."""
    if name not in _FACTORIES:
        raise ConfigError(
            f"predictor={name!r} is not a known predictor; choose one of {predictor_names()} or register your own"
        )
    for shape in layers:
        if not 1 <= shape.top_k <= shape.num_experts:
            raise ConfigError(
                f"layer {shape.layer} has {shape.num_experts} experts, of which a token cannot take {shape.top_k}"
            )
    known = {shape.layer for shape in layers}
    if len(known) != len(layers):
        raise ConfigError(f"{len(layers)} layers have {len(known)} different numbers; give each sparse layer its own")
    strangers = sorted(set(routers) - known)
    if strangers:
        raise ConfigError(f"routers of layers {strangers} were given, but the sparse layers are {sorted(known)}")
    return _FACTORIES[name](layers, routers)


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
    """Turns rankings into predictions, with the confidence that guesses of the same rank have earned.

    Each pair of layers, the one that guesses and the one that is guessed, has rates of its own. `expected` is what they
    start from; None means that of guesses made at random.
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
        """How guesses of a layer about a target have fared."""
        if (layer, target) not in self._rates:
            shape = self._shapes[target]
            expected = shape.top_k / shape.num_experts if self._expected is None else self._expected
            self._rates[layer, target] = HitRates(shape.num_ranked, expected)
        return self._rates[layer, target]


@register_predictor("next_router")
class NextRouter:
    """Asks the routers of the layers ahead about the hidden states of this one (arXiv 2312.17238, section 3.2).

    The residual stream changes little from layer to layer, so that a router sees early much of what it will see in
    time. Knows nothing about the next token.
    """

    def __init__(self, layers: Sequence[LayerShape], routers: Mapping[int, Router]) -> None:
        if not routers:
            raise ConfigError(
                f"predictor='next_router' needs routers, but none of the {len(layers)} sparse layers has one that we "
                f"can reproduce; choose one of {[name for name in predictor_names() if name != 'next_router']}"
            )
        self._shapes = {shape.layer: shape for shape in layers}
        self._position = {shape.layer: position for position, shape in enumerate(layers)}
        self._routers = dict(routers)
        self._guesses = RankedGuesses(layers, expected=0.5)

    def observe(self, layer: int, wanted: Sequence[int]) -> None:
        """Judge what was guessed about the layer."""
        self._guesses.judge(layer, wanted)

    def predict(self, layer: int, targets: Sequence[int], hidden: Tensor | None) -> list[Prediction]:
        """Rank each target's experts by its router's scores; sync: device -> host."""
        if hidden is None:
            return []
        predictions: list[Prediction] = []
        for target in targets:
            if target in self._routers and self._position[target] > self._position[layer]:
                with torch.no_grad():
                    scores = self._routers[target](hidden)
                if len(scores) == 1:
                    ranked = scores[0].topk(self._shapes[target].num_ranked).indices.tolist()
                    predictions += self._guesses.guess(layer, target, ranked)
                else:
                    predictions += _union(target, scores, self._guesses.rates(layer, target).confidences())
        return _best_first(predictions)


def _union(target: int, scores: Tensor, confidences: list[float]) -> list[Prediction]:
    """Experts that any of several tokens may want: scores (T, E), confidences of R ranks, each for one token."""
    ranked = scores.topk(len(confidences), dim=-1).indices.cpu()
    missed = torch.tensor(confidences, dtype=torch.float64).clamp(max=1 - 1e-9).neg().log1p()
    all_miss = torch.zeros(scores.shape[-1], dtype=torch.float64)
    all_miss.index_add_(0, ranked.flatten(), missed.repeat(len(scores)))
    experts = ranked.unique()
    wanted = -all_miss[experts].expm1()
    return [Prediction(ExpertId(target, e), p) for e, p in zip(experts.tolist(), wanted.tolist(), strict=True)]


def _best_first(predictions: list[Prediction]) -> list[Prediction]:
    return sorted(predictions, key=lambda prediction: -prediction.confidence)


@register_predictor("last_token")
class LastToken:
    """Expects each layer to want what it wanted at the last token: text keeps to its subject for a while."""

    def __init__(self, layers: Sequence[LayerShape], routers: Mapping[int, Router]) -> None:
        self._last: dict[int, list[int]] = {}
        self._rates = {shape.layer: HitRates(1, expected=shape.top_k / shape.num_experts) for shape in layers}

    def observe(self, layer: int, wanted: Sequence[int]) -> None:
        """Compare with the last visit, then remember this one."""
        last = self._last.get(layer)
        if last:
            self._rates[layer].learn([len(set(wanted).intersection(last)) / len(last)])
        self._last[layer] = list(wanted)

    def predict(self, layer: int, targets: Sequence[int], hidden: Tensor | None) -> list[Prediction]:
        """What each target wanted when it was last visited."""
        return _best_first(
            [
                Prediction(ExpertId(target, expert), self._rates[target].confidences()[0])
                for target in targets
                for expert in self._last.get(target, ())
            ]
        )


@register_predictor("transition")
class Transition:
    """Learns which expert of one layer is followed by which of another, from what it observes.

    For each pair of layers that it is asked about, a table of the shares of uses of expert e of the first that went
    with a use of expert f of the second. Learns from visits of single tokens: what many tokens want together says
    little about any of them.
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
        return _best_first(predictions)

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
"""Of the halvings from 1/4 to 1/256 this one finds most: of a token's experts in tiny-moe, one layer ahead, 63 % are
among the first four guesses; with 1/32 it is 62 %, with 1/256 57 %. What follows what depends on the text."""

_MOST_TABLE_BYTES = 64 * 2**20
"""Enough for the neighbours of 60 layers with 256 experts, or four layers ahead of 60 layers with 128."""
