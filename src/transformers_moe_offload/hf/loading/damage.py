"""Explain why Transformers could not load a checkpoint whose config or index is damaged.

Transformers reads both before our code runs, and damage raises arbitrary Python exceptions. If offloading was
requested, such an exception becomes one of our errors that names the file; any other is passed on. Files are only
checked after a failure, so loading an intact checkpoint costs nothing more, except that the config is parsed before:
Transformers would spend minutes logging one that is nested too deeply.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, cached_file

from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.errors import CheckpointError, MoeOffloadError
from transformers_moe_offload.hf.prebuilt.names import INDEX_NAME
from transformers_moe_offload.hf.upstream import AutoHfQuantizer, AutoQuantizationConfig
from transformers_moe_offload.tensor_files.index import WeightMap
from transformers_moe_offload.untrusted import json_object, one_line, quoted

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_KINDS: Mapping[str, tuple[type, ...]] = {
    "model_type": (str,), "text_config": (dict,), "quantization_config": (dict,), "transformers_weights": (str,),
    "auto_map": (dict,), "dtype": (str, dict), "torch_dtype": (str, dict),
}  # fmt: skip
"""Types of some optional entries of a config."""
_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_MANY_LAYERS = 300
"""Twice as many as any model has. A config with more must belong to an index with at least one tensor per layer."""


def explaining(load: Any) -> Any:
    """Wrap a `from_pretrained` so that its errors name damaged files."""

    @functools.wraps(load)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        is_asked = OffloadConfig.make(kwargs.get("moe_offload")) or isinstance(
            kwargs.get("quantization_config"), OffloadConfig
        )
        config = kwargs.get("config") or pretrained_model_name_or_path
        if is_asked and not isinstance(config, PretrainedConfig):
            path = _find(config, CONFIG_NAME, kwargs)
            if path is not None:
                json_object(path)
        try:
            return load(cls, pretrained_model_name_or_path, *model_args, **kwargs)
        except Exception as error:
            if is_asked and not isinstance(error, MoeOffloadError):
                _expect_sound(cls, pretrained_model_name_or_path, kwargs, error)
            raise

    return from_pretrained


def expect_layers(name_or_path: Any, kwargs: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for a config with more layers than its index has tensors: Transformers would build a
    module for each layer and run for a very long time."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    counts = [(count, name) for part in parts for name in _COUNTS if type(count := part.get(name)) is int]
    count, name = max(counts, default=(0, ""))
    if count > _MANY_LAYERS:
        path = _find(name_or_path, _index_name(config, kwargs), kwargs)
        num_tensors = 0 if path is None else len(WeightMap.read(path).files)
        if count > num_tensors:
            raise CheckpointError(
                f"the config of {name_or_path} says {name}={quoted(count)}, but the checkpoint has an index of "
                f"{num_tensors:,} tensors; the config does not belong to these weights"
            )


def _expect_sound(cls: Any, name_or_path: Any, kwargs: Mapping[str, Any], error: Exception) -> None:
    """Raise `CheckpointError` if a damaged config or index made Transformers fail."""
    given = kwargs.get("config")
    if isinstance(given, PretrainedConfig):
        is_of_checkpoint = given._name_or_path == str(name_or_path)
        path = _find(name_or_path, CONFIG_NAME, kwargs) if is_of_checkpoint else None
    else:
        path = _find(given or name_or_path, CONFIG_NAME, kwargs)
    try:
        config = {} if path is None else _sound_config(path, error)
        name = _index_name(config, kwargs)
        index = _find(name_or_path, name, kwargs)
        if index is not None:
            WeightMap.read(index, needs_metadata=True)
        if path is not None:
            _expect_model(cls, path, config)
    except CheckpointError as cause:
        raise cause from error
    if index is None and name == INDEX_NAME and Path(str(name_or_path)).is_dir():
        raise CheckpointError(
            f"{path} says that the experts are quantized in our format, but {name_or_path} has no {name}; copy or "
            f"download it again"
        ) from error


def _sound_config(path: Path, error: Exception) -> dict[str, Any]:
    """The content of a config; raises `CheckpointError` if it is damaged. `error` is what Transformers raised."""
    config = json_object(path)
    for name, kinds in _KINDS.items():
        is_there = config.get(name) is not None or (name == "auto_map" and name in config)
        if is_there and not isinstance(config[name], kinds):
            raise CheckpointError(f"{path} has {name}={quoted(config[name])}, which is not a {kinds[0].__name__}")
    weights = config.get("transformers_weights")
    if weights is not None and not weights.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(f"{path} has transformers_weights={quoted(weights)}, which is not a file of weights")
    too_large = next((number for number in _numbers(config) if abs(number) >= 2**63), None)
    if too_large is not None:
        raise CheckpointError(f"{path} has the number {quoted(too_large)}, which no model has anything of")
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization.get("quant_method"), str):
        raise CheckpointError(
            f"{path} has a quantization_config without the name of a method: its quant_method is "
            f"{quoted(quantization.get('quant_method'))}; take quantization_config out if nothing is quantized"
        )
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING and "auto_map" not in config and isinstance(error, ValueError | KeyError):
        raise CheckpointError(f"{path} has model_type={quoted(model_type)}, which Transformers does not know")
    known = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else PretrainedConfig  # noqa: SIM401  lazy
    try:
        made = known.from_dict(dict(config))
        repr(made)  # Transformers logs it
        if quantization is not None and AutoHfQuantizer.supports_quant_method(quantization):
            AutoQuantizationConfig.from_dict(dict(quantization))
    except MoeOffloadError:
        raise
    except Exception as cause:
        raise CheckpointError(f"{path} is not a valid {known.__name__}: {one_line(cause)}") from cause
    if not isinstance(made.get_text_config(), PretrainedConfig):
        raise CheckpointError(f"{path} has a text_config, which {known.__name__} does not have")
    return config


def _expect_model(cls: Any, path: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if Transformers cannot build a model from a readable config."""
    build = getattr(cls, "from_config", None) or getattr(cls, "_from_config", None)
    if build is None or "auto_map" in config or config.get("model_type") not in CONFIG_MAPPING:
        return
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    try:
        with torch.device("meta"):
            build(CONFIG_MAPPING[config["model_type"]].from_dict(plain))
    except Exception as cause:
        reason = f"{type(cause).__name__}: {one_line(cause)}"
        raise CheckpointError(f"no model can be built from {path}: {reason}") from cause


def _numbers(value: Any) -> Iterator[int]:
    """All integers in nested lists and objects."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _numbers(one)


def _index_name(config: Mapping[str, Any], kwargs: Mapping[str, Any]) -> str:
    """The index that Transformers looks for."""
    if (config.get("quantization_config") or {}).get("quant_method") == OffloadConfig.quant_method:
        return INDEX_NAME
    name = config.get("transformers_weights")
    if isinstance(name, str) and name.endswith(".json"):
        return name
    variant = kwargs.get("variant")
    return (
        SAFE_WEIGHTS_INDEX_NAME.replace("index.json", f"index.{variant}.json") if variant else SAFE_WEIGHTS_INDEX_NAME
    )


def _find(name_or_path: Any, file: str, kwargs: Mapping[str, Any]) -> Path | None:
    """A file of a checkpoint, if it is on this machine."""
    options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
    try:
        found = cached_file(str(name_or_path), file, **options | {"local_files_only": True, "force_download": False})
    except (OSError, ValueError):  # missing, or an invalid file name
        return None
    return None if found is None else Path(found)
