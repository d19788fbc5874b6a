"""Names of Transformers, accelerate and PEFT that this package uses although they are not stable API.

Public names are imported where they are used. Private names, undocumented modules, and everything that differs between
versions are here, each with the versions that it was checked with, so that a new version breaks one file.
`tests/hf/test_upstream.py` has a contract for every entry, and fails by the entry's name when upstream changes.

Imports nothing of the package but its errors, so `hub`, which imports nothing else of `hf`, may import it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
import transformers
from transformers import Cache

from transformers_moe_offload.errors import UnsupportedModelError, UpstreamError

logger = logging.getLogger(__name__)

TESTED = ("5.23", "5.24")
"""The minor versions of Transformers that the whole test suite was run with, the oldest first."""

# Names. All of them: 5.23, 5.24.
try:
    # How a checkpoint's tensors become parameters: renaming, merging, splitting, and back.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
        revert_weight_conversion,
    )

    # The files that `from_pretrained` reads, and the tied weights that `save_pretrained` leaves out.
    from transformers.modeling_utils import _get_resolved_checkpoint_files as resolved_checkpoint_files
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    # The tables of quantization methods, in which ours is registered.
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
        AutoHfQuantizer,
        AutoQuantizationConfig,
    )
    from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
    from transformers.utils.import_utils import is_peft_greater_or_equal
except ImportError as error:
    raise UpstreamError(
        f"Transformers {transformers.__version__} lacks what this package needs of it: {error}. The package was tested "
        f"with Transformers {TESTED[0]} to {TESTED[-1]}; install one of these, or a newer transformers-moe-offload"
    ) from error

__all__ = [
    "ATTENTION_IMPLEMENTATION",
    "AUTO_QUANTIZATION_CONFIG_MAPPING",
    "AUTO_QUANTIZER_MAPPING",
    "COMPILED_CALL",
    "ENDS_OF_TEXTS",
    "EXPERTS_FLAGS",
    "FORGET_TOKENS",
    "HOOKS",
    "MOVE_ROWS",
    "OWN_HOOKS",
    "PEFT_TYPE_TO_TUNER_MAPPING",  # noqa: F822
    "TESTED",
    "AutoHfQuantizer",
    "AutoQuantizationConfig",
    "Concatenate",
    "ExportableState",  # noqa: F822
    "HfQuantizer",
    "LoraLayer",  # noqa: F822
    "MergeModulelist",
    "ParamWrapper",  # noqa: F822
    "WeightConverter",
    "WeightRenaming",
    "arguments",
    "attention_implementation",
    "auto_classes_of",
    "check_hooks",
    "custom_object_save",  # noqa: F822
    "dot_natural_key",
    "dtype_plan",
    "end_of_load",
    "experts_implementation",
    "get_keys_to_not_convert",
    "get_model_conversion_mapping",
    "has_peft_adapter",
    "ignore_on_load_unexpected",
    "ignored_on_load_missing",
    "ignored_on_load_unexpected",
    "ignored_on_save",
    "initialise",
    "is_hooked_by_accelerate",
    "is_peft_greater_or_equal",
    "kv_cache",
    "kv_cache_argument",
    "kv_cache_name",
    "kv_cache_of_output",
    "kv_cache_parameter",
    "mark_initialised",
    "num_tokens_in",
    "remove_tied_weights_from_state_dict",
    "rename_source_key",
    "resolved_checkpoint_files",
    "revert_weight_conversion",
    "tied_weights",
    "undecorated_forward",
    "warn_if_untested",
]

ATTENTION_IMPLEMENTATION = "_attn_implementation"
"""5.23, 5.24: the attribute of a config that `attention_implementation` returns."""

COMPILED_CALL = "get_compiled_call"
"""5.23, 5.24: the method of a model that returns the callable which `generate` calls in place of the model, with a
static cache (`PreTrainedModel.get_compiled_call`, called by `generation/utils.py`)."""

MOVE_ROWS = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")
"""5.23, 5.24: the methods of a KV cache that reorder or repeat its rows."""

FORGET_TOKENS = ("crop", "reset")
"""5.23, 5.24: the methods of a KV cache that drop tokens of each text."""

HOOKS = {
    transformers.AutoConfig: ("from_pretrained",),
    Cache: (*MOVE_ROWS, *FORGET_TOKENS),
    transformers.PreTrainedModel: ("from_pretrained", "save_pretrained", COMPILED_CALL),
    HfQuantizer: (
        "validate_environment",
        "update_device_map",
        "update_dtype",
        "update_attn_implementation",
        "_process_model_before_weight_loading",
        "param_element_size",
        "get_new_dtype",
        "adjust_max_memory",
        "update_weight_conversions",
        "_process_model_after_weight_loading",
        "get_state_dict_and_metadata",
        "is_serializable",
        "is_trainable",
        "is_compileable",
    ),
}
"""Methods that are wrapped, and methods of a quantizer that Transformers calls (5.23, 5.24). If one no longer existed,
it would not be called, and experts would be loaded or saved as if this package were not installed."""


def check_hooks() -> None:
    """Raise `UpstreamError` if Transformers lacks one of the `HOOKS`."""
    for owner, names in HOOKS.items():
        for name in names:
            if name not in vars(owner):
                raise UpstreamError(
                    f"Transformers {transformers.__version__} has no {owner.__name__}.{name}, which this package "
                    f"needs; it was tested with {TESTED[0]} to {TESTED[-1]}: install one of these, or a newer "
                    f"transformers-moe-offload"
                )


EXPERTS_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
"""5.23, 5.24: attributes in which `use_experts_implementation` (`integrations/moe.py`) describes an experts module."""

ENDS_OF_TEXTS = "cu_seq_lens_q"
"""5.23, 5.24: the argument of a forward of continuous batching that says where in the row each text ends: (N + 1,)
for N texts (`generation/continuous_batching/input_outputs.py`)."""

OWN_HOOKS = "transformers.utils.output_capturing"
"""5.23, 5.24: the module of Transformers' own forward hooks, which collect tensors that are among the outputs."""

