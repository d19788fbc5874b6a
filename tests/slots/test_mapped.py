import os
import resource
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stores import cut_short, number, numbered_store, put_back, stacked_store, unopened
from transformers_moe_offload.bench.page_cache import drop
from transformers_moe_offload.disk_io import mapped_file, opened_file
from transformers_moe_offload.disk_io.file import FileRange, joined
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ExpertId, ExpertSpec, FieldSpec
from transformers_moe_offload.slots import mapped
from transformers_moe_offload.slots.mapped import MappedSlots
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.field_source import FieldSource
from transformers_moe_offload.store.layer_source import LayerSource, ScatteredExpert
from transformers_moe_offload.tensor_files.index import read_index

FIRST, SECOND = ExpertId(0, 0), ExpertId(0, 1)
needs_linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts mapped pages in /proc")


@pytest.fixture
def store(tmp_path):
    return numbered_store(tmp_path, 2, 4)


def slots_of(store, count=1):
    slots = MappedSlots(store, workers=1)
    for slot in range(count):
        slots.add(slot)
    return slots


def bring_in(slots, expert, slot=0):
    from_files = slots.start(expert, slot).finish()
    return from_files, slots.weights[slot]


def numbers_in(weights):
    return {value for tensor in weights.values() for value in tensor.flatten().tolist()}


def test_a_mapped_expert_is_the_expert_that_a_read_gives(store):
    slots = slots_of(store)
    for layer in range(2):
        for index in range(4):
            expert = ExpertId(layer, index)
            record = torch.empty(store.layout(layer, 0).nbytes, dtype=torch.uint8)
            assert bring_in(slots, expert)[0] == store.read_into(expert, record)
            read, mapped = store.layout(layer, 0).views(record), slots.weights[0]
            assert list(read) == list(mapped)
            assert all(torch.equal(read[name], mapped[name]) for name in read)
            assert all(read[name].dtype == mapped[name].dtype for name in read)


def test_nothing_is_copied(store):
    slots = slots_of(store, 2)
    one, other = bring_in(slots, FIRST, 0)[1], bring_in(slots, FIRST, 1)[1]
    assert all(one[name].data_ptr() == other[name].data_ptr() for name in one)


def test_writing_to_a_mapped_expert_does_not_reach_the_file(store, tmp_path):
    before = (tmp_path / "model.safetensors").read_bytes()
    bring_in(slots_of(store), FIRST)[1]["weight"].zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_mapped_expert_seen_in_inference_mode_can_be_copied_for_training(store):
    slots = slots_of(store)
    with torch.inference_mode():
        weights = bring_in(slots, FIRST)[1]
    x = torch.ones(3, requires_grad=True)
    (weights["weight"][0].clone() * x).sum().backward()
    assert x.grad.tolist() == [number(FIRST)] * 3


def cut(path):
    """Cut a file short, and give the change time to be noticed."""
    cut_short(path, 100)
    time.sleep(2 * opened_file.LOOK_EVERY)


class TestAFileThatChanges:
    def test_that_was_cut_short_is_told_by_its_two_sizes_and_works_again_when_it_is_back(self, store, tmp_path):
        """Touching pages that are gone would end the process."""
        path, slots = tmp_path / "model.safetensors", slots_of(store)
        bring_in(slots, FIRST)
        assert not slots.lost([0])
        with put_back(path) as whole:
            cut(path)
            assert slots.lost([0])
            for _ in range(2):
                with pytest.raises(CheckpointError, match=f"has 100 bytes, but had {len(whole):,}"):
                    slots.start(FIRST, 0).finish()
        assert numbers_in(bring_in(slots, FIRST)[1]) == {number(FIRST)}
        assert not slots.lost([0])

    def test_that_was_written_to_is_told_by_when(self, store, tmp_path):
        path, slots = tmp_path / "model.safetensors", slots_of(store, 2)
        bring_in(slots, FIRST)
        with put_back(path) as whole:
            path.write_bytes(whole[:-4] + b"----")
            time.sleep(2 * opened_file.LOOK_EVERY)
            assert slots.lost([0])
            for expert in (FIRST, SECOND):
                with pytest.raises(CheckpointError, match=r"was written at .* UTC, but had been at .* UTC\. Load"):
                    slots.start(expert, 1).finish()
        assert numbers_in(bring_in(slots, SECOND, 1)[1]) == {number(SECOND)}
        assert numbers_in(bring_in(slots, FIRST)[1]) == {number(FIRST)}

    def test_that_was_replaced_while_it_is_open_is_still_the_old_one(self, store, tmp_path):
        path, slots = tmp_path / "model.safetensors", slots_of(store, 2)
        bring_in(slots, FIRST)
        path.with_name("other").write_bytes(b"-" * path.stat().st_size)
        path.with_name("other").replace(path)
        assert numbers_in(bring_in(slots, SECOND, 1)[1]) == {number(SECOND)}
        assert numbers_in(bring_in(slots, FIRST)[1]) == {number(FIRST)}

    def test_that_was_replaced_before_it_is_mapped_is_told_by_its_inode(self, store, tmp_path):
        path, slots = tmp_path / "model.safetensors", slots_of(store)
        was = path.stat()
        path.rename(tmp_path / "first")
        path.write_bytes(b"-" * was.st_size)
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
        with pytest.raises(CheckpointError, match=rf"is inode \d+ of device \d+, but was inode {was.st_ino} of"):
            slots.start(FIRST, 0).finish()
        (tmp_path / "first").rename(path)
        assert numbers_in(bring_in(slots, FIRST)[1]) == {number(FIRST)}

    def test_that_is_gone_before_it_is_mapped_is_named(self, store, tmp_path):
        path, slots = tmp_path / "model.safetensors", slots_of(store)
        path.rename(tmp_path / "elsewhere")
        with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors: No such file"):
            slots.start(FIRST, 0).finish()
        (tmp_path / "elsewhere").rename(path)
        assert numbers_in(bring_in(slots, FIRST)[1]) == {number(FIRST)}


