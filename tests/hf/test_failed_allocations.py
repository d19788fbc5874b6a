"""An allocation that fails, whichever it is, leaves a model that works as before."""

import itertools
import threading
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from scarcity import Scarce
from slots.test_page_locked import Runtime
from stores import numbered_store
from transformers_moe_offload import OffloadConfig
from transformers_moe_offload.device_decode import arena
from transformers_moe_offload.hf.decode.engines import build_engines
from transformers_moe_offload.hf.model.placements import Placement
from transformers_moe_offload.hf.model.planning import make_plan
from transformers_moe_offload.system import host_memory

ERRORS = [MemoryError("no memory"), torch.OutOfMemoryError("no memory"), RuntimeError("no memory"), OSError(12, "none")]

WAYS = {
    "copied": {"mmap": False},
    "past the page cache": {"mmap": False, "direct_io": True},
    "mapped": {"mmap": "auto"},
}


def load(checkpoint, budget="50%", **options):
    config = OffloadConfig(cache_budget=budget, arithmetic="exact", **options)
    return AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config)


@torch.no_grad()
def logits(model, token_ids):
    return model(input_ids=token_ids).logits


def failures(scarce, work):
    """Do some work again and again, each time with another of its allocations refused, until all are granted."""
    for at in itertools.count(1):
        scarce.refuse(at)
        try:
            work()
        except tuple(map(type, ERRORS)):
            scarce.refuse(None)
            yield at
            continue
        scarce.refuse(None)
        if scarce.count < at:
            return


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_cache_that_cannot_grow_stays_as_it_was_and_can_grow_later(
    checkpoint, token_ids, expected, monkeypatch, error, way
):
    monkeypatch.setattr(host_memory, "AREA_BYTES", 1)  # every slot is an allocation of its own
    model = load(checkpoint, "25%", **WAYS[way])
    assert torch.equal(logits(model, token_ids), expected)
    before = model.moe_offload.plan, model.moe_offload.config
    scarce, number = Scarce(monkeypatch, error), 0
    for _ in failures(scarce, lambda: model.moe_offload.resize("75%")):
        number += 1
        assert (model.moe_offload.plan, model.moe_offload.config) == before
        assert [cache.residency.num_slots for cache in model.moe_offload._caches.all()] == [
            pool.num_slots for pool in before[0].pools
        ]
        assert torch.equal(logits(model, token_ids), expected)
        if number == 5:
            break
    assert number or way != "copied"
    model.moe_offload.resize("75%")
    assert model.moe_offload.plan.num_slots > before[0].num_slots
    assert torch.equal(logits(model, token_ids), expected)


@pytest.mark.parametrize("way", WAYS)
def test_caches_that_cannot_be_built_are_built_at_the_next_forward(checkpoint, token_ids, monkeypatch, way):
    model = load(checkpoint, "25%", **WAYS[way])
    right = logits(model.to(torch.bfloat16), token_ids)
    scarce, number = Scarce(monkeypatch), 0

    def rebuilt():
        model.to(torch.float32)
        logits(model.to(torch.bfloat16), token_ids)

    for _ in failures(scarce, rebuilt):
        number += 1
        assert torch.equal(logits(model.to(torch.bfloat16), token_ids), right)
        if number == 40:
            break
    assert number > 3


def test_a_trace_whose_caches_cannot_be_built_can_be_begun_again(checkpoint, token_ids, monkeypatch):
    model = load(checkpoint, mmap=False)
    model.to(torch.bfloat16)
    scarce = Scarce(monkeypatch)
    scarce.refuse(1)
    with pytest.raises(MemoryError), model.moe_offload.trace():
        pass
    scarce.refuse(None)
    with model.moe_offload.trace() as trace:
        logits(model, token_ids)
    assert trace.visits


def test_page_locked_memory_is_given_back_where_there_is_none_for_slots(tmp_path, monkeypatch):
    """The slots are asked of a GPU that is not there."""
    if torch.cuda.is_available():
        pytest.skip("the slots would be had")
    runtime = Runtime(granted=1 << 20)
    runtime.install(monkeypatch)
    monkeypatch.setattr(arena, "why_not_readable", lambda device: None)
    store = numbered_store(tmp_path, 2, 8)
    config = OffloadConfig(cache_budget="50%", host_budget="100%")
    placements = [Placement(source.spec, torch.device("cuda", 0)) for source in store.layers.values()]
    plan = make_plan([replace(placement, is_addressed=True) for placement in placements], config)
    assert plan.arena_bytes
    with pytest.raises((AssertionError, RuntimeError)):
        build_engines(plan, list(store.layers.values()), config)
    assert runtime.locked == {}


def test_two_threads_that_resize_do_so_one_after_the_other(checkpoint, token_ids, expected):
    model = load(checkpoint, "25%", mmap=False)
    budgets, together = ["25%", "100%"], threading.Barrier(2)

    def resize(budget):
        for _ in range(20):
            together.wait(30)
            model.moe_offload.resize(budget)

    threads = [threading.Thread(target=resize, args=(budget,)) for budget in budgets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plan = model.moe_offload.plan
    assert [cache.residency.num_slots for cache in model.moe_offload._caches.all()] == [p.num_slots for p in plan.pools]
    alike = load(checkpoint, model.moe_offload.config.cache_budget, mmap=False)
    assert plan.num_slots == alike.moe_offload.plan.num_slots
    assert torch.equal(logits(model, token_ids), expected)


@pytest.mark.parametrize("error", [*ERRORS[:2], RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=repr)
def test_a_model_that_is_loaded_without_memory_to_probe_it_is_not_computed_in_a_slower_way(
    checkpoint, monkeypatch, error
):
    """The probe draws random numbers; that there is no memory for them says nothing about the model."""

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "randn", refuse)
    with pytest.raises(type(error), match=r"no memory|can't allocate"):
        AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=OffloadConfig(cache_budget="50%"))
