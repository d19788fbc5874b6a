"""What is wrong with the input is said in one clear error, and nothing is left half done."""

import json
import shutil
import struct
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeForCausalLM,
)

from stores import cut_short, put_back
from transformers_moe_offload import (
    CapacityError,
    CheckpointError,
    ConfigError,
    HqqFormat,
    MoeOffloadError,
    OffloadConfig,
    UnsupportedModelError,
)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **{"moe_offload": OffloadConfig(cache_budget="50%")} | options)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def shard_with_experts(folder):
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder / next(shard for name, shard in weight_map.items() if ".experts." in name)


def test_a_budget_too_small_names_the_smallest_that_works(checkpoint):
    with pytest.raises(CapacityError, match=r"10 bytes is too small: one slot .* takes [\d,]+ bytes") as refused:
        load(checkpoint, moe_offload=OffloadConfig(cache_budget=10))
    smallest = refused.value.smallest_budget
    assert f"{smallest:,} bytes or more" in str(refused.value)
    assert load(checkpoint, moe_offload=OffloadConfig(cache_budget=smallest)).moe_offload.plan.num_slots == 1
    with pytest.raises(CapacityError):
        load(checkpoint, moe_offload=OffloadConfig(cache_budget=smallest - 1))


@pytest.mark.parametrize("experts", [None, HqqFormat(nbits=4, group_size=16)], ids=["as stored", "quantized"])
@pytest.mark.parametrize("budget", [10, "0.01%"])
def test_a_budget_too_small_is_refused_before_weights_are_loaded(checkpoint, monkeypatch, experts, budget):
    with monkeypatch.context() as no_loading:
        no_loading.setattr(PreTrainedModel, "_load_pretrained_model", lambda *_, **__: pytest.fail("loads weights"))
        with pytest.raises(CapacityError) as refused:
            load(checkpoint, moe_offload=OffloadConfig(cache_budget=budget, experts=experts))
    smallest = refused.value.smallest_budget
    with pytest.raises(CapacityError):
        load(checkpoint, moe_offload=OffloadConfig(cache_budget=smallest - 1, experts=experts))
    plan = load(checkpoint, moe_offload=OffloadConfig(cache_budget=smallest, experts=experts)).moe_offload.plan
    assert plan.smallest_budget == smallest


def test_an_unknown_policy_lists_the_choices(checkpoint):
    with pytest.raises(ConfigError, match=r"policy='lruu' is not a known policy; choose one of \[.*'lru'"):
        load(checkpoint, moe_offload=OffloadConfig(policy="lruu"))


def test_a_misspelt_option_suggests_the_right_one(checkpoint):
    with pytest.raises(ConfigError, match=r"no option 'cache_buget'; did you mean 'cache_budget'\?"):
        load(checkpoint, moe_offload={"cache_buget": "1GB"})


def test_both_ways_to_ask_are_one_too_many(checkpoint):
    with pytest.raises(ConfigError, match="both moe_offload and quantization_config"):
        load(checkpoint, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_a_dense_model_is_named_with_what_it_is_made_of(tmp_path):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM has no routed experts .* modules are Llama"):
        load(tmp_path)


def test_a_model_built_from_a_state_dict_has_no_files_to_read(checkpoint, plain):
    with pytest.raises(CheckpointError, match="needs a checkpoint on disk"):
        type(plain).from_pretrained(
            None, config=AutoConfig.from_pretrained(checkpoint), state_dict=plain.state_dict(), moe_offload=True
        )


def test_a_truncated_shard_is_told_by_its_two_sizes(own_checkpoint):
    shard = shard_with_experts(own_checkpoint)
    size = shard.stat().st_size
    with shard.open("r+b") as stream:
        stream.truncate(size - 100)
    with pytest.raises(CheckpointError, match=rf"has {size - 100:,} bytes, but tensor .* reaches to byte {size:,}"):
        load(own_checkpoint)


def test_a_shard_cut_inside_its_header_is_told(own_checkpoint):
    shard = shard_with_experts(own_checkpoint)
    with shard.open("r+b") as stream:
        stream.truncate(50)
    with pytest.raises(CheckpointError, match=r"has 50 bytes, fewer than its header of [\d,]+ bytes"):
        load(own_checkpoint)


def test_a_missing_shard_is_named(own_checkpoint):
    shard = shard_with_experts(own_checkpoint)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"cannot read .*{shard.name}: No such file"):
        load(own_checkpoint)


