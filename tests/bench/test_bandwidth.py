"""What bandwidth is measured with: exactly the bytes of the experts, in as few ranges as they lie in."""

import os
import re
import sys

import pytest

from stores import numbered_store
from transformers_moe_offload.bench.bandwidth import (
    disk_bandwidth,
    expert_ranges,
    ram_bandwidth,
    read_bandwidth,
    sample,
)
from transformers_moe_offload.bench.layers import files_of, store_of
from transformers_moe_offload.bench.page_cache import drop, resident_share, warm
from transformers_moe_offload.disk_io.file import File, FileRange
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.kernels import native


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


def test_ram_is_measured_with_a_copy_and_the_fastest_way_to_read_it(monkeypatch):
    monkeypatch.setattr("transformers_moe_offload.bench.bandwidth.RAM_BYTES", 1 << 20)
    found = ram_bandwidth(repeats=1)
    assert found["copy_bytes_per_s"] > 0
    assert found["read_bytes_per_s"] > 0
    assert re.fullmatch(r"a matvec in torch|[1248] at a time from (ordinary|huge) pages", found["fastest_read"])


def test_without_the_compiled_kernels_ram_is_read_by_a_matvec(monkeypatch):
    monkeypatch.setattr(native, "native", lambda: native.Native(None, missing="a compiler"))
    assert read_bandwidth(1 << 20, repeats=1).way == "a matvec in torch"


def test_the_fastest_way_counts_by_the_clock_that_is_given():
    """The sixth thing that is timed takes a quarter of a second of this clock, all others a second."""
    times = [second + part for second in range(1000) for part in (0.0, 0.25 if second == 5 else 1.0)]
    found = read_bandwidth(1 << 20, repeats=1, clock=iter(times).__next__)
    assert found == (4 << 20, "1 at a time from huge pages" if native.library() else "a matvec in torch")
