"""What is counted on the device, and what the host hears of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.device_decode.background_fill import Use
from transformers_moe_offload.device_decode.counters import MOST_PAIRS, Counters
from transformers_moe_offload.device_decode.streams import Streams
from transformers_moe_offload.device_decode.table import AddressTable
from transformers_moe_offload.errors import MoeOffloadError
from transformers_moe_offload.expert import ExpertId

NUM_EXPERTS = {0: 4, 5: 6}


def counters(streams=None):
    streams = streams or Streams()
    homes = {layer: [1000 * (layer + 1) + e for e in range(number)] for layer, number in NUM_EXPERTS.items()}
    table = AddressTable(homes, torch.device("cpu"), streams)
    return Counters(table, streams), table


def routed(*tokens):
    return torch.tensor(tokens)


def heard(counting):
    return list(counting.arrived())


def test_a_forward_is_heard_of_layer_by_layer():
    counting, _ = counters()
    counting.note(0, routed([3, 1]))
    counting.note(5, routed([5, 0]))
    counting.close()
    assert heard(counting) == [[Use(0, (1, 3), frozenset()), Use(5, (0, 5), frozenset())]]
    assert heard(counting) == []


def test_those_in_slots_are_hits():
    counting, table = counters()
    table.arrive(ExpertId(0, 3), 7)
    table.publish()
    counting.note(0, routed([3, 1]))
    counting.close()
    assert heard(counting) == [[Use(0, (1, 3), frozenset({3}))]]


def test_an_expert_that_several_tokens_want_counts_once():
    counting, _ = counters()
    counting.note(0, routed([3, 1], [1, 2], [1, 3]))
    counting.close()
    assert heard(counting) == [[Use(0, (1, 2, 3), frozenset())]]


@pytest.mark.parametrize("index", [4, 5, 6, 100, -1, -7])
def test_an_index_that_is_no_expert_of_the_layer_is_nobody(index):
    """Of a layer with four experts beside one with six."""
    counting, _ = counters()
    counting.note(0, routed([2, index]))
    counting.close()
    assert heard(counting) == [[Use(0, (2,), frozenset())]]


def test_what_an_earlier_forward_asked_for_is_not_asked_for_again():
    counting, _ = counters()
    counting.note(0, routed([0, 1], [2, 3]))
    counting.close()
    counting.note(0, routed([2, 1]))
    counting.close()
    counting.close()
    assert heard(counting) == [[Use(0, (0, 1, 2, 3), frozenset())], [Use(0, (1, 2), frozenset())], []]


def test_a_layer_that_is_used_twice_in_a_forward_is_heard_of_twice():
    counting, _ = counters()
    counting.note(0, routed([0, 1]))
    counting.note(0, routed([1, 2]))
    counting.close()
    assert heard(counting) == [[Use(0, (0, 1), frozenset())], [Use(0, (1, 2), frozenset())]]


def test_that_cannot_be_captured_and_is_refused():
    counting, _ = counters(type("Capturing", (Streams,), {"is_capturing": lambda self: True})())
    counting.note(0, routed([0, 1]))
    with pytest.raises(MoeOffloadError, match="layer 0 is used twice"):
        counting.note(0, routed([1, 2]))


def test_more_pairs_than_can_be_counted_are_refused():
    counting, _ = counters()
    counting.note(0, torch.zeros(MOST_PAIRS // 2, 2, dtype=torch.int64))
    with pytest.raises(MoeOffloadError, match=f"{MOST_PAIRS + 2} experts .* at most {MOST_PAIRS}"):
        counting.note(5, torch.zeros(MOST_PAIRS // 2 + 1, 2, dtype=torch.int64))


def test_routing_of_32_bits_is_taken_as_well():
    counting, _ = counters()
    counting.note(0, routed([3, 1]).int())
    counting.close()
    assert heard(counting) == [[Use(0, (1, 3), frozenset())]]


def test_whoever_changes_the_routing_afterwards_changes_nothing():
    counting, _ = counters()
    index = routed([3, 1])
    counting.note(0, index)
    index.fill_(0)
    counting.close()
    assert heard(counting) == [[Use(0, (1, 3), frozenset())]]


def test_memory_for_readings_is_used_again():
    counting, _ = counters()
    for _ in range(5):
        counting.note(0, routed([3, 1]))
        counting.close()
        assert len(heard(counting)) == 1
    assert len(counting._spare) == 1


layers = st.sampled_from(list(NUM_EXPERTS))
tokens = st.lists(st.lists(st.integers(0, 8), min_size=2, max_size=2), min_size=1)
in_slots = st.sets(st.tuples(layers, st.integers(0, 3)))


@given(st.lists(st.tuples(st.dictionaries(layers, tokens), in_slots), max_size=6))
def test_counts_are_those_of_sets(forwards):
    counting, table = counters()
    expected, inside = [], set()
    for asked, in_slots in forwards:
        for expert in inside - in_slots:
            table.leave(ExpertId(*expert))
        for expert in in_slots - inside:
            table.arrive(ExpertId(*expert), 7)
        table.publish()
        inside = in_slots
        uses = []
        for layer in sorted(asked):
            counting.note(layer, torch.tensor(asked[layer]))
            wanted = {e for token in asked[layer] for e in token if e < NUM_EXPERTS[layer]}
            if wanted:
                hits = frozenset(e for e in wanted if (layer, e) in in_slots)
                uses.append(Use(layer, tuple(sorted(wanted)), hits))
        counting.close()
        expected.append(uses)
    assert heard(counting) == expected
