"""Experts used where they lie in the page cache: the same model, bit for bit, as with copies in slots."""

import json
import shutil
import time
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stores import cut_short, put_back
from transformers_moe_offload import ConfigError, OffloadConfig
from transformers_moe_offload.disk_io import reader_pool
from transformers_moe_offload.disk_io.mapped_file import MappedFile
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hf.model import planning
from transformers_moe_offload.slots import inline_reads

from .conftest import TINY_MOE

BUDGETS = ["8%", "50%", "100%"]


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, moe_offload=OffloadConfig(**options))


@torch.no_grad()
def logits(model, token_ids):
    return model(input_ids=token_ids).logits


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("arithmetic", ["exact", "fast"])
def test_mapped_and_copied_experts_give_the_same_bits(budget, arithmetic, token_ids):
    mapped, copied = (
        load(TINY_MOE, cache_budget=budget, arithmetic=arithmetic, mmap=choice) for choice in (True, False)
    )
    assert all(pool.is_mapped for pool in mapped.moe_offload.plan.pools)
    assert not any(pool.is_mapped for pool in copied.moe_offload.plan.pools)
    for ids in (token_ids, token_ids[:1, :1], token_ids[:, :2]):
        assert torch.equal(logits(mapped, ids), logits(copied, ids))
    counts = [(s.hits, s.misses, s.disk_bytes) for s in (mapped.moe_offload.stats(), copied.moe_offload.stats())]
    assert counts[0] == counts[1]


def test_reading_past_the_page_cache_gives_the_same_bits(token_ids):
    past, through = (load(TINY_MOE, cache_budget="25%", mmap=False, direct_io=choice) for choice in (True, False))
    assert "read past the page cache" in str(past.moe_offload.plan)
    assert torch.equal(logits(past, token_ids), logits(through, token_ids))
    assert past.moe_offload.stats().disk_bytes == through.moe_offload.stats().disk_bytes > 0


@pytest.mark.parametrize("is_faster", [True, False])
def test_where_ram_is_short_a_trial_decides_what_files_are_read_past(is_faster, token_ids, monkeypatch):
    expected = logits(load(TINY_MOE, cache_budget="25%", mmap=False, direct_io=False), token_ids)
    monkeypatch.setattr(planning, "page_cache_holds", lambda nbytes: False)
    monkeypatch.setattr(planning, "is_faster_past_cache", lambda store: is_faster)
    model = load(TINY_MOE, cache_budget="25%")
    assert ("read past the page cache" in str(model.moe_offload.plan)) is is_faster
    assert torch.equal(logits(model, token_ids), expected)
    monkeypatch.setattr(planning, "page_cache_holds", lambda nbytes: True)
    model.moe_offload.resize("30%")
    assert model.moe_offload.plan.reads_past_cache is is_faster, "the files are read as before"


@pytest.mark.parametrize(("workers", "past_cache"), [(1, False), (2, True), (4, False), (4, True)])
def test_experts_read_in_chunks_give_the_same_bits(workers, past_cache, token_ids, monkeypatch):
    expected = logits(load(TINY_MOE, cache_budget="100%", mmap=False, direct_io=False), token_ids)
    monkeypatch.setattr(reader_pool, "LEAST_CHUNK", 5000)  # a record has 108 KiB
    monkeypatch.setattr(inline_reads, "SMALL_BYTES", 0)
    for budget in ("2%", "25%"):
        model = load(TINY_MOE, cache_budget=budget, mmap=False, direct_io=past_cache, io_workers=workers)
        assert torch.equal(logits(model, token_ids), expected)
        for column in range(4):  # few tokens: few experts are on their way together
            assert torch.equal(logits(model, token_ids[:1, column : column + 1]), single(column, token_ids))


@cache
def model_of_everything():
    return load(TINY_MOE, cache_budget="100%", mmap=False, direct_io=False)


def single(column, token_ids):
    return logits(model_of_everything(), token_ids[:1, column : column + 1])


def test_experts_are_mapped_where_there_is_ram_to_spare_and_copied_where_there_is_none(monkeypatch):
    assert "cpu (mapped)" in str(load(TINY_MOE, cache_budget="50%").moe_offload.plan)
    monkeypatch.setattr(planning, "page_cache_holds", lambda nbytes: False)
    assert "mapped" not in str(load(TINY_MOE, cache_budget="50%").moe_offload.plan)


def test_a_model_moves_from_mapped_to_copied_experts_with_its_dtype(token_ids):
    model = load(TINY_MOE, cache_budget="50%")
    model.to(torch.float32)
    assert not any(pool.is_mapped for pool in model.moe_offload.plan.pools), "the files hold bfloat16"
    plain = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32)
    assert torch.allclose(logits(model, token_ids), logits(plain, token_ids), atol=1e-4)


def test_insisting_where_it_cannot_be_done_is_an_error_that_says_why():
    with pytest.raises(ConfigError, match=r"mmap=True, but the experts of model\.layers\.0\.mlp\.experts cannot"):
        AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32, moe_offload=OffloadConfig(mmap=True))


def test_resizing_keeps_residents_mapped(token_ids):
    model = load(TINY_MOE, cache_budget="50%")
    expected = logits(model, token_ids)
    for budget in ("100%", "5%", "75%"):
        model.moe_offload.resize(budget)
        assert "cpu (mapped)" in str(model.moe_offload.plan)
        assert torch.equal(logits(model, token_ids), expected)


def test_gradients_are_those_of_copied_experts(token_ids):
    grads = []
    for choice in (True, False):
        model = load(TINY_MOE, cache_budget="25%", mmap=choice)
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        grads.append(model.model.layers[0].mlp.gate.weight.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("arithmetic", ["fast", "exact"])
def test_who_leaves_the_cache_is_unmapped_in_training_and_stays_mapped_otherwise(arithmetic, token_ids, monkeypatch):
    unmapped, let_go = [], MappedFile.let_go

    def counted(self, start, stop):
        unmapped.append(stop - start)
        let_go(self, start, stop)

    monkeypatch.setattr(MappedFile, "let_go", counted)
    model = load(TINY_MOE, cache_budget="25%", mmap=True, arithmetic=arithmetic)
    logits(model, token_ids)
    assert not unmapped
    loss = model(input_ids=token_ids, labels=token_ids).loss
    after_forward = sum(unmapped)
    loss.backward()
    assert 0 < after_forward < sum(unmapped)


def test_a_file_cut_short_while_its_experts_are_mapped_fails_the_forward_and_not_the_process(tmp_path, token_ids):
    folder = shutil.copytree(TINY_MOE, tmp_path / "own")
    _gather_experts(folder, folder / "experts.safetensors")
    model = load(folder, mmap=True, cache_budget="100%")
    expected = logits(model, token_ids)
    shard = folder / "experts.safetensors"
    with put_back(shard) as whole:
        cut_short(shard, 1000)
        time.sleep(0.1)  # a mapped file is looked at a hundred times a second
        with pytest.raises(CheckpointError, match=f"has 1,000 bytes, but had {len(whole):,}"):
            logits(model, token_ids)
    assert torch.equal(logits(model, token_ids), expected)


def _gather_experts(folder, target):
    """Move all experts into a file of their own: Transformers maps dense weights from theirs, and cutting those would
    take the process down, us or not."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    experts = {}
    for file in set(index["weight_map"].values()):
        tensors = load_file(folder / file)
        experts |= {name: tensors.pop(name) for name in list(tensors) if ".experts." in name}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    save_file(experts, target, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(experts, target.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
