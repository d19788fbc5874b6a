"""`save_pretrained` of a model with quantized weights: writes a prebuilt checkpoint, as `moe-offload quantize` does.

A complete checkpoint in the folder is replaced as a whole, once the new one is complete.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.config.budget import Budget
from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.errors import CheckpointError, ConfigError, UnsupportedModelError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.formats.base import LayerCodecs
from transformers_moe_offload.formats.codec import ExpertCodec
from transformers_moe_offload.formats.foreign import ForeignCodec
from transformers_moe_offload.hf.arguments import refuse_on_save, to_save
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts
from transformers_moe_offload.hf.model.handle import OffloadRuntime
from transformers_moe_offload.hf.model.own_experts import is_of_own_experts, named_own_experts
from transformers_moe_offload.hf.packed_linear import HqqLinear
from transformers_moe_offload.hf.prebuilt.layout import MARKS, LayerContent, plain_config, prebuilt_config, shards_of
from transformers_moe_offload.hf.prebuilt.writer import finish, write_shards
from transformers_moe_offload.hf.upstream import has_peft_adapter, remove_tied_weights_from_state_dict
from transformers_moe_offload.output.place import replacing
from transformers_moe_offload.output.shards import MAX_SHARD_BYTES, Content
from transformers_moe_offload.store.encoding import encoded_row, row_of
from transformers_moe_offload.store.layer_source import LayerSource
from transformers_moe_offload.tensor_files.writer import as_json, write_text

_OTHERS = (ADAPTER_CONFIG_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
"""Files of other checkpoints that Transformers would load instead of, or together with, a prebuilt one."""


def save(plain: Callable[..., Any], model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """What `save_pretrained` does: quantized weights are saved as they are, other models with the given `state_dict` by
    the `plain` method, and neither into a folder with an adapter."""
    runtime = getattr(model, "moe_offload", None)
    if not isinstance(runtime, OffloadRuntime):
        expect_whole(model)
        return plain(model, save_directory, *args, **kwargs)
    options = inspect.signature(plain).bind(model, save_directory, *args, **kwargs).arguments
    if not has_peft_adapter(model):
        runtime.expect_in_place()
        expect_no_adapter(Path(save_directory))
    is_quantized = runtime.is_quantized and not has_peft_adapter(model)
    refuse_on_save(options, is_quantized=is_quantized)
    if not is_quantized:
        token = to_save.set(options.get("state_dict"))
        try:
            return plain(model, save_directory, *args, **kwargs)
        finally:
            to_save.reset(token)
    if not options.get("is_main_process", True):
        return None
    save_quantized(model, Path(save_directory), options.get("state_dict"), options.get("max_shard_size"))
    if options.get("push_to_hub"):
        repo = {"repo_id": Path(save_directory).name, "token": options.get("token")}
        size = {name: options[name] for name in ("max_shard_size",) if name in options}
        model.push_to_hub(**repo | size | options.get("kwargs", {}))
    return None


def expect_no_adapter(folder: Path) -> None:
    """Raise `CheckpointError` if the folder has an adapter, which would be loaded together with the saved model."""
    _expect_none_of(folder, (ADAPTER_CONFIG_NAME,))


def _expect_none_of(folder: Path, names: Sequence[str]) -> None:
    found = [name for name in names if (folder / name).is_file()]
    if found:
        raise CheckpointError(
            f"{folder} has {found[0]} of another checkpoint, which would be loaded together with the saved model; save "
            f"to another folder, or remove it"
        )


def expect_whole(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` for a part of an offloaded model, which has no sources of its experts."""
    offloaded = next((name for name, part in model.named_modules() if isinstance(part, OffloadedExperts)), None)
    if offloaded is not None and not has_peft_adapter(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a part of an offloaded model, or has such a part, and would be saved without "
            f"the experts of {offloaded}; save the whole model that was loaded, or restore() that one first"
        )


