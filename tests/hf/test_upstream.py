"""A contract for everything private or changeable that is taken from other libraries; fails by the entry's name."""

import ast
import importlib
import inspect
import logging
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel, StaticCache, core_model_loading
from transformers.generation import utils as generation
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.integrations import moe

import transformers_moe_offload
from forked import forget_the_package, in_a_child
from transformers_moe_offload import UnsupportedModelError
from transformers_moe_offload.hf import upstream
from transformers_moe_offload.hf.other_quantizers.methods import DELEGATED
from zoo.build import build, zoo_model, zoo_names

SRC = Path(transformers_moe_offload.__file__).parent

QUANTIZER_HOOKS = (
    "validate_environment", "update_device_map", "update_attn_implementation", "_process_model_before_weight_loading",
    "adjust_max_memory", "update_weight_conversions", "_process_model_after_weight_loading",
    "get_state_dict_and_metadata", "is_serializable", "is_trainable", "is_compileable", "param_needs_quantization",
)  # fmt: skip

MEMBERS = {
    "AUTO_QUANTIZER_MAPPING": ("__setitem__", "pop", *DELEGATED),
    "AUTO_QUANTIZATION_CONFIG_MAPPING": ("__setitem__", "pop"),
    "AutoHfQuantizer": ("from_config", "supports_quant_method"),
    "AutoQuantizationConfig": ("from_dict",),
    "HfQuantizer": QUANTIZER_HOOKS,
    "Concatenate": ("convert",),
    "MergeModulelist": ("convert",),
    "WeightConverter": ("convert",),
    "PEFT_TYPE_TO_TUNER_MAPPING": ("__setitem__", "LORA"),
    "ParamWrapper": ("get_param", "_activate_lora", "merge", "get_base_layer"),
    "ExportableState": ("state",),
    "LoraLayer": ("merge", "get_base_layer"),
}
"""What is used of classes and tables: attributes, or keys."""

PARAMETERS = {
    "custom_object_save": ("obj", "folder", "config"),
    "dot_natural_key": ("s",),
    "get_keys_to_not_convert": ("model",),
    "get_model_conversion_mapping": ("model",),
    "is_peft_greater_or_equal": ("library_version",),
    "remove_tied_weights_from_state_dict": ("state_dict", "model"),
    "rename_source_key": (
        "source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict",
    ),
    "resolved_checkpoint_files": (
        "pretrained_model_name_or_path", "variant", "gguf_file", "use_safetensors", "user_agent", "is_remote_code",
        "transformers_explicit_filename", "download_kwargs",
    ),
    "revert_weight_conversion": ("model", "state_dict"),
    "WeightRenaming": ("source_patterns", "target_patterns"),
    "WeightConverter": ("source_patterns", "target_patterns", "operations"),
}  # fmt: skip
"""How functions and classes are called."""


def has(thing, member):
    try:
        return hasattr(thing, member) or member in {str(getattr(key, "value", key)) for key in thing}
    except TypeError:
        return False


@pytest.mark.parametrize(("name", "members"), MEMBERS.items(), ids=MEMBERS)
def test_a_class_or_table_has_what_is_used_of_it(name, members):
    thing = getattr(upstream, name)
    assert [member for member in members if not has(thing, member)] == []


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items(), ids=PARAMETERS)
def test_a_function_has_the_parameters_that_are_passed(name, parameters):
    known = list(inspect.signature(getattr(upstream, name)).parameters)
    assert [one for one in parameters if one not in known] == []


@pytest.fixture(scope="module")
def model():
    return build("qwen3_moe")


ON_A_MODEL = {
    "attention_implementation": lambda model: upstream.attention_implementation(model.config) in ("sdpa", "eager"),
    "auto_classes_of": lambda model: (
        upstream.auto_classes_of(model.config, ("AutoModelForCausalLM",)) == [("AutoModelForCausalLM", type(model))]
    ),
    "dtype_plan": lambda model: isinstance(upstream.dtype_plan(model, torch.bfloat16), dict),
    "experts_implementation": lambda model: upstream.experts_implementation(model.config) == "eager",
    "has_peft_adapter": lambda model: upstream.has_peft_adapter(model) is model._hf_peft_config_loaded is False,
    "ignored_on_load_missing": lambda model: isinstance(upstream.ignored_on_load_missing(model), tuple),
    "ignored_on_load_unexpected": lambda model: isinstance(upstream.ignored_on_load_unexpected(model), tuple),
    "ignored_on_save": lambda model: isinstance(upstream.ignored_on_save(model), tuple),
    "initialise": lambda model: callable(model._init_weights),
    "ATTENTION_IMPLEMENTATION": lambda model: getattr(model.config, upstream.ATTENTION_IMPLEMENTATION) == "sdpa",
    "COMPILED_CALL": lambda model: callable(getattr(model, upstream.COMPILED_CALL)),
    "EXPERTS_FLAGS": lambda model: all(
        flag in vars(model.model.layers[-1].mlp.experts) for flag in upstream.EXPERTS_FLAGS
    ),
    "undecorated_forward": lambda model: (
        "top_k_index" in inspect.signature(upstream.undecorated_forward(model.model.layers[-1].mlp.experts)).parameters
    ),
}


