"""Experts are used inside of whole pages of their files, and are the same experts."""

import errno
from zlib import crc32

import pytest
import torch
from safetensors.torch import save_file

from stores import cut_short, number, numbered_store, put_back, stacked_store
from transformers_moe_offload.disk_io import direct_reader
from transformers_moe_offload.disk_io.aio_queue import AioQueue
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ExpertId, ExpertSpec, FieldSpec
from transformers_moe_offload.slots import direct_io
from transformers_moe_offload.slots.direct_io import DirectSlots
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.field_source import FieldSource
from transformers_moe_offload.store.layer_source import LayerSource, RecordedExpert, ScatteredExpert
from transformers_moe_offload.store.record import ALIGNMENT, RecordLayout
from transformers_moe_offload.system.host_memory import PAGE_BYTES
from transformers_moe_offload.tensor_files.index import read_index

FIRST = ExpertId(0, 0)


def refuse(*arguments):
    raise OSError(errno.EINVAL, "Invalid argument")


@pytest.fixture(params=["by the kernel", "by threads", "through the page cache"])
def way(request, tmp_path, monkeypatch):
    """What reads the pages, and whether the page cache is left aside."""
    if request.param == "by the kernel":
        try:
            AioQueue()
        except OSError as error:
            pytest.skip(f"no asynchronous reads here: {error}")
    if request.param == "by threads":
        monkeypatch.setattr(direct_io, "AioQueue", refuse)
    if request.param == "through the page cache":
        monkeypatch.setattr(direct_reader.DirectReader, "__init__", refuse)
    return request.param


def slots_of(store, num_slots=1):
    spare = store.spare_bytes(0)
    slots = DirectSlots(store, store.layout(0, 0).nbytes + spare, spare, 2)
    for slot in range(num_slots):
        slots.add(slot)
    return slots


def bring_in(slots, expert, slot=0):
    from_files = slots.start(expert, slot).finish()
    return from_files, slots.weights[slot]


@pytest.mark.usefixtures("way")
def test_a_slot_shows_each_expert_that_comes_into_it(tmp_path):
    store = numbered_store(tmp_path, 2, 3)
    slots = slots_of(store)
    for expert in [ExpertId(layer, expert) for layer in range(2) for expert in range(3)]:
        from_files, weights = bring_in(slots, expert)
        assert from_files == store.stored_bytes(expert)
        assert {name: view.unique().tolist() for name, view in weights.items()} == {
            "weight": [number(expert)],
            "bias": [number(expert)],
        }


@pytest.mark.usefixtures("way")
def test_large_experts_have_the_bytes_of_their_files(tmp_path):
    stacks = {"0.down": torch.randn(3, 700, 300), "0.gate_up": torch.randn(3, 1400, 301).half()}
    store = stacked_store(tmp_path, stacks)
    slots = slots_of(store, 2)
    coming = [slots.start(ExpertId(0, expert), slot) for slot, expert in enumerate([2, 1])]
    for slot, expert in reversed(list(enumerate([2, 1]))):
        coming[slot].finish()
        weights = slots.weights[slot]
        assert torch.equal(weights["down"], stacks["0.down"][expert])
        assert torch.equal(weights["gate_up"], stacks["0.gate_up"][expert])


@pytest.mark.usefixtures("way")
def test_an_expert_that_has_to_be_cast_is_read_into_a_record(tmp_path):
    stacks = {"0.weight": torch.randn(2, 40, 30)}
    plain = stacked_store(tmp_path, stacks)
    store = ExpertStore([plain.layers[0].cast("bfloat16")])
    slots = DirectSlots(store, PAGE_BYTES, 0, 2)
    slots.add(0)
    _, weights = bring_in(slots, ExpertId(0, 1))
    assert torch.equal(weights["weight"], stacks["0.weight"][1].bfloat16())
    assert slots.weights[0] is weights


@pytest.mark.usefixtures("way")
def test_an_expert_in_two_files_is_read_from_both(tmp_path):
    save_file({"down": torch.full((2, 3), 1.0)}, tmp_path / "one.safetensors")
    save_file({"up": torch.full((2, 3), 2.0)}, tmp_path / "two.safetensors")
    index = read_index([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])
    fields = (FieldSpec("up", (2, 3), "float32"), FieldSpec("down", (2, 3), "float32"))
    sources = tuple(FieldSource((index[field.name],), ("float32",)) for field in fields)
    store = ExpertStore([LayerSource(ExpertSpec(0, "experts", 1, fields), (ScatteredExpert(sources),))])
    _, weights = bring_in(slots_of(store), FIRST)
    assert {name: view.unique().tolist() for name, view in weights.items()} == {"up": [2.0], "down": [1.0]}


