"""`next_router`: ask the routers of the layers ahead."""

# T tokens, E experts, H hidden, R experts that are ranked for a layer

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.prefetch.predictors.base import (
    LayerShape,
    Prediction,
    Router,
    predictor_names,
    register_predictor,
)
from transformers_moe_offload.prefetch.predictors.ranking import RankedGuesses, best_first


@register_predictor("next_router")
class NextRouter:
    """Asks the routers of the layers ahead about the hidden states of this one (arXiv 2312.17238, section 3.2).

    The residual stream changes little from layer to layer, so a later router's input is much like its present value.
    Knows nothing about the next token.
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
        return best_first(predictions)


def _union(target: int, scores: Tensor, confidences: list[float]) -> list[Prediction]:
    """Experts that any of several tokens may want: scores (T, E), confidences of R ranks, each for one token."""
    ranked = scores.topk(len(confidences), dim=-1).indices.cpu()
    missed = torch.tensor(confidences, dtype=torch.float64).clamp(max=1 - 1e-9).neg().log1p()
    all_miss = torch.zeros(scores.shape[-1], dtype=torch.float64)
    all_miss.index_add_(0, ranked.flatten(), missed.repeat(len(scores)))
    experts = ranked.unique()
    wanted = -all_miss[experts].expm1()
    return [Prediction(ExpertId(target, e), p) for e, p in zip(experts.tolist(), wanted.tolist(), strict=True)]
