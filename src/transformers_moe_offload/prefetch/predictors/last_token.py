"""`last_token`: expect what was wanted last."""

# H hidden

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.prefetch.predictors.base import LayerShape, Prediction, Router, register_predictor
from transformers_moe_offload.prefetch.predictors.ranking import HitRates, best_first


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
        likely = [(target, expert) for target in targets for expert in self._last.get(target, ())]
        return best_first([Prediction(ExpertId(*one), self._rates[one[0]].confidences()[0]) for one in likely])