@pytest.mark.parametrize("name", ON_A_MODEL)
def test_a_model_says_what_is_asked_of_it(name, model):
    assert ON_A_MODEL[name](model)


def test_continuous_batching_says_where_its_texts_end():
    assert upstream.ENDS_OF_TEXTS in PagedAttentionArgs.__annotations__


def test_tied_weights_names_the_one_that_is_kept():
    config = zoo_model("qwen3_moe").config
    config.tie_word_embeddings = True
    tied = build_tied(config)
    assert upstream.tied_weights(tied) == {"lm_head.weight": "model.embed_tokens.weight"}


def build_tied(config):
    with torch.device("meta"):
        return zoo_model("qwen3_moe").model_class._from_config(config)


def test_mark_initialised_keeps_from_pretrained_from_filling_a_parameter():
    from transformers import initialization

    parameter = torch.nn.Parameter(torch.zeros(3))
    upstream.mark_initialised(parameter)
    initialization.normal_(parameter)
    assert not parameter.any()


def test_is_hooked_by_accelerate_sees_its_hooks():
    from accelerate.hooks import ModelHook, add_hook_to_module

    module = torch.nn.Linear(1, 1)
    assert not upstream.is_hooked_by_accelerate(module)
    add_hook_to_module(module, ModelHook())
    assert upstream.is_hooked_by_accelerate(module)


def test_own_hooks_is_where_transformers_collects_outputs(model):
    model(torch.tensor([[1]]), output_router_logits=True)
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert hooks
    assert all(hook.__module__.startswith(upstream.OWN_HOOKS) for hook in hooks)
    assert Path(inspect.getsourcefile(inspect.unwrap(moe.use_experts_implementation))).name == "moe.py"


def test_move_rows_are_all_methods_of_a_cache_that_change_the_order_or_number_of_its_rows():
    """By their parameters: another one upstream would be missed here."""
    parameters = {"beam_idx", "indices", "repeats"}
    found = [
        name
        for name, method in vars(transformers.Cache).items()
        if inspect.isfunction(method) and parameters & set(inspect.signature(method).parameters)
    ]
    assert sorted(found) == sorted(upstream.MOVE_ROWS)
    assert "reorder_cache(beam_idx)" in inspect.getsource(generation)


def test_forget_tokens_are_all_methods_of_a_cache_that_leave_fewer_tokens_in_it(model):
    """By their parameter, or by having none: another one upstream would be missed here."""
    names = [
        name
        for name, method in vars(transformers.Cache).items()
        if inspect.isfunction(method) and "tokens_to_remove" in inspect.signature(method).parameters
    ]
    assert sorted([*names, "reset"]) == sorted(upstream.FORGET_TOKENS)
    cache = DynamicCache(config=model.config)
    model(torch.tensor([[1, 2, 3]]), **{upstream.kv_cache_parameter(type(model).forward): cache})
    cache.crop(-2)
    assert upstream.num_tokens_in(cache) == 1
    cache.reset()
    assert upstream.num_tokens_in(cache) == 0


def test_generate_asks_for_the_compiled_call_by_its_name():
    assert f".{upstream.COMPILED_CALL}(" in inspect.getsource(generation)


@pytest.mark.parametrize("name", zoo_names())
def test_kv_cache_parameter_is_what_generate_passes_the_cache_in(name):
    cls = zoo_model(name).model_class
    parameter = upstream.kv_cache_parameter(cls.forward)
    if not cls.can_generate():
        return
    assert parameter in inspect.signature(cls.forward).parameters
    taken = inspect.getsource(inspect.unwrap(generation.GenerationMixin.prepare_inputs_for_generation))
    assert f'model_inputs["{parameter}"]' in taken


def test_an_encoder_has_no_kv_cache_parameter():
    assert upstream.kv_cache_parameter(lambda self, input_ids, attention_mask=None: None) is None


def test_the_cache_of_an_output_is_found_in_objects_and_tuples(model):
    ids = torch.tensor([[1, 2]])
    for outputs in (model(ids, use_cache=True), model(ids, use_cache=True, return_dict=False)):
        assert upstream.num_tokens_in(upstream.kv_cache_of_output(outputs)) == 2
    assert upstream.kv_cache_of_output(model(ids, use_cache=False)) is None