_LATER = {
    "ExportableState": "transformers.trainer_callback",
    "custom_object_save": "transformers.dynamic_module_utils",
    "PEFT_TYPE_TO_TUNER_MAPPING": "peft.mapping",
    "LoraLayer": "peft.tuners.lora.layer",
    "ParamWrapper": "peft.tuners.lora.layer",
}
"""Names imported at first use, because their modules are optional or slow to import: the state of a callback that
Trainer keeps in a checkpoint, and the function that writes the source of a model class beside its weights (5.23, 5.24);
PEFT's table of methods, and its wrappers of modules and parameters (0.21)."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    library = importlib.import_module(_LATER[name].partition(".")[0])
    try:
        return getattr(importlib.import_module(_LATER[name]), name)
    except (ImportError, AttributeError) as error:
        raise UpstreamError(
            f"{library.__name__} {library.__version__} lacks what this package needs of it: {_LATER[name]}.{name}. The "
            f"package was tested with Transformers {TESTED[0]} to {TESTED[-1]} and PEFT 0.21; install one of these, or "
            f"a newer transformers-moe-offload"
        ) from error


@functools.cache
def warn_if_untested(version: str = transformers.__version__) -> None:
    """Warn, once a process, if this is a minor version of Transformers newer than all that were tested."""
    found = _minor(version)
    if found > _minor(TESTED[-1]):
        logger.warning(
            f"Transformers {version} is newer than the versions that transformers-moe-offload was tested with, "
            f"{TESTED[0]} to {TESTED[-1]}; if something fails, try one of these"
        )


def _minor(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


# The KV cache: the argument of a forward that is called `past_key_values` (`cache_params` in Mamba models) in 5.23 and
# `cache` in 5.24, where the old names still work in calls, with a FutureWarning, until 5.40. It is found by the
# annotations of the forward's signature and by the types of arguments, so that it may be renamed again.

_FORMER_NAMES = ("cache", "past_key_values", "cache_params")
"""Names of the parameter if signatures are not annotated; also used to reject caches of unknown types."""


def kv_cache_parameter(forward: Callable[..., Any]) -> str | None:
    """The name of the parameter that takes the KV cache; None if the forward has none, as encoders."""
    return next(iter(_kv_cache_parameters(inspect.unwrap(forward))), None)


def kv_cache(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Cache | None:
    """The KV cache among the arguments of a call of this module, by any name or position; None if there is none.

    Raises `UnsupportedModelError` if the argument for it is not a `Cache` of Transformers.
    """
    found = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
    if found is not None:
        return found
    forward, given = inspect.unwrap(type(module).forward), arguments(module, args, kwargs)
    for name in {*_kv_cache_parameters(forward), *_FORMER_NAMES}:
        value = given.get(name)
        if value is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} was called with {name} of type {type(value).__name__}, which is not a "
                f"Cache of Transformers: what it holds, and so the position of every new token, is unknown; pass a "
                f"DynamicCache or a StaticCache"
            )
    return None


def arguments(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of this module, by the names of its forward's parameters."""
    parameters = _parameters(inspect.unwrap(type(module).forward))[1:]
    return {one.name: value for one, value in zip(parameters, args, strict=False)} | dict(kwargs)


def kv_cache_argument(model: Any, outputs: Any) -> dict[str, Any]:
    """The keyword argument that passes the KV cache in a model's outputs to the next forward; empty without a cache."""
    name, cache = kv_cache_parameter(type(model).forward), kv_cache_of_output(outputs)
    return {} if name is None or cache is None else {name: cache}