def test_a_slot_is_seen_through_the_views_that_were_made_for_the_expert_before(tmp_path):
    """Experts of one file begin at the same place in a page where they are whole pages long."""
    store = stacked_store(tmp_path, {"0.weight": torch.randn(3, PAGE_BYTES // 4)})
    slots = slots_of(store)
    _, before = bring_in(slots, FIRST)
    _, after = bring_in(slots, ExpertId(0, 1))
    assert after is before


def test_slots_can_be_given_up_and_made_again(tmp_path):
    store = numbered_store(tmp_path, 1, 4)
    slots = slots_of(store, 3)
    bring_in(slots, FIRST, 2)
    slots.remove(2)
    slots.add(2)
    assert bring_in(slots, ExpertId(0, 3), 2)[1]["weight"].unique().tolist() == [number(ExpertId(0, 3))]


def test_a_slot_is_as_large_as_the_kind_of_expert_in_it(tmp_path):
    """Hot experts have larger records than the others."""
    stacks = {"0.weight": torch.randn(2, 5 * PAGE_BYTES // 4), "1.weight": torch.randn(2, 50 * PAGE_BYTES // 4)}
    store = stacked_store(tmp_path, stacks)
    slots = slots_of(store)
    for expert in [FIRST, ExpertId(1, 1), ExpertId(0, 1), ExpertId(1, 0)]:
        _, weights = bring_in(slots, expert)
        assert torch.equal(weights["weight"], stacks[f"{expert.layer}.weight"][expert.expert])
        assert slots._slots[0].nbytes <= weights["weight"].nbytes + 2 * PAGE_BYTES


@pytest.mark.usefixtures("way")
def test_a_file_that_shrank_is_told_and_read_again_once_it_is_whole(tmp_path):
    store = stacked_store(tmp_path, {"0.weight": torch.arange(6.0 * PAGE_BYTES).view(6, -1)})
    path = tmp_path / "model.safetensors"
    slots = slots_of(store)
    bring_in(slots, FIRST)
    with put_back(path) as content:
        cut_short(path, len(content) // 2)
        with pytest.raises(CheckpointError, match=r"ends at byte|has .* bytes, but had"):
            bring_in(slots, ExpertId(0, 5))
    assert bring_in(slots, ExpertId(0, 5))[1]["weight"][0] == 5 * PAGE_BYTES


def aligned_stack(path, rows):
    """Rows as a stored tensor that begins at a cache line, as the package writes records."""
    for padding in range(ALIGNMENT):
        save_file({"records": rows}, path, metadata={"padding": "-" * padding})
        stack = read_index([path])["records"]
        if stack.offset % ALIGNMENT == 0:
            return stack
    raise AssertionError("no header has the right length")


@pytest.mark.usefixtures("way")
def test_a_damaged_record_is_told_when_it_is_first_brought_in(tmp_path):
    layout = RecordLayout([FieldSpec("weight", (900,), "float32")])
    rows = torch.zeros(2, layout.row_bytes, dtype=torch.uint8)
    rows[:, : layout.nbytes] = torch.randint(256, (2, layout.nbytes), dtype=torch.uint8)
    stack = aligned_stack(tmp_path / "model.safetensors", rows)
    sums = [crc32(rows[0].numpy()), crc32(rows[1].numpy()) ^ 1]
    experts = tuple(RecordedExpert(stack.row(number, 2), checksum) for number, checksum in enumerate(sums))
    store = ExpertStore([LayerSource(ExpertSpec(0, "experts", 2, layout.fields), experts)])
    slots = slots_of(store)
    _, weights = bring_in(slots, FIRST)
    assert torch.equal(weights["weight"].view(torch.uint8), rows[0, :3600])
    with pytest.raises(CheckpointError, match="is damaged"):
        bring_in(slots, ExpertId(0, 1))


def test_threads_read_where_the_system_reads_while_it_is_told_to(tmp_path, monkeypatch):
    store = numbered_store(tmp_path, 1, 2)
    slots = slots_of(store)
    monkeypatch.setattr(AioQueue, "is_synchronous", True)
    monkeypatch.setattr(AioQueue, "start", refuse)
    assert bring_in(slots, ExpertId(0, 1))[1]["bias"].unique().tolist() == [number(ExpertId(0, 1))]
