from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.prefetch.predictors import make_predictor, transition

from .layers import SHAPES, experts_of


def test_transition_learns_what_follows_what_also_across_the_end_of_the_token():
    predictor = make_predictor("transition", SHAPES, {})
    for token in range(60):
        odd = token % 2
        predictor.observe(0, [odd, 2 + odd])
        ahead = predictor.predict(0, [2, 3], None)
        predictor.observe(2, [odd])
        predictor.observe(3, [odd, 2 + odd, 4 + odd])
        across = predictor.predict(3, [0], None)
    assert odd == 1
    assert {prediction.expert for prediction in ahead[:4]} == {ExpertId(2, 1), *(ExpertId(3, e) for e in (1, 3, 5))}
    assert sorted(experts_of(across[:2])) == [0, 2]


def test_transition_begins_no_surer_than_chance():
    predictor = make_predictor("transition", SHAPES, {})
    predictor.observe(0, [0, 1])
    assert {prediction.confidence for prediction in predictor.predict(0, [3], None)} == {3 / 8}


def test_transition_follows_a_change_of_habits():
    predictor = make_predictor("transition", SHAPES, {})
    for followers in ([0, 1, 2], [5, 6, 7]):
        for _ in range(40):
            predictor.observe(0, [0, 1])
            predictor.predict(0, [3], None)
            predictor.observe(3, followers)
    predictor.observe(0, [0, 1])
    assert sorted(experts_of(predictor.predict(0, [3], None)[:3])) == [5, 6, 7]


def test_transition_learns_nothing_from_many_tokens_at_once():
    taught, untaught = (make_predictor("transition", SHAPES, {}) for _ in range(2))
    for predictor in (taught, untaught):
        predictor.observe(0, [0, 1])
        predictor.predict(0, [3], None)
    taught.observe(3, range(4, 8))
    for predictor in (taught, untaught):
        predictor.observe(0, [0, 1])
    assert experts_of(taught.predict(0, [3], None)) == experts_of(untaught.predict(0, [3], None))


def test_transition_stays_within_its_memory(monkeypatch):
    monkeypatch.setattr(transition, "_MOST_TABLE_BYTES", 6 * 8 * 4)
    predictor = make_predictor("transition", SHAPES, {})
    predictor.observe(0, [0, 1])
    assert predictor.predict(0, [3], None)
    assert predictor.predict(0, [2], None) == []