def test_a_shard_that_holds_less_than_the_index_says_is_told(own_checkpoint):
    shard = shard_with_experts(own_checkpoint)
    tensors = load_file(shard)
    gone = next(name for name in tensors if ".experts." in name)
    del tensors[gone]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"places {gone} in {shard.name}, but that file does not hold it"):
        load(own_checkpoint)


def test_an_expert_missing_from_files_and_index_is_told(own_checkpoint, tmp_path):
    tensors = {name: tensor for shard in shards(own_checkpoint) for name, tensor in load_file(shard).items()}
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(own_checkpoint / "config.json", whole)
    with pytest.raises(CheckpointError, match=r"holds 7 tensors for model.layers.1.*, but the model has 8 experts"):
        load(whole)


def test_a_config_of_another_size_is_told_by_both_sizes(own_checkpoint):
    config = json.loads((own_checkpoint / "config.json").read_text())
    config["moe_intermediate_size"] *= 2
    (own_checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"holds [\d,]+ values for .*, but the model expects \["):
        load(own_checkpoint)


@pytest.mark.parametrize("outside", ["../stolen.safetensors", "nested/../../stolen.safetensors"])
def test_an_index_that_points_out_of_the_folder_is_refused(outside, own_checkpoint):
    (own_checkpoint / "nested").mkdir()
    shard = shard_with_experts(own_checkpoint)
    shard.rename(own_checkpoint / outside)
    index = own_checkpoint / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(f'"{shard.name}"', json.dumps(outside)))
    with pytest.raises(CheckpointError, match="refusing to read outside of"):
        load(own_checkpoint)


def test_an_index_with_an_absolute_path_is_refused(own_checkpoint, tmp_path):
    shard = shard_with_experts(own_checkpoint)
    target = tmp_path / shard.name
    shard.rename(target)
    index = own_checkpoint / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(f'"{shard.name}"', json.dumps(str(target))))
    with pytest.raises(CheckpointError, match="refusing to read outside of"):
        load(own_checkpoint)


def test_a_bin_checkpoint_is_sent_to_be_converted(plain, own_checkpoint, tmp_path):
    for shard in shards(own_checkpoint):
        shard.unlink()
    (own_checkpoint / "model.safetensors.index.json").unlink()
    torch.save(plain.state_dict(), own_checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"not a safetensors file; .* convert the checkpoint first"):
        load(own_checkpoint)


