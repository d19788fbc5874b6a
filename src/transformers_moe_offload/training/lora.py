"""LoRA configs for parts of mixture-of-experts models, and merged checkpoints."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from transformers_moe_offload.errors import ConfigError, UnsupportedModelError
from transformers_moe_offload.hf.loading.discover import find_experts
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts, layer_of
from transformers_moe_offload.hf.model.handle import runtime_of
from transformers_moe_offload.hf.model.saving import expect_no_adapter
from transformers_moe_offload.hf.peft.placeholders import is_adaptable
from transformers_moe_offload.training.recipes import attention, experts_paths, router_paths

if TYPE_CHECKING:
    from peft import LoraConfig


def lora_config(
    model: Any, *, experts: bool = True, attention: bool = True, routers: bool = False, **options: Any
) -> LoraConfig:
    """A PEFT config for the routed experts, the attention's linear layers, or both; `routers` are trained in full.

    `options` are LoraConfig's. The config has the names of the plain model, so config and adapter work with the plain
    and the offloaded model.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError("lora_config needs peft; run: pip install 'transformers-moe-offload[adapters]'") from error
    found: dict[str, Any] = {
        "target_parameters": _expert_fields(model) if experts else None,
        "target_modules": _attention_linears(model) if attention else [],
    }
    if routers:
        found["modules_to_save"] = sorted({".".join(path.split(".")[-2:]) for path in router_paths(model)})
    if not found["target_parameters"] and not found["target_modules"]:
        raise ConfigError("neither experts nor attention are to be adapted; set experts=True or attention=True")
    for name in found.keys() & options.keys():
        raise ConfigError(f"{name}={options[name]!r} is set by lora_config itself; use peft.LoraConfig to choose it")
    return LoraConfig(**found, **options)


def save_merged(model: Any, folder: str | os.PathLike[str], **options: Any) -> None:
    """Write the plain model with a PEFT model's active adapters merged into it; the model itself stays as it is.

    `options` are those of `save_pretrained`. Experts in low bits are decoded first: the sum could not be written in low
    bits without changing it. Needs memory for the whole plain model.
    """
    runtime_of(model)  # raises if the model is not offloaded
    expect_no_adapter(Path(folder))
    copied = deepcopy(model)
    runtime_of(copied).restore()
    copied.merge_and_unload().save_pretrained(folder, **options)


def _expert_fields(model: nn.Module) -> list[str]:
    """The experts' matrices, each by the last two parts of its name."""
    plain = {path: layout.fields(module) for path, module, layout in find_experts(model)}
    found = set()
    for path in experts_paths(model):
        module = model.get_submodule(path)
        fields = layer_of(module).fields if isinstance(module, OffloadedExperts) else plain[path]
        for field in fields:
            if is_adaptable(field):
                found.add(f"{path.rpartition('.')[2]}.{field.name}")
            elif len(field.shape) == 2 and not field.name.endswith("_bias"):
                raise UnsupportedModelError(
                    f"{field.name} of {path} is not a matrix for each expert stacked in one parameter, which is "
                    f"what LoRA on experts needs; use experts=False"
                )
    return sorted(found)


def _attention_linears(model: nn.Module) -> list[str]:
    names = {name.rpartition(".")[0] for name in attention(model)}
    linears = {name for name in names if isinstance(model.get_submodule(name), nn.Linear)}
    return sorted({name.rpartition(".")[2] for name in linears})
