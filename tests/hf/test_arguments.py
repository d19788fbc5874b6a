"""Arguments of the methods that we stand in front of are honoured, as the plain model honours them, or refused."""

import inspect
import re

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from transformers_moe_offload import (
    ConfigError,
    ExpertFormats,
    HqqFormat,
    OffloadConfig,
    UnsupportedModelError,
    restore,
)
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hf.loading.discover import refuse_kernels
from transformers_moe_offload.training import unfreeze_experts
from zoo.build import build

EXACT = OffloadConfig(cache_budget="50%", arithmetic="exact")
FORMAT = HqqFormat(group_size=16)

HONOURED, REFUSED, SAME, MEANINGLESS = "honoured", "refused", "as without us", "has no effect there"

LOADING = {
    "pretrained_model_name_or_path": SAME,
    "model_args": SAME,
    "config": HONOURED,
    "cache_dir": SAME,
    "ignore_mismatched_sizes": HONOURED,
    "force_download": SAME,
    "local_files_only": SAME,
    "token": SAME,
    "revision": SAME,
    "use_safetensors": REFUSED,
    "weights_only": SAME,
    "fusion_config": SAME,
    "disable_mmap": HONOURED,
    "kwargs": SAME,
    "state_dict": REFUSED,
    "proxies": SAME,
    "tqdm_class": SAME,
    "output_loading_info": HONOURED,
    "_from_pipeline": SAME,
    "_from_auto": SAME,
    "dtype": HONOURED,
    "torch_dtype": HONOURED,
    "device_map": HONOURED,
    "max_memory": HONOURED,
    "offload_folder": SAME,
    "offload_buffers": SAME,
    "quantization_config": HONOURED,
    "subfolder": HONOURED,
    "_commit_hash": MEANINGLESS,
    "variant": HONOURED,
    "adapter_kwargs": SAME,
    "adapter_name": SAME,
    "generation_config": SAME,
    "gguf_file": REFUSED,
    "distributed_config": REFUSED,
    "device_mesh": MEANINGLESS,
    "tp_plan": REFUSED,
    "tp_size": REFUSED,
    "trust_remote_code": SAME,
    "allow_all_kernels": SAME,
    "use_kernels": REFUSED,
    "kernel_config": REFUSED,
    "key_mapping": HONOURED,
    "attn_implementation": SAME,
    "experts_implementation": MEANINGLESS,
}
"""What becomes of each argument of `from_pretrained`."""

SAVING = {
    "save_directory": SAME,
    "is_main_process": HONOURED,
    "state_dict": HONOURED,
    "push_to_hub": HONOURED,
    "max_shard_size": HONOURED,
    "variant": HONOURED,
    "token": HONOURED,
    "save_peft_format": SAME,
    "save_original_format": HONOURED,
    "distributed_checkpoint": REFUSED,
    "kwargs": HONOURED,
    # of pushing
    "repo_id": HONOURED,
    "commit_message": HONOURED,
    "create_pr": HONOURED,
}
"""The same of `save_pretrained`."""


def arguments_of(method):
    """The names of a method's parameters, and those that it takes out of its `**kwargs`."""
    plain = inspect.unwrap(method)
    taken = re.findall(r"""(?<!\w)kwargs\.pop\(\s*"(\w+)\"""", inspect.getsource(plain))
    return {*inspect.signature(plain).parameters, *taken} - {"self", "cls"}


@pytest.mark.parametrize(("name", "known"), [("from_pretrained", LOADING), ("save_pretrained", SAVING)])
def test_every_argument_of_the_installed_version_is_known_here(name, known):
    """A name that is printed is new in Transformers: try it with offloading, and honour or refuse it."""
    assert arguments_of(getattr(PreTrainedModel, name)) - set(known) == set()


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **{"moe_offload": EXACT} | options)


def logits(model, token_ids):
    with torch.no_grad():
        return model(input_ids=token_ids).logits


