"""Models with quantized weights, saved and loaded again."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from forked import with_locks_of_its_own
from transformers_moe_offload import CheckpointError, ConfigError, ExpertFormats, HqqFormat, OffloadConfig, restore
from transformers_moe_offload.hf.prebuilt.layout import MARKS
from transformers_moe_offload.output.place import recover
from zoo.build import build, failure_of_stock, inputs, load, output_tensor, save, zoo_names

FORMAT = HqqFormat(group_size=16)
QUANTIZED = OffloadConfig(experts=FORMAT, dense=FORMAT)


@pytest.fixture(scope="module")
def quantized(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=QUANTIZED)


@pytest.fixture
def saved(quantized, tmp_path):
    quantized.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture(scope="module")
def expected_quantized(quantized, token_ids):
    with torch.no_grad():
        return quantized(input_ids=token_ids).logits


def logits(model, token_ids):
    with torch.no_grad():
        return model(input_ids=token_ids).logits


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_saved_model_loads_without_any_option(saved, token_ids, expected_quantized):
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(logits(model, token_ids), expected_quantized)
    assert model.moe_offload.config.experts.default == FORMAT


def test_saving_what_was_loaded_gives_the_same_bytes(saved, tmp_path):
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(saved)


def test_saving_over_what_was_loaded_gives_the_same_bytes(saved):
    before = files(saved)
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(saved)
    assert files(saved) == before
    assert not list(saved.parent.glob(".*")), "something was left beside the folder"


def test_other_files_of_a_folder_survive_saving_into_it(quantized, saved):
    (saved / "tokenizer.json").write_text("{}")
    (saved / "original").mkdir()
    (saved / "original" / "notes.txt").write_text("mine")
    quantized.save_pretrained(saved)
    assert (saved / "tokenizer.json").read_text() == "{}"
    assert (saved / "original" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("budget", ["20%", "100%"])
def test_budgets_and_policies_are_chosen_when_a_saved_model_is_loaded(saved, token_ids, expected_quantized, budget):
    config = OffloadConfig(cache_budget=budget, policy="lfu", mmap=False)
    model = AutoModelForCausalLM.from_pretrained(saved, moe_offload=config)
    assert torch.equal(logits(model, token_ids), expected_quantized)
    assert model.moe_offload.config.policy == "lfu"
    assert model.moe_offload.plan.cache_bytes <= model.moe_offload.plan.budget_bytes
    assert model.moe_offload.stats().misses > 0


def test_the_format_of_a_saved_model_may_be_repeated_but_not_changed(saved):
    AutoModelForCausalLM.from_pretrained(saved, moe_offload=QUANTIZED)
    with pytest.raises(ConfigError, match=r"experts=3-bit.* but the checkpoint was quantized with experts=4-bit"):
        AutoModelForCausalLM.from_pretrained(saved, moe_offload=OffloadConfig(experts=HqqFormat(nbits=3)))


def test_the_class_that_saved_and_the_base_model_load_it_too(saved, quantized, token_ids, expected_quantized):
    assert torch.equal(logits(type(quantized).from_pretrained(saved), token_ids), expected_quantized)
    base = AutoModel.from_pretrained(saved)
    with torch.no_grad():
        hidden = base(input_ids=token_ids).last_hidden_state
        assert torch.equal(quantized.lm_head(hidden), expected_quantized)


def test_a_config_of_ones_own_keeps_the_recipe(saved, token_ids, expected_quantized):
    config = AutoConfig.from_pretrained(saved)
    model = AutoModelForCausalLM.from_pretrained(saved, config=config, moe_offload={"cache_budget": "50%"})
    assert torch.equal(logits(model, token_ids), expected_quantized)


def test_restoring_a_saved_model_makes_a_plain_one_that_saves_plainly(saved, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved)
    restore(model).save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / "model.safetensors").exists()
    assert "moe_offload" not in (tmp_path / "plain" / "config.json").read_text()


def has_a_head_of_its_own(plain):
    head = plain.get_output_embeddings()
    return head is not None and head.weight is not plain.get_input_embeddings().weight


@pytest.mark.parametrize("name", zoo_names())
def test_every_architecture_is_saved_and_loaded_in_low_bits(name, tmp_path):
    plain = build(name, torch.bfloat16)
    save(plain, tmp_path / "plain", "fused")
    config = replace(QUANTIZED, lm_head=FORMAT) if has_a_head_of_its_own(plain) else QUANTIZED
    first = load(plain, tmp_path / "plain", dtype=plain.dtype, moe_offload=config)
    first.save_pretrained(tmp_path / "saved")
    second, report = load(plain, tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    dtypes = {path: tensor.dtype for path, tensor in plain.named_parameters()}
    for model in (first, second):
        kept = {path: tensor.dtype for path, tensor in model.named_parameters()}
        assert kept == {path: dtypes[path] for path in kept}, "a parameter that was kept in float32, a router's perhaps"
    if failure_of_stock(name) is not None:
        pytest.skip(f"fails in Transformers itself: {failure_of_stock(name)!r}")
    with torch.no_grad():
        given = inputs(name, plain)
        assert torch.equal(output_tensor(second(**given)), output_tensor(first(**given)))


def test_rows_behind_the_last_expert_are_there_again_when_a_model_is_restored(tmp_path):
    """LongCat gives one stack rows for its identity experts, which have no weights."""
    plain = build("longcat_flash")
    plain.save_pretrained(tmp_path / "plain")
    quantized = type(plain).from_pretrained(tmp_path / "plain", moe_offload=OffloadConfig(experts=FORMAT))
    quantized.save_pretrained(tmp_path / "saved")
    restored = restore(type(plain).from_pretrained(tmp_path / "saved"))
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (restored, plain)]
    assert shapes[0] == shapes[1]
    restored.save_pretrained(tmp_path / "again")
    type(plain).from_pretrained(tmp_path / "again")


def test_killed_while_saving_the_old_or_the_new_checkpoint_is_there(quantized, saved, checkpoint):
    other = AutoModelForCausalLM.from_pretrained(
        checkpoint, moe_offload=OffloadConfig(experts=HqqFormat(group_size=32))
    )
    states, start = [files(saved)], time.perf_counter()
    other.save_pretrained(saved)
    span = time.perf_counter() - start
    states.append(files(saved))
    context, moments, killed = multiprocessing.get_context("fork"), random.Random(0), 0
    for trial in range(20):
        save = (quantized, other)[trial % 2].save_pretrained
        child = context.Process(target=with_locks_of_its_own, args=(save, saved))
        child.start()
        child.join(moments.uniform(0, span))
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        recover(saved, MARKS)
        assert files(saved) in states
    assert killed > 0
    other.save_pretrained(saved)
    assert files(saved) == states[1]
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(quantized, saved, monkeypatch):
    before = files(saved)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args):
        raise full

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        quantized.save_pretrained(saved)
    assert files(saved) == before


def test_gradients_through_layers_that_were_saved_as_they_are_survive_eviction(checkpoint, tmp_path, token_ids):
    formats = ExpertFormats(default=None, layers={"1": FORMAT})
    mixed = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=OffloadConfig(experts=formats))
    mixed.save_pretrained(tmp_path)
    config = OffloadConfig(arithmetic="exact", cache_budget="100%", mmap=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, moe_offload=config)
    tight = AutoModelForCausalLM.from_pretrained(tmp_path, moe_offload=config)
    tight.moe_offload.resize(tight.moe_offload.plan.smallest_budget)
    for one in (model, tight):
        one(input_ids=token_ids, labels=token_ids).loss.backward()
    ours = dict(tight.named_parameters())
    assert all(torch.equal(ours[path].grad, parameter.grad) for path, parameter in model.named_parameters())


def damaged(saved, change):
    shard = next(iter(sorted(saved.glob("moe_offload-*.safetensors"))))
    content = bytearray(shard.read_bytes())
    change(content)
    shard.write_bytes(content)
    return saved


def flip_a_bit(content):
    content[8192] ^= 1


def test_a_damaged_expert_is_an_error_when_it_is_first_used(saved, token_ids):
    for config in (OffloadConfig(), OffloadConfig(mmap=False)):
        model = AutoModelForCausalLM.from_pretrained(damaged(saved, flip_a_bit), moe_offload=config)
        with pytest.raises(CheckpointError, match=r"is damaged: bytes .* have the checksum"):
            logits(model, torch.arange(100).view(4, 25))
        damaged(saved, flip_a_bit)


def test_a_shard_cut_short_is_refused_before_anything_is_loaded(saved):
    with pytest.raises(CheckpointError, match="truncated"):
        AutoModelForCausalLM.from_pretrained(damaged(saved, lambda content: content.__delitem__(slice(-100, None))))


def test_a_recipe_of_another_version_or_with_an_unknown_field_is_refused(saved):
    config = saved / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(ConfigError, match=r"recipe has version 2, .* reads version 1"):
        AutoModelForCausalLM.from_pretrained(saved)
    config.write_text(text.replace('"dense": {', '"dens": {'))
    with pytest.raises(ConfigError, match=r"no option 'dens'; did you mean 'dense'"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_files_that_do_not_belong_to_the_config_are_refused(saved):
    config = saved / "config.json"
    config.write_text(config.read_text().replace('"nbits": 4', '"nbits": 3'))
    with pytest.raises(CheckpointError, match="do not belong together"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_missing_shard_is_an_error(saved):
    shutil.move(sorted(saved.glob("moe_offload-*.safetensors"))[0], saved.parent / "elsewhere")
    with pytest.raises((CheckpointError, OSError)):
        AutoModelForCausalLM.from_pretrained(saved)