def test_a_call_is_read_by_the_names_of_its_parameters_however_it_is_passed(model):
    cache, parameter = DynamicCache(config=model.config), upstream.kv_cache_parameter(type(model).forward)
    assert upstream.arguments(model, (1, 2), {"use_cache": True}) == {
        "input_ids": 1,
        "attention_mask": 2,
        "use_cache": True,
    }
    assert upstream.kv_cache(model, (1, 2, None, cache), {}) is cache
    assert upstream.kv_cache_name({"input_ids": None, parameter: cache}) == parameter
    outputs = model(torch.tensor([[1]]), use_cache=True)
    assert upstream.kv_cache_argument(model, outputs) == {parameter: outputs[1]}


def test_what_is_ignored_on_load_is_ignored_for_one_load(model):
    before = upstream.ignored_on_load_unexpected(model)
    upstream.ignore_on_load_unexpected(model, {"an.extra.tensor"})
    assert "^an\\.extra\\.tensor$" in upstream.ignored_on_load_unexpected(model)
    upstream.end_of_load(model)
    assert upstream.ignored_on_load_unexpected(model) == before


def test_a_static_cache_counts_the_tokens_that_it_holds(model):
    cache = StaticCache(config=model.config, max_cache_len=8)
    assert upstream.num_tokens_in(cache) == 0
    model(torch.tensor([[1, 2, 3]]), use_cache=True, **{upstream.kv_cache_parameter(type(model).forward): cache})
    assert upstream.num_tokens_in(cache) == 3
    for layer in cache.layers:
        assert {"keys", "values", "cumulative_length"} <= set(vars(layer))


def test_a_cache_of_another_kind_is_refused_by_its_type_and_the_parameter_it_was_given_in(model):
    parameter = upstream.kv_cache_parameter(type(model).forward)
    with pytest.raises(UnsupportedModelError, match=f"{parameter} of type tuple"):
        upstream.kv_cache(model, (), {parameter: ((torch.zeros(1),),)})


def test_the_installed_version_is_among_those_that_are_tested():
    assert re.match(r"\d+\.\d+", transformers.__version__).group() in upstream.TESTED


def test_a_newer_minor_version_is_told_once_with_both_versions(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            upstream.warn_if_untested("5.99.1")
        upstream.warn_if_untested(f"{upstream.TESTED[-1]}.7")
    (record,) = caplog.records
    assert "5.99.1" in record.message
    assert upstream.TESTED[-1] in record.message


def test_a_missing_hook_is_an_import_error_that_names_it_and_the_tested_versions():
    def imported_without():
        del core_model_loading.rename_source_key
        forget_the_package()
        try:
            importlib.import_module("transformers_moe_offload")
        except ImportError as error:
            return f"{type(error).__name__} {error}"

    said = in_a_child(imported_without)
    assert said.startswith("UpstreamError")
    assert "rename_source_key" in said
    assert f"{upstream.TESTED[0]} to {upstream.TESTED[-1]}" in said


def test_a_missing_part_of_peft_is_named(monkeypatch):
    from peft.tuners.lora import layer

    monkeypatch.delattr(layer, "ParamWrapper")
    with pytest.raises(ImportError, match=r"lacks what this package needs of it: peft.tuners.lora.layer.ParamWrapper"):
        _ = upstream.ParamWrapper


PUBLIC_MODULES = re.compile(
    r"(transformers|accelerate|peft|huggingface_hub)$|transformers\.(utils|utils\.logging|cache_utils|"
    r"configuration_utils|trainer_utils)$|huggingface_hub\.(errors|utils)$|peft\.tuners$"
)
EXEMPT = ("hf/upstream.py", "models/adapter_moe/")
"""The file itself, and a model type whose source is published beside its weights, for those without this package."""


def test_nothing_else_imports_what_other_libraries_do_not_promise_to_keep():
    found = []
    for file in sorted(SRC.rglob("*.py")):
        name = file.relative_to(SRC).as_posix()
        if name.startswith(EXEMPT):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                library = (node.module or "").partition(".")[0]
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                if library in ("transformers", "accelerate", "peft", "huggingface_hub") and (
                    private or not PUBLIC_MODULES.match(node.module)
                ):
                    found.append(f"{name}: {node.module}")
    assert found == []


def test_private_attributes_of_models_are_read_in_one_file():
    taken = re.findall(r"\._(?!_)[a-z]\w+", (SRC / "hf" / "upstream.py").read_text())
    private = {name for name in taken if hasattr(PreTrainedModel, name[1:])}
    assert private
    elsewhere = [
        f"{file.relative_to(SRC)}: {name}"
        for file in SRC.rglob("*.py")
        if file.name != "upstream.py"
        for name in private
        if re.search(rf"(model|config|module){re.escape(name)}\b", file.read_text())
    ]
    assert elsewhere == []


def test_every_entry_has_a_contract_here():
    here = Path(__file__).read_text() + Path(__file__).with_name("test_upstream_hooks.py").read_text()
    assert [name for name in upstream.__all__ if not re.search(rf"\b{name}\b", here)] == []
