import pytest
import torch

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.prefetch.predictors import LayerShape, make_predictor

from .layers import SHAPES, experts_of, hidden_states, routers


def test_next_router_ranks_by_the_scores_of_the_targets_router():
    scores = torch.tensor([[0.0, 5.0, -1.0, 3.0]])
    predictor = make_predictor("next_router", SHAPES, {2: lambda hidden: scores})
    assert experts_of(predictor.predict(0, [2, 3], hidden_states())) == [1, 3]


def test_next_router_knows_nothing_about_the_next_token():
    predictor = make_predictor("next_router", SHAPES, routers())
    assert predictor.predict(3, [0, 2, 3], hidden_states()) == []


def test_next_router_is_silent_without_hidden_states():
    assert make_predictor("next_router", SHAPES, routers()).predict(0, [2], None) == []


def test_next_router_takes_what_several_tokens_agree_on_for_likelier_than_what_one_wants():
    scores = torch.tensor([[9.0, 8.0, 0.0, 0.0], [0.0, 8.0, 9.0, 0.0], [0.0, 9.0, 0.0, 8.0]])
    predictor = make_predictor("next_router", SHAPES, {2: lambda hidden: scores})
    alone = make_predictor("next_router", SHAPES, {2: lambda hidden: scores[:1]})
    predictions = predictor.predict(0, [2], hidden_states(3))
    assert predictions[0].expert == ExpertId(2, 1)
    assert sorted(experts_of(predictions)) == [0, 1, 2, 3]
    assert predictions[0].confidence > alone.predict(0, [2], hidden_states())[0].confidence


def test_next_router_is_surer_of_the_layer_that_it_has_guessed_well():
    predictor = make_predictor("next_router", SHAPES, routers())
    for token in range(50):
        predictor.observe(0, [0, 1])
        predicted = predictor.predict(0, [2, 3], hidden_states(seed=token))
        rightly = [p.expert.expert for p in predicted if p.expert.layer == 2][:1]
        predictor.observe(2, rightly)
        wrongly = set(range(8)) - {p.expert.expert for p in predicted if p.expert.layer == 3}
        predictor.observe(3, sorted(wrongly))
    confidence = {p.expert.layer: p.confidence for p in reversed(predictor.predict(0, [2, 3], hidden_states()))}
    assert confidence[2] > 0.85
    assert confidence[3] < 0.15


def test_next_router_ranks_last_what_a_router_rules_out():
    scores = torch.tensor([[-torch.inf, -torch.inf, 1.0, 2.0]])
    predictor = make_predictor("next_router", [LayerShape(0, 4, 2), LayerShape(1, 4, 2)], {1: lambda hidden: scores})
    predictions = predictor.predict(0, [1], hidden_states())
    assert experts_of(predictions)[:2] == [3, 2]


def test_next_router_without_any_router_is_an_error_that_names_what_works():
    with pytest.raises(ConfigError, match=r"4 sparse layers .* choose one of \['last_token', 'transition'\]"):
        make_predictor("next_router", SHAPES, {})