def test_a_checkpoint_of_another_quantization_method_is_refused_by_name(own_checkpoint):
    config = json.loads((own_checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (own_checkpoint / "config.json").write_text(json.dumps(config))
    for options in ({}, {"config": AutoConfig.from_pretrained(own_checkpoint)}):
        with pytest.raises(ConfigError, match="is already quantized with 'gptq', whose experts cannot"):
            load(own_checkpoint, **options)
    with pytest.raises(ConfigError, match="is already quantized with 'gptq', whose experts cannot"):
        AutoModelForCausalLM.from_pretrained(own_checkpoint, quantization_config=OffloadConfig())


def test_a_model_id_that_does_not_exist_fails_as_without_us():
    with pytest.raises(OSError, match="some-model-that-is-nowhere"):
        load("./some-model-that-is-nowhere", local_files_only=True)


def test_garbage_instead_of_a_header_is_told(own_checkpoint):
    shard = shard_with_experts(own_checkpoint)
    shard.write_bytes(struct.pack("<Q", 20) + b"x" * 200)
    with pytest.raises(CheckpointError, match="no readable safetensors header"):
        load(own_checkpoint)


def index_of(**changes):
    return {"metadata": {}, "weight_map": {"lm_head.weight": "a.safetensors"}} | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON: Expecting value"),
        (b'{"metadata": {}, "weight_map": {"lm_', "is not valid JSON: Unterminated string"),
        (b'{"\xff": 1}', "it is not text in UTF-8"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"metadata": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
        ([], "is not a JSON object but a list"),
        ({"metadata": {}}, "its weight_map is None, not an object"),
        (index_of(weight_map=[]), r"its weight_map is \[\], not an object"),
        (index_of(weight_map={"lm_head.weight": []}), r"places lm_head.weight in \[\], which is not a file inside"),
        (index_of(weight_map={"lm_head.weight": "a.safetensors", "b": None}), "places b in None, which is not a file"),
        (index_of(metadata=None), "has None for metadata, which is not an object"),
        ({"weight_map": {"lm_head.weight": "a.safetensors"}}, "has None for metadata, which is not an object"),
    ],
)
def test_a_damaged_index_is_told_before_transformers_fails_of_it(content, message, own_checkpoint):
    index = own_checkpoint / "model.safetensors.index.json"
    index.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    for cls in (AutoModelForCausalLM, Qwen3MoeForCausalLM):
        with pytest.raises(CheckpointError, match=message) as refused:
            cls.from_pretrained(own_checkpoint, moe_offload=OffloadConfig())
        assert str(index) in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (b"", "is not valid JSON"),
        (b"[]", "is not a JSON object but a list"),
        (b"null", "is not a JSON object but a NoneType"),
        ({"quantization_config": []}, r"has quantization_config=\[\], which is not a dict"),
        ({"quantization_config": 3}, "has quantization_config=3, which is not a dict"),
        ({"quantization_config": {}}, "a quantization_config without the name of a method: its quant_method is None"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": "x"}}, "weight_block_size must be"),
        ({"quantization_config": {"quant_method": "moe_offload"}}, "has no moe_offload.safetensors.index.json"),
        ({"text_config": "x"}, "has text_config='x', which is not a dict"),
        ({"transformers_weights": []}, r"has transformers_weights=\[\], which is not a str"),
        ({"dtype": []}, r"has dtype=\[\], which is not a str"),
        ({"hidden_size": "x"}, "is not a valid Qwen3MoeConfig: .*'hidden_size' expected int"),
        ({"num_local_experts": 10**30}, "has the number 1000000000000000000000000000000, which no model"),
        ({"num_hidden_layers": 10**9}, "says num_hidden_layers=1000000000, but .* an index of [0-9,]+ tensors"),
    ],
)
def test_a_damaged_config_is_told_before_transformers_fails_of_it(changes, message, own_checkpoint):
    path = own_checkpoint / "config.json"
    config = json.loads(path.read_text())
    path.write_bytes(changes if isinstance(changes, bytes) else json.dumps(config | changes).encode())
    for cls in (AutoModelForCausalLM, Qwen3MoeForCausalLM):
        with pytest.raises(CheckpointError, match=message):
            cls.from_pretrained(own_checkpoint, moe_offload=OffloadConfig())


def test_a_config_that_is_nested_deeply_is_refused_before_transformers_logs_it(own_checkpoint, monkeypatch):
    path, deep = own_checkpoint / "config.json", []
    for _ in range(400):
        deep = [deep]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text_config": {"sizes": deep}}))
    monkeypatch.setattr(PretrainedConfig, "to_json_string", lambda *_, **__: pytest.fail("it takes minutes"))
    for cls in (AutoModelForCausalLM, Qwen3MoeForCausalLM):
        with pytest.raises(CheckpointError, match=r"config\.json is nested more than 100 levels deep"):
            cls.from_pretrained(own_checkpoint, moe_offload=OffloadConfig())


