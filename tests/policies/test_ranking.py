"""A ranking gives the order of a sorted list, without sorting."""

from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies.passes import Passes
from transformers_moe_offload.policies.ranking import Ranking

changes = st.lists(st.tuples(st.integers(0, 15), st.none() | st.integers(-3, 3)), max_size=60)


@given(changes)
def test_a_ranking_iterates_in_the_order_of_the_latest_keys(calls):
    ranking, keys = Ranking(), {}
    for turn, (number, score) in enumerate(calls):
        expert = ExpertId(0, number)
        if score is not None:
            keys[expert] = (score, turn)
            ranking.put(expert, keys[expert])
        elif expert in keys:
            del keys[expert]
            ranking.remove(expert)
        assert list(ranking) == sorted(keys, key=keys.__getitem__)


def test_the_front_of_a_ranking_is_found_without_looking_at_everybody():
    ranking = Ranking()
    for number in range(1000):
        ranking.put(ExpertId(0, number), (-number, number))
    looked_at = []

    class Watched(list):
        def __getitem__(self, place):
            looked_at.append(place)
            return super().__getitem__(place)

    ranking._heap = Watched(ranking._heap)
    front = iter(ranking)
    assert [next(front).expert for _ in range(5)] == [999, 998, 997, 996, 995]
    assert len(looked_at) <= 11


def test_a_pass_ends_where_a_layer_asks_that_does_not_come_after_the_last_one():
    passes = Passes()
    assert [passes.begin(layer) for layer in (0, 1, 3, 1, 1, 2, 0)] == [False, False, False, True, True, False, True]
    assert passes.count == 3