class TestLoading:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"distributed_config": DistributedConfig(tp_size=2, ep_size=2)}, "tp_size=2 asks for tensor parallelism"),
            ({"distributed_config": {"fsdp_size": 2, "ep_size": 2}}, "ep_size=2 asks for expert parallelism"),
            ({"distributed_config": {"pp_size": 2}}, "pp_size=2 asks for pipeline parallelism"),
            ({"tp_size": 2}, "tp_size=2 asks for tensor parallelism"),
        ],
    )
    def test_what_splits_sparse_layers_over_processes_is_refused(self, options, message, checkpoint):
        with pytest.raises(UnsupportedModelError, match=message):
            load(checkpoint, **options)

    def test_a_prebuilt_checkpoint_that_is_loaded_without_any_option_refuses_it_as_well(self, checkpoint, tmp_path):
        load(checkpoint, moe_offload=OffloadConfig(experts=FORMAT)).save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        config.distributed_config = DistributedConfig(tp_size=2, ep_size=2)  # where from_pretrained puts it
        with pytest.raises(UnsupportedModelError, match="tp_size=2 asks for tensor parallelism"):
            AutoModelForCausalLM.from_pretrained(tmp_path, config=config)

    def test_a_distributed_config_that_splits_nothing_is_accepted(self, checkpoint, token_ids, expected):
        assert torch.equal(logits(load(checkpoint, distributed_config=DistributedConfig()), token_ids), expected)

    def test_a_gguf_file_is_refused(self, checkpoint, plain):
        with pytest.raises(ConfigError, match=r"gguf_file='model.gguf' is not supported with moe_offload"):
            type(plain).from_pretrained(checkpoint, gguf_file="model.gguf", moe_offload=EXACT)

    def test_kernels_that_compute_a_whole_block_are_refused_by_the_name_of_the_kernel(self, checkpoint):
        model = load(checkpoint)
        refuse_kernels(model)  # of Qwen3's, norms and the rotary embedding have kernels
        block = type(model.model.layers[0].mlp)
        block.kernel_layer_name = "MegaBlocksMoeMLP"  # as `use_kernel_forward_from_hub` sets it
        try:
            with pytest.raises(UnsupportedModelError, match=r"compute model.layers.0.mlp with the kernel MegaBlocks"):
                refuse_kernels(model)
        finally:
            del block.kernel_layer_name

    def test_a_variant_is_read_though_another_one_is_beside_it(self, checkpoint, token_ids, expected, tmp_path):
        other = build("qwen3_moe")
        nn.init.zeros_(other.lm_head.weight)
        other.save_pretrained(tmp_path, max_shard_size="100KB")
        build("qwen3_moe").save_pretrained(tmp_path, max_shard_size="200KB", variant="mine")
        assert torch.equal(logits(load(tmp_path, variant="mine"), token_ids), expected)

    @pytest.mark.parametrize("ask", ["a dict", "an object", "on the config"])
    def test_a_quantization_config_in_any_form_is_ours(self, ask, checkpoint, token_ids, expected):
        options = {"moe_offload": None, "config": AutoConfig.from_pretrained(checkpoint)}
        if ask == "on the config":
            options["config"].quantization_config = EXACT
        else:
            options["quantization_config"] = EXACT.to_dict() if ask == "a dict" else EXACT
        model = load(checkpoint, **options)
        assert model.moe_offload.config.cache_budget == "50%"
        assert torch.equal(logits(model, token_ids), expected)

    def test_dense_weights_of_another_size_may_be_ignored_but_not_experts(self, checkpoint):
        config = AutoConfig.from_pretrained(checkpoint, vocab_size=50)
        _, info = load(checkpoint, config=config, ignore_mismatched_sizes=True, output_loading_info=True)
        assert {name for name, *_ in info["mismatched_keys"]} == {"lm_head.weight", "model.embed_tokens.weight"}
        config = AutoConfig.from_pretrained(checkpoint, moe_intermediate_size=192)
        with pytest.raises(CheckpointError, match=r"holds [\d,]+ values for .*, but the model expects \["):
            load(checkpoint, config=config, ignore_mismatched_sizes=True)

    @pytest.mark.parametrize(
        "options",
        [
            {"device_map": "auto", "max_memory": {"cpu": "1GB"}},
            {"disable_mmap": True},
            {"weights_only": False},
            {"attn_implementation": "eager"},
            {"torch_dtype": "bfloat16"},
            {"dtype": torch.bfloat16},
        ],
        ids=str,
    )
    def test_what_is_about_the_dense_weights_means_what_it_means_without_us(self, options, checkpoint, token_ids):
        plain = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager", **options)
        assert torch.equal(logits(load(checkpoint, **options), token_ids), logits(plain, token_ids))


