"""Predictors: guesses at the experts that the sparse layers ahead will want."""

from transformers_moe_offload.prefetch.predictors.base import (
    LayerShape,
    Prediction,
    Predictor,
    Router,
    make_predictor,
    predictor_names,
    register_predictor,
)
from transformers_moe_offload.prefetch.predictors.last_token import LastToken
from transformers_moe_offload.prefetch.predictors.next_router import NextRouter
from transformers_moe_offload.prefetch.predictors.transition import Transition

__all__ = [
    "LastToken",
    "LayerShape",
    "NextRouter",
    "Prediction",
    "Predictor",
    "Router",
    "Transition",
    "make_predictor",
    "predictor_names",
    "register_predictor",
]
