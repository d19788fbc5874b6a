"""Filling the arena, and what happens when files or the system do not play along."""

import threading
from itertools import pairwise
from zlib import crc32

import pytest
import torch
from safetensors.torch import save_file

from slots.test_page_locked import Runtime
from stores import numbered_store
from transformers_moe_offload.device_decode import arena as arena_module
from transformers_moe_offload.device_decode.arena import Arena
from transformers_moe_offload.errors import CheckpointError, ConfigError
from transformers_moe_offload.expert import ExpertId, ExpertSpec, FieldSpec
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.layer_source import LayerSource, RecordedExpert
from transformers_moe_offload.store.ram_file import RamFile
from transformers_moe_offload.store.record import RecordLayout
from transformers_moe_offload.system.host_memory import host_bytes
from transformers_moe_offload.tensor_files.index import StoredTensor, read_index

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NUM_LAYERS, NUM_EXPERTS = 3, 8
ALL_EXPERTS = [ExpertId(layer, e) for layer in range(NUM_LAYERS) for e in range(NUM_EXPERTS)]


@pytest.fixture
def store(tmp_path):
    return numbered_store(tmp_path, NUM_LAYERS, NUM_EXPERTS)


@pytest.fixture
def runtime(monkeypatch):
    """A GPU, as far as the arena is concerned, that locks a mebibyte at most."""
    runtime = Runtime(granted=1 << 20)
    runtime.install(monkeypatch)
    monkeypatch.setattr(arena_module, "why_not_readable", lambda device: None)
    return runtime


def record_of(store, expert):
    record = torch.zeros(store.layout(*expert).nbytes, dtype=torch.uint8)
    store.read_into(expert, record)
    return record


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("block_bytes", [1, 500, 1 << 30])
def test_every_expert_is_there_at_its_address(store, monkeypatch, workers, block_bytes):
    monkeypatch.setattr(arena_module, "BLOCK_BYTES", block_bytes)
    arena = Arena(store, range(NUM_LAYERS), CPU, workers=workers)
    for expert in ALL_EXPERTS:
        assert torch.equal(arena.record(expert), record_of(store, expert))
        assert arena.addresses(expert.layer)[expert.expert] == arena.record(expert).data_ptr()
        assert arena.record(expert).data_ptr() % 16 == 0
    assert arena.nbytes == sum(arena.record(expert).nbytes for expert in ALL_EXPERTS)


def test_no_two_experts_share_a_byte(store):
    arena = Arena(store, range(NUM_LAYERS), CPU)
    spans = sorted(
        (arena.record(e).data_ptr(), arena.record(e).data_ptr() + arena.record(e).nbytes) for e in ALL_EXPERTS
    )
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_progress_is_told_in_bytes(store):
    told = []
    arena = Arena(store, range(NUM_LAYERS), CPU, workers=2, advance=told.append)
    assert len(told) == len(ALL_EXPERTS)
    assert sum(told) == arena.nbytes


def test_some_layers_only(store):
    arena = Arena(store, [1], CPU)
    assert arena.nbytes == NUM_EXPERTS * store.layout(1, 0).nbytes
    assert len(arena.addresses(1)) == NUM_EXPERTS


def test_a_budget_that_is_too_small_is_refused_with_both_numbers_and_before_anything_is_read(store):
    needed = len(ALL_EXPERTS) * store.layout(0, 0).nbytes
    told = []
    with pytest.raises(
        ConfigError, match=rf"takes {needed:,} bytes; host_budget allows {needed - 1:,}\. Set .*host_bud"
    ):
        Arena(store, range(NUM_LAYERS), CPU, budget_bytes=needed - 1, advance=told.append)
    assert told == []
    assert Arena(store, range(NUM_LAYERS), CPU, budget_bytes=needed).nbytes == needed


def test_on_a_gpu_all_of_it_is_page_locked_until_it_is_closed(store, runtime):
    arena = Arena(store, range(NUM_LAYERS), GPU)
    assert sum(runtime.locked.values()) == arena.nbytes
    arena.close()
    assert runtime.locked == {}
    arena.close()


def test_page_locked_memory_refused_half_way_is_given_back_and_both_numbers_are_told(store, runtime, monkeypatch):
    one = store.layout(0, 0).nbytes
    monkeypatch.setattr(arena_module, "BLOCK_BYTES", 4 * one)
    runtime.granted = 10 * one
    with pytest.raises(
        ConfigError, match=rf"needs {24 * one:,} bytes of page-locked .* granted {8 * one:,} \(.*out of mem"
    ):
        Arena(store, range(NUM_LAYERS), GPU)
    assert runtime.locked == {}


