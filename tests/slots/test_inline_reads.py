"""Small experts: copied where the page cache has them, announced where it has not, and never by another thread."""

import os

import pytest
import torch

from stores import cut_short, numbered_store, put_back, stacked_store
from transformers_moe_offload.bench.page_cache import drop, resident_share, warm
from transformers_moe_offload.disk_io import reader_pool
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.slots import inline_reads
from transformers_moe_offload.slots.inline_reads import Announced, InlineReads
from transformers_moe_offload.slots.transfer import HostCopier, Landed

FIRST = ExpertId(0, 0)
needs_nowait = pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="reads without waiting are Linux's")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def store(tmp_path):
    return stacked_store(tmp_path, {"0.weight": torch.arange(4.0).repeat_interleave(1 << 14).view(4, 128, 128)})


def slot_for(store, expert=FIRST):
    return torch.zeros(store.layout(*expert).nbytes, dtype=torch.uint8)


def value_in(slot):
    (value,) = set(slot.view(torch.float32).tolist())
    return value


def make_cold(path):
    os.sync()
    drop([path])
    if resident_share([path]) > 0:
        pytest.skip("this filesystem keeps the file in memory")


@needs_nowait
def test_what_the_page_cache_has_is_there_at_once(store, path):
    warm([path])
    slot = slot_for(store)
    transfer = InlineReads(store).start(ExpertId(0, 3), slot)
    assert isinstance(transfer, Landed)
    assert value_in(slot) == 3.0
    assert transfer.finish() == 1 << 16


@needs_nowait
def test_what_it_has_not_is_fetched_meanwhile_and_there_when_it_is_waited_for(store, path):
    make_cold(path)
    slot = slot_for(store)
    transfer = InlineReads(store).start(ExpertId(0, 2), slot)
    assert isinstance(transfer, Announced)
    assert transfer.finish() == 1 << 16
    assert value_in(slot) == 2.0
    assert transfer.seconds > 0


@needs_nowait
def test_one_that_was_fetched_meanwhile_is_done(store, path):
    make_cold(path)
    slot = slot_for(store)
    transfer = InlineReads(store).start(ExpertId(0, 2), slot)
    warm([path])
    assert transfer.is_done()
    assert value_in(slot) == 2.0
    assert not transfer.cancel()
    slot.fill_(7)
    assert transfer.finish() == 1 << 16
    assert set(slot.tolist()) == {7}, "it is not read twice"


@needs_nowait
def test_one_that_nobody_has_read_can_be_given_up(store, path):
    make_cold(path)
    slot = slot_for(store)
    assert InlineReads(store).start(FIRST, slot).cancel()
    assert set(slot.tolist()) == {0}


def test_large_ones_and_those_read_past_the_page_cache_take_a_thread(store, path, monkeypatch):
    warm([path])
    store.past_cache = True
    assert InlineReads(store).start(FIRST, slot_for(store)) is None
    store.past_cache = False
    monkeypatch.setattr(inline_reads, "SMALL_BYTES", slot_for(store).nbytes - 1)
    assert InlineReads(store).start(FIRST, slot_for(store)) is None


def test_those_that_have_to_be_cast_take_a_thread(tmp_path):
    store = numbered_store(tmp_path, 1, 2)
    cast = type(store)([store.layers[0].cast("float16")])
    assert InlineReads(cast).start(FIRST, slot_for(cast)) is None


def test_without_reads_that_do_not_wait_they_are_waited_for(store, path, monkeypatch):
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    warm([path])
    slot = slot_for(store)
    transfer = InlineReads(store).start(ExpertId(0, 1), slot)
    assert not transfer.is_done()
    transfer.finish()
    assert value_in(slot) == 1.0


def test_where_the_system_cannot_be_told_of_reads_to_come_they_take_a_thread(store, path, monkeypatch):
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    store.layers[0].experts[0].pieces[0].file.close()
    slot = slot_for(store)
    copier = HostCopier(store.fill, 1, InlineReads(store).start)
    copier.start(ExpertId(0, 3), slot).finish()
    assert value_in(slot) == 3.0


def test_a_copier_reads_small_experts_without_threads(store, path, monkeypatch):
    monkeypatch.setattr(reader_pool, "start_new_thread", None)
    copier = HostCopier(store.fill, 2, InlineReads(store).start)
    for cold in (False, True):
        for expert in range(4):
            if cold:
                make_cold(path)
            slot = slot_for(store)
            copier.start(ExpertId(0, expert), slot).finish()
            assert value_in(slot) == expert


def test_a_file_that_was_cut_short_is_told_when_the_expert_is_waited_for_and_not_before(store, path):
    slot = slot_for(store)
    with put_back(path) as whole:
        cut_short(path, len(whole) - 10)
        transfer = HostCopier(store.fill, 1, InlineReads(store).start).start(ExpertId(0, 3), slot)
        with pytest.raises(CheckpointError, match=f"has {len(whole) - 10:,} bytes|ends at byte {len(whole) - 10:,}"):
            transfer.finish()
    HostCopier(store.fill, 1, InlineReads(store).start).start(ExpertId(0, 3), slot).finish()
    assert value_in(slot) == 3.0


def test_a_file_that_is_gone_is_told_when_the_expert_is_waited_for(tmp_path):
    store = numbered_store(tmp_path, 1, 2)
    (tmp_path / "model.safetensors").unlink()
    transfer = HostCopier(store.fill, 1, InlineReads(store).start).start(FIRST, slot_for(store))
    with pytest.raises(CheckpointError, match="cannot read"):
        transfer.finish()