def test_without_offloading_transformers_says_what_it_always_did(own_checkpoint):
    (own_checkpoint / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(KeyError, match="weight_map"):
        AutoModelForCausalLM.from_pretrained(own_checkpoint)
    (own_checkpoint / "config.json").write_text("{")
    with pytest.raises(OSError, match="not a valid JSON file"):
        AutoModelForCausalLM.from_pretrained(own_checkpoint)


def test_an_error_that_no_file_is_to_blame_for_stays_as_it_is(own_checkpoint):
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_option'"):
        load(own_checkpoint, no_such_option=1)


class TestAFileThatChangesAfterLoading:
    """The forward that needs it fails; the model works again when the file is back."""

    @pytest.fixture
    def model(self, own_checkpoint):
        return load(own_checkpoint, moe_offload=OffloadConfig(cache_budget="50%", arithmetic="exact"))

    def test_gone(self, model, own_checkpoint, token_ids, tmp_path, expected):
        shard = shard_with_experts(own_checkpoint)
        shard.rename(tmp_path / "elsewhere")
        with pytest.raises(CheckpointError, match=f"cannot read .*{shard.name}.*; put the file back and try again"):
            model(input_ids=token_ids)
        (tmp_path / "elsewhere").rename(shard)
        with torch.no_grad():
            assert torch.equal(model(input_ids=token_ids).logits, expected)

    def test_shorter_before_it_is_opened(self, model, own_checkpoint, token_ids, expected):
        shard = shard_with_experts(own_checkpoint)
        with put_back(shard) as whole:
            shard.write_bytes(whole[:-1000])
            size = len(whole)
            with pytest.raises(CheckpointError, match=f"has {size - 1000:,} bytes, but had {size:,}"):
                model(input_ids=token_ids)
        with torch.no_grad():
            assert torch.equal(model(input_ids=token_ids).logits, expected)

    def test_shorter_while_it_is_open(self, model, own_checkpoint, token_ids, expected):
        with torch.no_grad():
            model(input_ids=token_ids[:, :1])
        # Transformers maps the dense weights from the files: cutting those would take the process down, us or not.
        cut = [s for s in shards(own_checkpoint) if all(".experts." in name for name in load_file(s))]
        assert cut
        with ExitStack() as stack:
            for shard in cut:
                stack.enter_context(put_back(shard))
                cut_short(shard, 1000)
            with pytest.raises(CheckpointError, match=r"ends at byte 1,000|has 1,000 bytes"):
                model(input_ids=token_ids)
        with torch.no_grad():
            assert torch.equal(model(input_ids=token_ids).logits, expected)


@pytest.mark.parametrize(
    "damage",
    [
        {"hidden_act": "nosuch"}, {"num_attention_heads": 0}, {"num_key_value_heads": 0}, {"decoder_sparse_step": 0},
        {"hidden_size": -1}, {"vocab_size": -1}, {"pad_token_id": 10**12},
        {"rope_parameters": {"rope_type": "nosuch", "rope_theta": 1e4}}, {"attn_implementation": ["x"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_no_model_can_be_built_from_is_named(checkpoint, tmp_path, damage):
    shutil.copytree(checkpoint, tmp_path / "odd")
    config = tmp_path / "odd" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | damage))
    with pytest.raises(MoeOffloadError, match=r"odd/config\.json|odd says"):
        load(tmp_path / "odd")


def test_experts_given_to_a_part_of_the_model_are_refused(checkpoint):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = load(checkpoint)
    with pytest.raises(CheckpointError, match="experts are loaded by the offloaded model only"):
        model.model.load_state_dict(plain.model.state_dict(), strict=False)
    wrapped = torch.nn.ModuleDict({"inner": model})
    with pytest.raises(CheckpointError, match=r"inner\.model\.layers\.0\.mlp\.experts"):
        wrapped.load_state_dict({f"inner.{name}": tensor for name, tensor in plain.state_dict().items()}, strict=False)
    without = {name: tensor for name, tensor in plain.model.state_dict().items() if ".experts." not in name}
    model.model.load_state_dict(without, strict=False)


def test_a_state_dict_is_not_pushed_in_low_bits(checkpoint, tmp_path):
    model = load(checkpoint, moe_offload=OffloadConfig(experts=HqqFormat(nbits=4, group_size=16)))
    with pytest.raises(ConfigError, match="is not supported together with a state_dict"):
        model.save_pretrained(tmp_path / "saved", state_dict=model.state_dict(), push_to_hub=True, repo_id="me/x")
    assert not (tmp_path / "saved").exists()