def test_an_expert_in_two_files_is_copied(tmp_path):
    """As the last expert of a file often is: its gate projection in one, its up projection in the next."""
    save_file({"gate": torch.full((2, 3), 1.0)}, tmp_path / "one.safetensors")
    save_file({"up": torch.full((2, 3), 2.0)}, tmp_path / "two.safetensors")
    index = read_index([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])
    fields = (FieldSpec("gate_up", (4, 3), "float32"),)
    split = FieldSource((index["gate"], index["up"]), ("float32",))
    store = ExpertStore([LayerSource(ExpertSpec(0, "experts", 1, fields), (ScatteredExpert((split,)),))])
    assert store.file_ranges(FIRST) is None
    assert not store.is_as_used(0)
    from_files, weights = bring_in(slots_of(store), FIRST)
    assert from_files == 48
    assert weights["gate_up"].tolist() == [[1.0] * 3] * 2 + [[2.0] * 3] * 2


def test_what_has_to_be_cast_or_assembled_is_not_used_where_it_lies(store):
    assert store.is_as_used(0)
    assert not ExpertStore([store.layers[0].cast("float16")]).is_as_used(0)


@pytest.fixture
def large_store(tmp_path):
    return stacked_store(tmp_path, {"0.weight": torch.ones(4, 1 << 11, 1 << 10)})  # 8 MiB an expert


def mapped_bytes(path):
    """Bytes of a file that this process has mapped and touched."""
    total, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            is_ours = line.endswith(str(path))
        elif is_ours and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


@needs_linux
def test_a_slot_that_is_given_up_unmaps_its_expert(large_store, tmp_path):
    """And what the kernel mapped around it, which is less than 2 MiB on either side, may stay."""
    path, slots = tmp_path / "model.safetensors", slots_of(large_store, 2)
    bring_in(slots, ExpertId(0, 0), 0)
    bring_in(slots, ExpertId(0, 2), 1)
    assert 16 <= mapped_bytes(path) / 2**20 <= 16 + 6
    slots.remove(0)
    assert 8 <= mapped_bytes(path) / 2**20 <= 8 + 6


@needs_linux
def test_an_expert_whose_pages_the_kernel_took_back_is_not_there(large_store, tmp_path):
    slots = slots_of(large_store, 2)
    bring_in(slots, ExpertId(0, 0), 0)
    bring_in(slots, ExpertId(0, 2), 1)
    slots.remove(1)  # unmapped, or the kernel would not drop its pages
    slots.add(1)
    assert not slots.lost([0])
    os.sync()
    drop([tmp_path / "model.safetensors"])
    time.sleep(2 * mapped._SURELY_THERE)
    assert slots.lost([0])
    bring_in(slots, ExpertId(0, 0), 0)
    assert not slots.lost([0])


def test_matrices_side_by_side_in_a_file_are_brought_in_as_one():
    one, other = unopened("one", 100), unopened("other", 100)
    ranges = [FileRange(one, 30, 40), FileRange(other, 40, 50), FileRange(one, 10, 30), FileRange(one, 50, 60)]
    assert sorted(joined(ranges), key=lambda s: (s.file.path, s.start)) == [
        FileRange(one, 10, 40),
        FileRange(one, 50, 60),
        FileRange(other, 40, 50),
    ]


@needs_linux
def test_an_expert_that_has_come_in_causes_no_page_faults(large_store):
    weights = bring_in(slots_of(large_store), SECOND)[1]
    weights["weight"][:1].sum()
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    weights["weight"].view(-1)[::1024].sum()
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 64, "there are 2048 pages"


def test_without_the_advice_of_linux_pages_are_touched(store, monkeypatch):
    monkeypatch.setattr(mapped_file, "_libc", lambda **how: None)
    slots = slots_of(store)
    for expert in (FIRST, SECOND):
        assert numbers_in(bring_in(slots, expert)[1]) == {number(expert)}


@needs_linux
def test_who_has_left_is_unmapped_when_memory_is_to_be_given_back_and_who_returned_stays(large_store, tmp_path):
    path, slots = tmp_path / "model.safetensors", slots_of(large_store)
    one, other = ExpertId(0, 0), ExpertId(0, 2)
    bring_in(slots, one)
    bring_in(slots, other)
    assert 16 <= mapped_bytes(path) / 2**20 <= 16 + 6
    slots.give_back()
    assert 8 <= mapped_bytes(path) / 2**20 <= 8 + 6
    assert not slots.lost([0])
    bring_in(slots, one)
    bring_in(slots, other)
    bring_in(slots, one)
    slots.give_back()
    assert not slots.lost([0])
    assert numbers_in(slots.weights[0]) == {1.0}
    assert 8 <= mapped_bytes(path) / 2**20 <= 8 + 6
