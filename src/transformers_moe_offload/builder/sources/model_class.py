"""A model without weights: what `save_pretrained` of its class writes, the name, shape and dtype of every tensor.

The class itself is built on the meta device and asked, so that the answer is right for any installed version of
Transformers. Nothing is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.hf.upstream import (
    dtype_plan,
    ignored_on_save,
    initialise,
    revert_weight_conversion,
    tied_weights,
)


def on_meta(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """The model of this config, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype).eval()  # this sets its dtype


def saved_tensors(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> dict[str, FieldSpec]:
    """The tensors of a checkpoint of this class in this dtype, tied weights once."""
    cls: Any = type(config)
    return dict(_layout(config.to_json_string(use_diff=False), cls, dtype))


def names_in_memory(config: PreTrainedConfig) -> dict[str, str]:
    """Names on disk -> names in memory, for all tensors that are stored unconverted; experts may be converted."""
    model = on_meta(config)
    state = _saved(model)
    in_memory = {id(tensor): name for name, tensor in state.items()}
    stored = revert_weight_conversion(model, dict(state))
    return {name: in_memory[id(tensor)] for name, tensor in stored.items() if id(tensor) in in_memory}


def experts_paths(config: PreTrainedConfig) -> dict[int, str]:
    """Where the experts of each decoder layer are in memory."""
    names = (name for name in on_meta(config).state_dict() if name.endswith(".gate_up_proj"))
    return {int(name.split(".")[2]): name.removesuffix(".gate_up_proj") for name in names}


def fill_buffers(model: nn.Module, device: str = "cpu", stored: Container[str] = ()) -> None:
    """Give buffers that no checkpoint has (rotary frequencies) their values; those named in `stored` stay without."""
    for path, module in model.named_modules():
        meta = [name for name, buffer in module.named_buffers(recurse=False) if buffer.device.type == "meta"]
        names = [name for name in meta if f"{path}.{name}" not in stored]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if names:
            # How from_pretrained of Transformers 5.23 fills buffers that are in no checkpoint.
            initialise(model, module)


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Make a tensor a module's parameter, or its buffer if it was one."""
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    if attribute in owner._buffers:
        owner._buffers[attribute] = value
    else:
        owner._parameters[attribute] = nn.Parameter(value, requires_grad=False)


@lru_cache(maxsize=16)
def _layout(config: str, cls: Any, dtype: torch.dtype) -> Mapping[str, FieldSpec]:
    model = on_meta(cls.from_dict(json.loads(config)), dtype)
    wide = dtype_plan(model, dtype)
    state = {}
    for name, tensor in _saved(model).items():
        kept = next((kind for pattern, kind in wide.items() if re.search(pattern.replace("*", ".*"), name)), None)
        state[name] = tensor if kept is None else tensor.to(kept)
    stored = revert_weight_conversion(model, state)
    return {name: FieldSpec(name, tuple(one.shape), dtype_name(one.dtype)) for name, one in stored.items()}


def _saved(model: Any) -> dict[str, Tensor]:
    """The model's tensors that are saved, by their names in memory."""
    ignored = {*ignored_on_save(model), *tied_weights(model)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
