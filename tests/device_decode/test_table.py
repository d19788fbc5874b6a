"""What kernels find in the table of addresses, and when."""

import torch

from transformers_moe_offload.device_decode.streams import Streams
from transformers_moe_offload.device_decode.table import NO_EXPERT, AddressTable
from transformers_moe_offload.expert import ExpertId

HOMES = {3: [100, 200], 7: [300, 400, 500]}
CPU = torch.device("cpu")


class Counting(Streams):
    num_queued = 0

    def compute(self, work):
        self.num_queued += 1
        work()


def table():
    return AddressTable(HOMES, CPU, Streams())


def test_everybody_is_at_home_at_first():
    assert {layer: table().of(layer).tolist() for layer in HOMES} == HOMES


def test_layers_with_fewer_experts_than_others_have_nobody_behind_their_last():
    assert table().homes.tolist() == [[100, 200, NO_EXPERT], [300, 400, 500]]


def test_who_has_arrived_is_found_there_once_that_is_published():
    addresses = table()
    addresses.arrive(ExpertId(7, 1), 9000)
    assert addresses.of(7).tolist() == HOMES[7]
    addresses.publish()
    assert addresses.of(7).tolist() == [300, 9000, 500]
    assert addresses.of(3).tolist() == HOMES[3]


def test_experts_in_slots_are_told_apart_from_those_at_home_as_kernels_find_them():
    addresses = table()
    addresses.arrive(ExpertId(7, 1), 9000)
    assert addresses.in_slots(7).tolist() == [False, False, False]
    addresses.publish()
    assert addresses.in_slots(7).tolist() == [False, True, False]
    assert addresses.in_slots(3).tolist() == [False, False]
    addresses.leave(ExpertId(7, 1))
    assert not addresses.in_slots(7).any()


def test_who_leaves_is_found_at_home_at_once():
    addresses = table()
    addresses.arrive(ExpertId(3, 0), 9000)
    addresses.publish()
    addresses.leave(ExpertId(3, 0))
    assert addresses.of(3).tolist() == HOMES[3]
    assert addresses.address(ExpertId(3, 0)) == 100


def test_who_leaves_before_it_was_published_is_never_found_elsewhere():
    addresses = table()
    addresses.arrive(ExpertId(3, 0), 9000)
    addresses.leave(ExpertId(3, 0))
    addresses.publish()
    assert addresses.of(3).tolist() == HOMES[3]


def test_any_number_is_published_in_one_go():
    streams = Counting()
    addresses = AddressTable(HOMES, CPU, streams)
    for layer, expert in ((3, 0), (3, 1), (7, 2)):
        addresses.arrive(ExpertId(layer, expert), 1000 * layer + expert)
    addresses.publish()
    addresses.publish()
    assert streams.num_queued == 1
    assert addresses.of(3).tolist() == [3000, 3001]
    assert addresses.of(7).tolist() == [300, 400, 7002]


def test_the_tensors_of_a_layer_stay_the_same():
    addresses = table()
    before = addresses.of(7)
    place = before.data_ptr()
    addresses.arrive(ExpertId(7, 0), 9000)
    addresses.publish()
    assert addresses.of(7) is before
    assert before.data_ptr() == place
    assert before[0] == 9000


def test_a_table_made_and_changed_in_inference_mode_works_outside_of_it():
    with torch.inference_mode():
        addresses = table()
        addresses.arrive(ExpertId(7, 0), 9000)
        addresses.publish()
    addresses.leave(ExpertId(7, 0))
    assert not addresses.of(7).is_inference()
    assert addresses.of(7).tolist() == HOMES[7]
