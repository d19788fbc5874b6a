"""Predictors by name, and what they are made for."""

from copy import deepcopy

import pytest

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.prefetch.predictors import (
    LayerShape,
    NextRouter,
    Prediction,
    base,
    make_predictor,
    predictor_names,
    register_predictor,
)

from .layers import SHAPES, routers


def test_an_unknown_predictor_is_an_error_that_names_those_there_are():
    with pytest.raises(ConfigError, match=r"predictor='next' is not a known predictor; choose one of \['last_token'.*"):
        make_predictor("next", SHAPES, routers())


def test_a_name_that_is_taken_is_refused_and_keeps_its_meaning():
    with pytest.raises(ConfigError, match="'next_router' is already registered"):
        register_predictor("next_router")(object)
    assert isinstance(make_predictor("next_router", SHAPES, routers()), NextRouter)


def test_a_predictor_of_ones_own_is_made_with_the_layers_and_routers(monkeypatch):
    monkeypatch.setattr(base, "_PREDICTORS", deepcopy(base._PREDICTORS))

    @register_predictor("always_the_first")
    class AlwaysTheFirst:
        def __init__(self, layers, routers):
            self.layers, self.routers = layers, routers

        def observe(self, layer, wanted):
            pass

        def predict(self, layer, targets, hidden):
            return [Prediction(ExpertId(target, 0), 1.0) for target in targets]

    known = routers()
    made = make_predictor("always_the_first", SHAPES, known)
    assert (made.layers, made.routers) == (SHAPES, known)
    assert "always_the_first" in predictor_names()


def test_routers_of_layers_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match=r"routers has the layers \[1\], but the sparse layers are \[0, 2, 3, 7\]"):
        make_predictor("next_router", SHAPES, {1: lambda hidden: hidden})


def test_two_layers_with_one_number_are_refused():
    with pytest.raises(ConfigError, match="2 sparse layers have 1 different numbers"):
        make_predictor("last_token", [LayerShape(0, 4, 1), LayerShape(0, 4, 1)], {})


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_token_takes_one_expert_at_least_and_all_of_them_at_most(top_k):
    with pytest.raises(ConfigError, match=f"layer 0 has top_k={top_k} and 4 experts; top_k must be 1 to 4"):
        make_predictor("last_token", [LayerShape(0, 4, top_k)], {})
