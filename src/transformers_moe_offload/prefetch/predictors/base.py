"""What a predictor answers, and the list of predictors by name.

A predictor is told which experts each layer has used, and is asked about layers ahead; whether a prediction is worth a
load is decided in `prefetch/prefetcher.py`. A confidence is the share of earlier predictions that were
correct, so that those of different predictors, layers and distances can be compared.
"""

# T tokens, E experts, H hidden

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.registry import Registry


class LayerShape(NamedTuple):
    """What a predictor needs to know about a sparse layer."""

    layer: int
    num_experts: int
    top_k: int
    """Experts that a token takes."""

    @property
    def num_ranked(self) -> int:
        """Most experts that are predicted for one token: beyond twice what it takes, few predictions are correct."""
        return min(2 * self.top_k, self.num_experts)


class Prediction(NamedTuple):
    """An expert that is likely to be wanted, and how likely."""

    expert: ExpertId
    confidence: float


Router = Callable[[Tensor], Tensor]
"""Scores of a layer's experts for the hidden states that `predict` is given: (T, H) -> (T, E), higher is likelier."""


class Predictor(Protocol):
    """Predicts the experts of layers ahead."""

    def observe(self, layer: int, wanted: Sequence[int]) -> None:
        """The experts that a layer has used, each once. Called at every visit, in the order of the visits."""

    def predict(self, layer: int, targets: Sequence[int], hidden: Tensor | None) -> list[Prediction]:
        """Experts that the layers in `targets` may want, best first, right after `layer` was observed.

        hidden (T, H) is what reached the layer, or None. A target that does not come after `layer` in the model is
        meant at its next turn: at the next token, or in this forward if the model runs some layers again. A predictor
        returns nothing for targets that it knows nothing of.
        """


PredictorFactory = Callable[[Sequence[LayerShape], Mapping[int, Router]], Predictor]

_PREDICTORS: Registry[PredictorFactory] = Registry("predictor")


def register_predictor(name: str, *, exist_ok: bool = False) -> Callable[[PredictorFactory], PredictorFactory]:
    """Class decorator that makes a predictor available by name.

    The class is called with the sparse layers in the order in which a token passes them, and the routers of those
    whose router is known, by layer. A name that is taken is an error unless `exist_ok`.
    """
    return _PREDICTORS.register(name, exist_ok=exist_ok)


def predictor_names() -> list[str]:
    """The names that `make_predictor` accepts."""
    return _PREDICTORS.names()


def make_predictor(name: str, layers: Sequence[LayerShape], routers: Mapping[int, Router]) -> Predictor:
    """A fresh predictor by its registered name."""
    factory = _PREDICTORS[name]
    for shape in layers:
        if not 1 <= shape.top_k <= shape.num_experts:
            raise ConfigError(
                f"layer {shape.layer} has top_k={shape.top_k} and {shape.num_experts} experts; top_k must be 1 to "
                f"{shape.num_experts}"
            )
    known = {shape.layer for shape in layers}
    if len(known) != len(layers):
        raise ConfigError(
            f"{len(layers)} sparse layers have {len(known)} different numbers; give each layer a number of its own"
        )
    unknown = sorted(set(routers) - known)
    if unknown:
        raise ConfigError(
            f"routers has the layers {unknown}, but the sparse layers are {sorted(known)}; leave the others out"
        )
    return factory(layers, routers)