def save_quantized(
    model: Any,
    folder: Path,
    state_dict: Mapping[str, Tensor] | None,
    max_shard_size: int | str | None,
) -> None:
    """Write the model, in its current format, into a folder that may hold other files.

    `state_dict` has weights to save in place of the model's own, under the same names; experts in low bits are always
    the model's own. The records of a layer are one tensor, whatever `max_shard_size` is. Raises `ConfigError` for other
    names and for an invalid size.
    """
    runtime: OffloadRuntime = model.moe_offload
    _expect_none_of(folder, _OTHERS)
    recipe = _recipe(model)
    own = model.state_dict()
    state_dict = own if state_dict is None else state_dict
    _expect_known(state_dict, own)
    shards = shards_of(list(_layers(runtime, state_dict)), list(_dense(model, state_dict)), _bytes(max_shard_size))
    with replacing(folder, recipe | {"written_by": "save_pretrained"}, MARKS) as place:
        write_shards(place, shards)
        write_text(place / "config.json", as_json(prebuilt_config(plain_config(model, model.dtype), recipe)))
        if model.can_generate():
            model.generation_config.save_pretrained(place)
        finish(place, shards)


def _recipe(model: Any) -> dict[str, Any]:
    """How the model's weights are stored now: `resize_token_embeddings` has replaced a packed head by a plain one."""
    config: OffloadConfig = model.moe_offload.config
    if not isinstance(model.get_output_embeddings(), HqqLinear):
        config = replace(config, lm_head=None)
    return config.recipe()


def _expect_known(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    unknown = next((name for name in state_dict if name not in own), None)
    if unknown is not None:
        raise ConfigError(
            f"the state_dict to be saved holds {unknown}, which is not in this model: its weights are in low bits, and "
            f"are saved as they are; give names of model.state_dict(), or restore() the model first"
        )


def _bytes(max_shard_size: int | str | None) -> int:
    """A size as `save_pretrained` takes it, in bytes; at most the size that the Hub recommends."""
    if max_shard_size is None:
        return MAX_SHARD_BYTES
    nbytes = Budget.parse(max_shard_size, "max_shard_size").nbytes
    if nbytes is None:
        raise ConfigError(f"max_shard_size={max_shard_size!r} is not a size; write bytes as an int, or such as '5GB'")
    return min(nbytes, MAX_SHARD_BYTES)


def _layers(runtime: OffloadRuntime, state_dict: Mapping[str, Tensor]) -> Iterator[LayerContent]:
    for layer in runtime.layers:
        source = runtime.source(layer)
        own: dict[int, dict[str, Tensor]] = {}
        for name, expert, field in named_own_experts(state_dict, layer.name):
            own.setdefault(expert, {})[field] = state_dict[name].detach()
        usual, hot = (
            codec if isinstance(codec, ExpertCodec) else ExpertCodec(source.spec.fields, None)
            for codec in (source.codecs.usual, source.codecs.hot)
        )
        codecs = LayerCodecs(usual, hot, source.codecs.hot_experts)
        yield LayerContent.coded(layer.name, layer.num_experts, codecs, partial(_record, source, codecs, own))


def _record(source: LayerSource, codecs: LayerCodecs, own: Mapping[int, Mapping[str, Tensor]], expert: int) -> Tensor:
    """One expert's record: its stored bytes, decoded if in another method's format; the given weights if in `own`."""
    if expert in own:
        return row_of(own[expert], codecs.of(expert), f"expert {expert} of {source.spec.name}")
    is_ours = not isinstance(source.codecs.of(expert), ForeignCodec)
    return source.read_record(expert) if is_ours else encoded_row(source, codecs, expert)


def _dense(model: Any, state_dict: Mapping[str, Tensor]) -> Iterator[Content]:
    tensors = {name: tensor for name, tensor in state_dict.items() if not is_of_own_experts(name)}
    for name, tensor in remove_tied_weights_from_state_dict(tensors, model).items():
        spec = FieldSpec(name, tuple(tensor.shape), dtype_name(tensor.dtype))
        yield Content((spec,), partial(_on_host, name, tensor))


def _on_host(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous()}