class TestSaving:
    """Of a model with experts as they are stored."""

    @pytest.fixture
    def model(self, checkpoint):
        return load(checkpoint)

    def test_given_weights_are_written_and_experts_added(self, model, plain, tmp_path):
        averaged = {name: tensor + 1 for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=averaged)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
        expected = plain.state_dict()
        assert set(again) == set(expected)
        for name, tensor in again.items():
            assert torch.equal(tensor, averaged.get(name, expected[name])), name

    def test_given_experts_win_over_the_files(self, model, plain, tmp_path):
        whole = {name: tensor * 2 for name, tensor in plain.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=whole)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())

    def test_given_values_of_trained_experts_win_over_the_live_ones(self, model, tmp_path):
        unfreeze_experts(model, {0: [3]})
        (name,) = [name for name in model.state_dict() if name.endswith("own_experts.3.down_proj")]
        model.save_pretrained(tmp_path, state_dict=model.state_dict() | {name: torch.full((64, 96), 0.5)})
        again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
        stack = again["model.layers.0.mlp.experts.down_proj"]
        assert (stack[3] == 0.5).all()
        assert not (stack[2] == 0.5).any()

    def test_experts_under_other_names_are_refused_with_the_right_ones(self, model, tmp_path):
        name = "model.layers.0.mlp.experts.0.down_proj.weight"
        with pytest.raises(ConfigError, match=rf"{name}, but the experts of .* are called .*experts\.gate_up_proj"):
            model.save_pretrained(tmp_path, state_dict=model.state_dict() | {name: torch.zeros(64, 96)})

    def test_given_values_of_trained_experts_are_found_inside_of_peft_s_wrappers(self, model, tmp_path):
        unfreeze_experts(model, {0: [3]})
        get_peft_model(model, LoraConfig(r=2, target_parameters=["experts.down_proj"]))
        (name,) = [name for name in model.state_dict() if name.endswith("own_experts.3.down_proj")]
        assert ".base_layer." in name
        model.save_pretrained(tmp_path / "live")
        model.save_pretrained(tmp_path / "given", state_dict=model.state_dict() | {name: torch.full((64, 96), 0.5)})
        live, given = (load_file(tmp_path / folder / "model.safetensors") for folder in ("live", "given"))
        stored = "model.layers.0.mlp.experts.3.down_proj.weight"
        assert (given[stored] == 0.5).all()
        assert [key for key, tensor in given.items() if not torch.equal(tensor, live[key])] == [stored]

    def test_given_values_of_an_adapter_are_written(self, model, tmp_path):
        try:
            model.add_adapter(LoraConfig(target_modules=["q_proj"], r=2))
        except ValueError as error:  # Transformers 5.24 wants PEFT 0.22 for this
            pytest.skip(str(error))
        averaged = {name: torch.full_like(tensor, 0.25) for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=averaged)
        written = load_file(tmp_path / "adapter_model.safetensors")
        assert written
        assert all((tensor == 0.25).all() for tensor in written.values())

    def test_a_variant_has_experts_in_it(self, model, plain, tmp_path):
        model.save_pretrained(tmp_path, variant="mine")
        assert {file.name for file in tmp_path.glob("*.safetensors")} == {"model.mine.safetensors"}
        again = AutoModelForCausalLM.from_pretrained(tmp_path, variant="mine").state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in plain.state_dict().items())

    def test_a_distributed_checkpoint_is_refused(self, model, tmp_path):
        with pytest.raises(ConfigError, match="distributed_checkpoint=True is not supported for offloaded"):
            model.save_pretrained(tmp_path, distributed_checkpoint=True)

    def test_other_processes_than_the_main_one_write_nothing(self, model, tmp_path):
        model.save_pretrained(tmp_path, is_main_process=False)
        assert list(tmp_path.iterdir()) == []


