"""All the ways to ask for offloading, and what is the same afterwards as without it."""

import warnings

import huggingface_hub
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen3MoeForCausalLM, pipeline
from transformers.utils import logging

import transformers_moe_offload as tmo
from transformers_moe_offload import OffloadConfig

from .conftest import TINY_MOE

EXACT = OffloadConfig(cache_budget="50%", arithmetic="exact")


def logits(model, token_ids):
    with torch.no_grad():
        return model(input_ids=token_ids).logits


@pytest.mark.parametrize(
    "how",
    [
        {"moe_offload": EXACT},
        {"moe_offload": {"cache_budget": "50%", "arithmetic": "exact"}},
        {"moe_offload": {"quant_method": "moe_offload", "arithmetic": "exact"}},
        {"quantization_config": EXACT},
        {"quantization_config": {"quant_method": "moe_offload", "arithmetic": "exact"}},
    ],
    ids=["config", "dict", "dict-with-method", "quantization_config", "quantization_config-dict"],
)
@pytest.mark.parametrize("loader", [AutoModelForCausalLM, Qwen3MoeForCausalLM])
def test_every_way_to_ask_gives_the_same_exact_model(loader, how, checkpoint, token_ids, expected):
    model, report = loader.from_pretrained(checkpoint, output_loading_info=True, **how)
    assert type(model) is Qwen3MoeForCausalLM
    assert not any(report.values())
    assert torch.equal(logits(model, token_ids), expected)
    assert cache_is_used(model)


@pytest.mark.parametrize("value", ["auto", True])
def test_auto_takes_everything_that_fits(value, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=value)
    assert model.moe_offload.plan.num_slots == model.moe_offload.plan.num_experts


@pytest.mark.parametrize("value", [None, False])
def test_none_and_false_load_the_plain_model(value, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=value)
    assert not hasattr(model, "moe_offload")
    assert "model.layers.0.mlp.experts.gate_up_proj" in model.state_dict()


def test_a_config_object_can_be_passed_along(checkpoint, token_ids, expected):
    config = AutoConfig.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, moe_offload=EXACT)
    assert torch.equal(logits(model, token_ids), expected)
    assert not hasattr(config, "quantization_config")


def test_the_base_model_of_a_checkpoint_with_a_head_finds_its_experts(checkpoint, plain, token_ids):
    model = AutoModel.from_pretrained(checkpoint, moe_offload=EXACT)
    with torch.no_grad():
        assert torch.equal(model(token_ids).last_hidden_state, plain.model(token_ids).last_hidden_state)


def test_a_head_on_a_checkpoint_of_the_base_model_finds_its_experts(plain, token_ids, tmp_path):
    plain.model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, moe_offload=EXACT)
    with torch.no_grad():
        assert torch.equal(model.model(token_ids).last_hidden_state, plain.model(token_ids).last_hidden_state)


def test_a_pipeline_takes_it_in_model_kwargs():
    offload = {"cache_budget": "30%", "arithmetic": "exact"}
    offloaded = pipeline("text-generation", str(TINY_MOE), model_kwargs={"moe_offload": offload})
    plain = pipeline("text-generation", str(TINY_MOE), model_kwargs={"experts_implementation": "eager"})
    prompt, options = "def __init__(self", {"max_new_tokens": 8, "do_sample": False}
    assert offloaded(prompt, **options) == plain(prompt, **options)
    assert cache_is_used(offloaded.model)


def test_a_tokenizer_loaded_with_the_same_kwargs_can_still_be_saved(tmp_path):
    made = pipeline("text-generation", str(TINY_MOE), model_kwargs={"moe_offload": OffloadConfig(cache_budget="30%")})
    made.tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer_config.json").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto", "bfloat16"])
def test_dtype_is_honoured(dtype, checkpoint, token_ids):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, experts_implementation="eager")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, moe_offload=EXACT)
    assert model.dtype == plain.dtype
    assert torch.equal(logits(model, token_ids), logits(plain, token_ids))


@pytest.mark.parametrize(
    "options",
    [
        {"attn_implementation": "eager"},
        {"attn_implementation": "sdpa"},
        {"low_cpu_mem_usage": True},
        {"local_files_only": True},
        {"use_safetensors": True},
        {"token": False},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"key_mapping": {"^never": "matches"}},
    ],
    ids=str,
)
def test_other_options_mean_what_they_mean_without_us(options, checkpoint, token_ids):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager", **options)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=EXACT, **options)
    assert model.config._attn_implementation == plain.config._attn_implementation
    assert torch.equal(logits(model, token_ids), logits(plain, token_ids))


def test_a_subfolder_is_read(plain, token_ids, expected, tmp_path):
    plain.save_pretrained(tmp_path / "inner")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner", moe_offload=EXACT)
    assert torch.equal(logits(model, token_ids), expected)


def test_a_hub_id_is_read_from_the_cache_at_a_revision(checkpoint, token_ids, expected, tmp_path, monkeypatch):
    # Auto classes look for an adapter first, and ask the Hub for one whatever `local_files_only` says.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--some-moe"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "blobs").mkdir()
    (repo / "snapshots" / commit).mkdir(parents=True)
    for file in checkpoint.iterdir():
        blob = repo / "blobs" / f"blob-of-{file.name}"
        blob.write_bytes(file.read_bytes())
        (repo / "snapshots" / commit / file.name).symlink_to(blob)
    for revision in (None, "main", commit):
        options = {"revision": revision} if revision else {}
        model = AutoModelForCausalLM.from_pretrained(
            "someone/some-moe", cache_dir=tmp_path, local_files_only=True, moe_offload=EXACT, **options
        )
        assert torch.equal(logits(model, token_ids), expected)


def test_module_names_and_remaining_parameters_are_the_plain_models(checkpoint, plain):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=EXACT)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    missing = set(plain.state_dict()) - set(model.state_dict())
    assert missing == {name for name in plain.state_dict() if ".experts." in name}
    assert not any(p.is_meta for p in model.parameters())


def test_loading_warns_about_nothing(checkpoint, caplog):
    logging.enable_propagation()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=EXACT)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_an_experts_implementation_that_cannot_matter_is_mentioned(checkpoint, caplog):
    AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=EXACT, experts_implementation="eager")
    assert "experts_implementation='eager' has no effect on offloaded experts" in caplog.text


def cache_is_used(model) -> bool:
    stats = tmo.cache_stats(model)
    return stats.misses > 0 and stats.disk_bytes > 0