def kv_cache_name(inputs: Mapping[str, Any]) -> str | None:
    """Which of these keyword arguments is the KV cache; None if there is none."""
    return next((name for name, value in inputs.items() if isinstance(value, Cache)), None)


def num_tokens_in(cache: Cache) -> int:
    """How many tokens of each text a KV cache holds.

    Raises `UnsupportedModelError` if the cache does not know, for instance without attention layers.
    """
    try:
        return int(cache.get_seq_length())  # sync: device -> host, for a static cache
    except (ValueError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"a {type(cache).__name__} does not tell how many tokens it holds, so the position of every new token is "
            f"unknown: {error}"
        ) from error


def kv_cache_of_output(output: Any) -> Cache | None:
    """The KV cache that a forward returns, in an output object or in a tuple; None if it returns none."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    return next((value for value in values if isinstance(value, Cache)), None)


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    return tuple(inspect.signature(forward).parameters.values())


@functools.cache
def _kv_cache_parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    parameters = _parameters(forward)
    found = [one.name for one in parameters if _is_cache(one.annotation)]
    return tuple(found or [name for name in _FORMER_NAMES if any(one.name == name for one in parameters)])


def _is_cache(annotation: Any) -> bool:
    if isinstance(annotation, str):  # a module that has `from __future__ import annotations`
        return re.search(r"\b(\w*[a-z])?Cache\b", annotation) is not None
    return any(isinstance(one, type) and issubclass(one, Cache) for one in (annotation, *get_args(annotation)))


# Attributes of models, modules and parameters.


def has_peft_adapter(model: Any) -> bool:
    """5.23, 5.24: whether `add_adapter` or `load_adapter` of Transformers itself has added an adapter."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def dtype_plan(model: Any, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """5.23, 5.24: pattern of parameters -> the dtype that they keep when a model is loaded in `dtype`."""
    return dict(model._get_dtype_plan(dtype) or {})


def tied_weights(model: Any) -> dict[str, str]:
    """5.23, 5.24: tied parameters: name -> the name of the parameter that it shares memory with."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def ignored_on_save(model: Any) -> tuple[str, ...]:
    """5.23, 5.24: names in a model's state dict that `save_pretrained` leaves out."""
    return tuple(model._keys_to_ignore_on_save or ())


def ignored_on_load_unexpected(model: Any) -> tuple[str, ...]:
    """5.23, 5.24: patterns of tensors that a checkpoint may have and the model does not."""
    return tuple(model._keys_to_ignore_on_load_unexpected or ())


def ignore_on_load_unexpected(model: Any, names: set[str]) -> None:
    """5.23, 5.24: do not report these tensors as unexpected in the current load."""
    patterns = {*ignored_on_load_unexpected(model), *(f"^{re.escape(name)}$" for name in names)}
    model._keys_to_ignore_on_load_unexpected = patterns


def end_of_load(model: Any) -> None:
    """5.23, 5.24: undo `ignore_on_load_unexpected`."""
    vars(model).pop("_keys_to_ignore_on_load_unexpected", None)


def ignored_on_load_missing(model: Any) -> tuple[str, ...]:
    """5.23, 5.24: patterns of tensors that the model has and a checkpoint need not."""
    return tuple(model._keys_to_ignore_on_load_missing or ())


def attention_implementation(config: Any) -> str | None:
    """5.23, 5.24: the attention implementation of a model with this config; it can change between two forwards."""
    return getattr(config, ATTENTION_IMPLEMENTATION, None)


def experts_implementation(config: Any) -> str | None:
    """5.23, 5.24: the value of `from_pretrained(experts_implementation=...)`."""
    return getattr(config, "_experts_implementation", None)


def initialise(model: Any, module: torch.nn.Module) -> None:
    """5.23, 5.24: initialise a module, including buffers, as `from_pretrained` does for missing tensors."""
    model._init_weights(module)


def mark_initialised(parameter: torch.nn.Parameter) -> None:
    """5.23, 5.24: keep `from_pretrained` from initialising a parameter that is missing in the checkpoint."""
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def is_hooked_by_accelerate(module: torch.nn.Module) -> bool:
    """accelerate 1: whether it has replaced a module's forward to move weights or inputs."""
    return vars(module).get("_hf_hook") is not None


def undecorated_forward(module: torch.nn.Module) -> Callable[..., Any]:
    """5.23, 5.24: the class's own loop over experts, without the dispatch of `use_experts_implementation`."""
    forward = type(module).forward
    is_decorated = all(flag in vars(module) for flag in EXPERTS_FLAGS)
    return getattr(forward, "__wrapped__", forward) if is_decorated else forward


def auto_classes_of(config: Any, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    """5.23, 5.24: those of these Auto classes that have models for this config, each with its class or classes."""
    found = [(name, getattr(transformers, name)._model_mapping.get(type(config), ())) for name in names]
    return [(name, classes) for name, classes in found if classes]
