"""What bandwidth is measured with: exactly the bytes of the experts, in as few ranges as they lie in."""

import os
import sys

import pytest
import torch

from stores import numbered_store
from transformers_moe_offload.bench.bandwidth import disk_bandwidth, expert_ranges, ram_bandwidth, sample
from transformers_moe_offload.bench.layers import files_of, store_of
from transformers_moe_offload.bench.page_cache import drop, resident_share, warm
from transformers_moe_offload.disk_io.file import File, FileRange
from transformers_moe_offload.expert import ExpertId


def test_an_expert_that_lies_in_one_piece_is_one_range(model):
    store = store_of(model)
    ranges = expert_ranges(store)
    assert len(ranges) == model.moe_offload.plan.num_experts
    assert {found.nbytes for found in ranges} == {store.stored_bytes(ExpertId(0, 0))}


def test_stacked_tensors_of_an_expert_are_ranges_of_their_own(tmp_path):
    store = numbered_store(tmp_path, num_layers=2, num_experts=4)
    ranges = expert_ranges(store)
    assert len(ranges) == 2 * 4 * 2
    assert sum(found.nbytes for found in ranges) == 8 * store.stored_bytes(ExpertId(0, 0))


def test_a_sample_is_spread_evenly_and_no_larger_than_asked(tmp_path):
    (tmp_path / "file").touch()
    file = File.now(tmp_path / "file")
    ranges = [FileRange(file, start, start + 10) for start in range(0, 1000, 10)]
    chosen = sample(ranges, most_bytes=250)
    assert sum(found.nbytes for found in chosen) <= 250
    assert [found.start for found in chosen] == list(range(0, 1000, 40))
    assert sample(ranges, most_bytes=10_000) == ranges


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be asked to forget files")
def test_cold_reads_begin_with_nothing_in_the_page_cache(tmp_path):
    store = numbered_store(tmp_path, num_layers=2, num_experts=4)
    os.sync()  # what has not been written yet is not forgotten
    found = disk_bandwidth(expert_ranges(store), threads=2, repeats=1)
    assert found["cached_share_before_cold"] == 0
    assert found["cold_bytes_per_s"] > 0
    assert found["warm_bytes_per_s"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be asked to forget files")
def test_files_go_into_the_page_cache_and_out_of_it(tmp_path):
    file = tmp_path / "file"
    with file.open("wb") as stream:
        stream.write(bytes(1 << 20))
        stream.flush()
        os.fsync(stream.fileno())
    warm([file])
    assert resident_share([file]) == 1
    drop([file])
    assert resident_share([file]) == 0


def test_all_files_with_experts_are_named(model):
    assert [file.name for file in files_of(store_of(model))] == [
        f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)
    ]


def test_ram_is_measured_with_a_copy_and_a_matvec(monkeypatch):
    monkeypatch.setattr("transformers_moe_offload.bench.bandwidth.RAM_BYTES", 1 << 20)
    found = ram_bandwidth(torch.bfloat16, columns=96, repeats=1)
    assert found.keys() == {"copy_bytes_per_s", "matvec_bytes_per_s"}
    assert min(found.values()) > 0
