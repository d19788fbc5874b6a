"""Copies of experts fill what other GPUs have to spare, and nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from transformers_moe_offload.cache.lodging import lodgings
from transformers_moe_offload.expert import ExpertId

DEVICES = "abc"
experts = st.builds(ExpertId, st.integers(0, 2), st.integers(0, 4))
sizes = st.dictionaries(st.sampled_from(DEVICES), st.dictionaries(experts, st.integers(1, 9), max_size=8))
spare = st.dictionaries(st.sampled_from(DEVICES), st.integers(0, 40))
faster = st.dictionaries(st.sampled_from(DEVICES), st.lists(st.sampled_from(DEVICES), unique=True)).map(
    lambda found: {device: [other for other in others if other != device] for device, others in found.items()}
)


def experts_of(layers, num_experts, nbytes=1):
    return {ExpertId(layer, expert): nbytes for layer in layers for expert in range(num_experts)}


@given(sizes, spare, faster)
def test_nobody_takes_more_than_there_is_to_spare(record_bytes, spare_bytes, faster):
    found = lodgings(record_bytes, spare_bytes, faster)
    taken = dict.fromkeys(DEVICES, 0)
    for device, places in found.items():
        for expert, place in places.items():
            assert place in faster[device]
            taken[place] += record_bytes[device][expert]
    assert all(taken[device] <= spare_bytes.get(device, 0) for device in DEVICES)


@given(sizes, spare, faster)
def test_who_has_no_copy_fits_nowhere(record_bytes, spare_bytes, faster):
    found = lodgings(record_bytes, spare_bytes, faster)
    left = dict(spare_bytes)
    for device, places in found.items():
        for expert, place in places.items():
            left[place] -= record_bytes[device][expert]
    for device, members in record_bytes.items():
        for expert in members.keys() - found[device].keys():
            assert all(left.get(place, 0) < members[expert] for place in faster.get(device, ()))


def test_a_gpu_from_which_nothing_comes_faster_than_from_the_host_is_left_alone():
    assert lodgings({"a": experts_of([0], 4)}, {"b": 100}, {"a": []}) == {"a": {}}


def test_the_fastest_place_is_filled_first():
    found = lodgings({"a": experts_of([0], 3)}, {"b": 1, "c": 5}, {"a": ["b", "c"]})
    assert found["a"] == {ExpertId(0, 0): "b", ExpertId(0, 1): "c", ExpertId(0, 2): "c"}


def test_layers_get_as_many_each():
    found = lodgings({"a": experts_of([0, 1, 2], 8)}, {"b": 6}, {"a": ["b"]})
    assert [sum(expert.layer == layer for expert in found["a"]) for layer in range(3)] == [2, 2, 2]


def test_two_gpus_share_what_a_third_has():
    found = lodgings({"a": experts_of([0], 8), "b": experts_of([1], 8)}, {"c": 6}, {"a": ["c"], "b": ["c"]})
    assert (len(found["a"]), len(found["b"])) == (3, 3)