class TestSavingInLowBits:
    @pytest.fixture
    def model(self, checkpoint):
        return load(checkpoint, moe_offload=OffloadConfig(experts=FORMAT, dense=FORMAT))

    def test_given_dense_weights_are_written(self, model, tmp_path):
        averaged = model.state_dict() | {"model.norm.weight": torch.full((64,), 3.0)}
        model.save_pretrained(tmp_path, state_dict=averaged)
        assert (load(tmp_path).model.norm.weight == 3).all()

    @pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.down_proj", "model.layers.0.self_attn.q_proj.weight"])
    def test_given_values_of_what_is_in_low_bits_are_refused(self, name, model, plain, tmp_path):
        with pytest.raises(ConfigError, match=rf"holds {re.escape(name)}, which is not in this model: its weights are"):
            model.save_pretrained(tmp_path, state_dict=model.state_dict() | {name: plain.state_dict()[name]})

    def test_shards_of_dense_weights_are_as_small_as_asked_for(self, model, tmp_path):
        model.save_pretrained(tmp_path / "one")
        model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
        one, many = (len(list((tmp_path / name).glob("*.safetensors"))) for name in ("one", "many"))
        assert many > one
        with pytest.raises(ConfigError, match="max_shard_size='50%' is not a size"):
            model.save_pretrained(tmp_path / "share", max_shard_size="50%")

    def test_experts_that_were_trained_beside_layers_in_low_bits_are_saved_as_trained(self, checkpoint, tmp_path):
        formats = ExpertFormats(default=None, layers={"1": FORMAT})
        model = load(checkpoint, moe_offload=OffloadConfig(experts=formats))
        unfreeze_experts(model, {0: [3]})
        with torch.no_grad():
            dict(model.named_parameters())["model.layers.0.mlp.experts.own_experts.3.down_proj"].fill_(0.5)
        model.save_pretrained(tmp_path)
        again, info = load(tmp_path, moe_offload=None, output_loading_info=True)
        assert not info["unexpected_keys"]
        stack = again.moe_offload.state_dict()["model.layers.0.mlp.experts.down_proj"]
        assert (stack[3] == 0.5).all()
        assert not (stack[2] == 0.5).any()


class TestLoadingAStateDict:
    def test_one_frozen_expert_that_differs_is_refused_by_its_number(self, checkpoint, plain):
        weights = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
        load(checkpoint).load_state_dict(weights)
        weights["model.layers.2.mlp.experts.down_proj"][6, 0, 0] += 1
        with pytest.raises(CheckpointError, match=r"down_proj of expert 6 of model\.layers\.2\.mlp\.experts is not"):
            load(checkpoint).load_state_dict(weights)

    def test_dense_weights_alone_are_taken_strictly_or_not_and_assigned(self, checkpoint):
        model = load(checkpoint)
        weights = {name: torch.full_like(tensor, 0.125) for name, tensor in model.state_dict().items()}
        model.load_state_dict(weights, strict=True, assign=True)
        assert model.lm_head.weight.data_ptr() == weights["lm_head.weight"].data_ptr()
        del weights["lm_head.weight"]
        assert model.load_state_dict(weights, strict=False).missing_keys == ["lm_head.weight"]
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"lm_head.weight\""):
            model.load_state_dict(weights)


class TestWritersOfStateDicts:
    """Functions of other packages that take `state_dict()` for the whole model."""

    @pytest.mark.parametrize("writer", ["Accelerator.save_model", "safetensors.torch.save_model"])
    def test_whoever_writes_a_model_without_its_experts_is_warned(self, writer, checkpoint, tmp_path, caplog):
        model = load(checkpoint)
        if writer == "Accelerator.save_model":
            accelerator = Accelerator(cpu=True)
            accelerator.save_model(accelerator.prepare(model), tmp_path)
        else:
            save_model(model, tmp_path / "model.safetensors")
        assert f"{writer} writes Qwen3MoeForCausalLM.state_dict(), which does not contain the offloaded" in caplog.text

    def test_nothing_is_said_where_nothing_is_missed(self, checkpoint, plain, tmp_path, caplog):
        model = load(checkpoint)
        save_model(plain, tmp_path / "plain.safetensors")
        torch.save(model.state_dict(), tmp_path / "dense.pt")
        model.save_pretrained(tmp_path)
        accelerator = Accelerator(cpu=True)
        accelerator.prepare(model)
        accelerator.save_state(tmp_path / "state")
        save_model(restore(model), tmp_path / "restored.safetensors")
        assert "state_dict" not in caplog.text