def test_a_gpu_that_cannot_read_such_memory_is_told_before_any_is_taken(store, runtime, monkeypatch):
    monkeypatch.setattr(arena_module, "why_not_readable", lambda device: "the GPU is too old for it")
    with pytest.raises(ConfigError, match=r"granted 0 \(the GPU is too old for it\)"):
        Arena(store, range(NUM_LAYERS), GPU)
    assert runtime.locked == {}


def truncate(file):
    file.write_bytes(file.read_bytes()[:-40])


def remove(file):
    file.unlink()


@pytest.mark.parametrize("harm", [truncate, remove])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_file_that_is_short_or_gone_is_one_error_of_ours_and_nothing_is_kept(store, tmp_path, runtime, harm, workers):
    harm(tmp_path / "model.safetensors")
    threads = threading.active_count()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Arena(store, range(NUM_LAYERS), GPU, workers=workers)
    assert runtime.locked == {}
    assert threading.active_count() <= threads + workers


def recorded_store(folder, damaged=()):
    """One layer whose experts were written as records with checksums; some are not what was written."""
    fields = (FieldSpec("weight", (5, 7), "float32"),)
    layout = RecordLayout(fields)
    rows = torch.randint(0, 256, (6, layout.row_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows[:, layout.nbytes :] = 0
    sums = [crc32(row.numpy().tobytes()) for row in rows]
    for expert in damaged:
        rows[expert, 3] ^= 1
    save_file({"records": rows}, folder / "records.safetensors")
    stack = read_index([folder / "records.safetensors"])["records"]
    experts = tuple(RecordedExpert(stack.row(e, 6), total) for e, total in enumerate(sums))
    return ExpertStore([LayerSource(ExpertSpec(0, "experts", 6, fields), experts)]), rows


def test_checksums_are_compared(tmp_path, runtime):
    store, rows = recorded_store(tmp_path)
    arena = Arena(store, [0], GPU, workers=2)
    for expert, row in enumerate(rows):
        record = arena.record(ExpertId(0, expert))
        assert torch.equal(record, row[: record.nbytes])


@pytest.mark.parametrize("expert", [0, 3, 5])
def test_a_record_with_another_checksum_is_refused_and_nothing_is_kept(tmp_path, runtime, expert):
    store, _ = recorded_store(tmp_path, damaged=[expert])
    with pytest.raises(CheckpointError, match="is damaged"):
        Arena(store, [0], GPU, workers=2)
    assert runtime.locked == {}


def test_an_interruption_leaves_nothing_behind(store, runtime):
    def interrupt(nbytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Arena(store, range(NUM_LAYERS), GPU, workers=2, advance=interrupt)
    assert runtime.locked == {}


def quantized_in_ram(store):
    """The same experts as records in a file in RAM, but those of the last layer."""
    sources = [store.layers[layer] for layer in range(NUM_LAYERS)]
    for layer in range(NUM_LAYERS - 1):
        row_bytes = store.layout(layer, 0).row_bytes
        file = RamFile("experts", NUM_EXPERTS * row_bytes)
        for e in range(NUM_EXPERTS):
            file.write(host_bytes(record_of(store, ExpertId(layer, e))), e * row_bytes)
        rows = [StoredTensor("experts", file, e * row_bytes, "uint8", (row_bytes,)) for e in range(NUM_EXPERTS)]
        sources[layer] = LayerSource(sources[layer].spec, tuple(map(RecordedExpert, rows)))
    return ExpertStore(sources)


def test_experts_that_are_in_ram_already_are_locked_where_they_are_and_not_read_again(store, runtime, monkeypatch):
    in_ram, told = quantized_in_ram(store), []
    arena = Arena(in_ram, range(NUM_LAYERS), GPU, advance=told.append)
    for expert in ALL_EXPERTS:
        assert torch.equal(arena.record(expert), record_of(store, expert))
        assert arena.record(expert).data_ptr() % 64 == 0
    assert len(told) == NUM_EXPERTS
    files = {in_ram.in_ram(expert)[0] for expert in ALL_EXPERTS if in_ram.in_ram(expert)}
    assert sorted(runtime.locked.values()) == sorted([sum(told), *(file.nbytes for file in files)])
    (file, start) = in_ram.in_ram(ExpertId(1, 2))
    file.write(memoryview(b"changed"), start)
    assert bytes(arena.record(ExpertId(1, 2))[:7].numpy()) == b"changed", "it is the same memory"
    arena.close()
    assert runtime.locked == {}
