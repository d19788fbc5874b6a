"""A pass is a forward, whether or not a model runs some of its layers several times in one."""

import pytest

from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies import LeastStale
from transformers_moe_offload.policies.passes import Passes

LOOPED = [0, 1, 2, 3, 2, 3, 2, 3, 4, 5]
"""The layers of a forward that runs two of six three times."""


def new_passes(passes, layers):
    """At which of these visits a new pass begins."""
    return [number for number, layer in enumerate(layers) if passes.begin(layer)]


def test_a_pass_ends_where_the_layers_begin_again():
    assert new_passes(Passes(), [0, 1, 2] * 3) == [3, 6]


def test_layers_that_run_several_times_in_a_forward_do_not_end_it():
    passes = Passes(last=5)
    assert new_passes(passes, LOOPED * 3) == [10, 20]
    assert passes.count == 2


def test_which_layer_is_the_last_is_learnt_in_the_first_forward():
    passes = Passes()
    new_passes(passes, LOOPED)
    assert new_passes(passes, LOOPED * 2) == [0, 10]


def test_a_decoder_that_goes_on_alone_begins_a_pass_with_each_of_its_steps():
    assert new_passes(Passes(), [*range(8), *range(4, 8), *range(4, 8), *range(8)]) == [8, 12, 16]


def test_forwards_that_are_broken_off_early_are_passes_of_their_own():
    assert new_passes(Passes(last=5), [0, 1, 0, 1, 2, 0]) == [2, 5]


def test_a_layer_is_over_when_it_has_had_as_many_turns_as_in_the_forward_before():
    passes = Passes(last=5)
    new_passes(passes, LOOPED)
    over = []
    for layer in LOOPED:
        passes.begin(layer)
        over.append(passes.is_over(layer))
    assert over == [True, True, False, False, False, False, True, True, True, True]


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_least_stale_lets_layers_that_come_again_in_this_forward_stay_before_those_that_do_not(turn):
    policy = LeastStale()
    for layer in LOOPED * 3:
        policy.begin(layer, [ExpertId(layer, 0)])
        if ExpertId(layer, 0) not in set(policy.candidates()):
            policy.admit(ExpertId(layer, 0))
        policy.use(ExpertId(layer, 0))
    for layer in LOOPED[: 2 + 2 * turn]:
        policy.begin(layer, [ExpertId(layer, 0)])
        policy.use(ExpertId(layer, 0))
    order = [expert.layer for expert in policy.candidates()]
    assert order == ([0, 1, 5, 4, 3, 2] if turn < 3 else [0, 1, 2, 3, 5, 4])
