import pytest
import torch

from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.slots.buffers import SlotPool, allocated_bytes
from transformers_moe_offload.store.record import ALIGNMENT, RecordLayout

CPU = torch.device("cpu")
BYTES = RecordLayout([FieldSpec("a", (4,), "uint8")])


def pool_of(num_slots, slot_bytes):
    pool = SlotPool(slot_bytes, CPU)
    for slot in range(num_slots):
        pool.add(slot)
    return pool


def test_a_pool_is_as_large_as_its_slots_together():
    pool = pool_of(3, 128)
    assert len(pool) == 3
    assert pool.nbytes == 384
    assert all(pool.record(slot).shape == (128,) for slot in range(3))
    assert all(pool.record(slot).dtype == torch.uint8 for slot in range(3))


def test_slots_share_no_memory():
    pool = pool_of(3, 64)
    for slot in range(3):
        pool.record(slot).fill_(slot)
    assert [pool.record(slot).unique().tolist() for slot in range(3)] == [[0], [1], [2]]


def test_every_slot_starts_where_torch_would_put_a_tensor_of_its_own():
    pool = pool_of(5, 192)
    assert all(pool.record(slot).data_ptr() % ALIGNMENT == 0 for slot in range(5))


def test_a_slot_seen_as_an_expert_shows_what_is_in_it_now():
    pool = pool_of(2, 64)
    views = pool.views(1, BYTES)
    pool.record(1).fill_(9)
    assert views["a"].tolist() == [9] * 4


def test_a_slot_can_be_made_to_fit_a_record_of_another_size():
    pool = pool_of(2, 64)
    pool.views(0, BYTES)
    pool.fit(0, 192)
    assert (pool.nbytes, pool.record(0).shape) == (256, (192,))
    pool.record(0).fill_(5)
    assert pool.views(0, BYTES)["a"].tolist() == [5] * 4, "a view of the old buffer"


def test_looking_at_a_slot_again_makes_nothing_new():
    pool = pool_of(2, 64)
    assert pool.views(0, BYTES) is pool.views(0, RecordLayout(BYTES.fields))
    assert pool.views(0, BYTES) is not pool.views(1, BYTES)


def test_one_slot_can_be_seen_through_two_layouts():
    pool = pool_of(1, 64)
    pool.record(0).zero_()
    wide = RecordLayout([FieldSpec("b", (2,), "int32")])
    pool.views(0, BYTES)["a"].fill_(1)
    assert pool.views(0, wide)["b"].tolist() == [0x01010101, 0]


def test_weights_seen_first_in_inference_mode_can_be_copied_for_training_later():
    """Views are kept, so those made while generating are the ones that training gets."""
    pool = pool_of(1, 64)
    with torch.inference_mode():
        pool.views(0, RecordLayout([FieldSpec("w", (2,), "float32")]))
        pool.record(0).zero_()
    weights = pool.views(0, RecordLayout([FieldSpec("w", (2,), "float32")]))["w"].clone()
    x = torch.ones(2, requires_grad=True)
    (weights * x).sum().backward()
    assert x.grad.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("slot_bytes", "taken"),
    [
        (1, 512),
        (700 << 10, 1 << 20),
        (1 << 20, 1 << 20),
        (2 << 20, 2 << 20),
        (5 << 20, 5 << 20),
        (7 << 20, 10 << 20),
        (10 << 20, 10 << 20),
        ((12 << 20) + 1, 14 << 20),
    ],
)
def test_what_a_slot_takes_of_a_gpu_is_its_share_of_what_torch_asks_for(slot_bytes, taken):
    assert allocated_bytes(slot_bytes, torch.device("cuda", 0)) == taken
    assert allocated_bytes(slot_bytes, CPU) == slot_bytes
