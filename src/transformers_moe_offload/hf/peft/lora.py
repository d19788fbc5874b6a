"""PEFT's LoRA, for models with offloaded experts.

PEFT adds an adapter to a stack of experts by computing the whole sum in every forward (`ParamWrapper` in
`tuners/lora/layer.py`, 0.21). Here its wrappers keep their factors, names and bookkeeping, but only register the
factors: the layer applies them to the experts that tokens chose. Everything else, and every other module, is PEFT's.
"""

# E experts, R rank

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora
from torch import nn

from transformers_moe_offload.compute.deltas import LowRank
from transformers_moe_offload.errors import ConfigError, UnsupportedModelError
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts, layer_of, offloaded
from transformers_moe_offload.hf.packed_linear import HqqLinear, no_merge, no_training
from transformers_moe_offload.hf.peft.active_deltas import adding
from transformers_moe_offload.hf.peft.placeholders import is_adaptable, offloaded_layers, placeholder_of, placeholders
from transformers_moe_offload.hf.upstream import LoraLayer
from transformers_moe_offload.hf.upstream import ParamWrapper as PlainParamWrapper


class ParamWrapper(PlainParamWrapper):
    """Wraps one parameter of an experts module. PEFT recognises its wrappers by the name of this class."""

    def get_param(self) -> nn.Parameter:
        """The parameter, or its placeholder while the experts are offloaded."""
        experts = self.get_base_layer()
        if not isinstance(experts, OffloadedExperts):
            return super().get_param()
        held = offloaded(experts)
        return placeholder_of(held, next(field for field in held.layer.fields if field.name == self.parameter_name))

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        experts = self.get_base_layer()
        if not isinstance(experts, OffloadedExperts):
            with super()._activate_lora(active_adapters):
                yield
            return
        additions = [self._low_rank(adapter) for adapter in active_adapters if adapter in self.lora_A]
        with adding(offloaded(experts), self.parameter_name, additions):
            yield

    def _low_rank(self, adapter: str) -> LowRank:
        down = self.lora_A[adapter].weight  # (E * R, in), experts one after another
        up = self.lora_B[adapter].weight  # (out, R * E), experts side by side for each of the ranks
        down = down.unflatten(0, (self.num_experts, -1))
        up = up.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1)
        is_transposed = not self._did_swap_in_out_features
        if torch.is_grad_enabled() and (down.requires_grad or up.requires_grad):
            # One node collects the gradients of all experts; indexing would make a full-sized gradient per expert.
            return LowRank(down.unbind(0), up.contiguous().unbind(0), self.scaling[adapter], is_transposed)
        return LowRank(down, up, self.scaling[adapter], is_transposed)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Add the adapter to the parameter; raises `ConfigError` while the experts are offloaded."""
        if isinstance(self.get_base_layer(), OffloadedExperts):
            raise _no_merge(layer_of(self.get_base_layer()).name)
        super().merge(*args, **kwargs)


class LoraModel(lora.LoraModel):
    """Injects LoRA adapters, also on offloaded experts."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, with placeholders for the parameters of offloaded experts."""
        with placeholders(model):
            super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check_new_adapter_config(self, config: lora.LoraConfig) -> None:
        super()._check_new_adapter_config(config)
        _refuse(self.model, config)

    def _create_and_replace(
        self,
        lora_config: lora.LoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        weight = getattr(target, "weight", None)
        if kwargs.get("parameter_name") is None and weight is not None and weight.is_meta:
            for path in offloaded_layers(self.model):
                if current_key.startswith(f"{path}."):
                    raise _unknown_layout(path, current_key)
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)

    @staticmethod
    def _create_new_module(lora_config: lora.LoraConfig, adapter_name: str, target: Any, **kwargs: Any) -> nn.Module:
        name = kwargs.get("parameter_name")
        experts = target.get_base_layer() if isinstance(target, PlainParamWrapper) else target
        if name is not None and isinstance(experts, OffloadedExperts):
            return ParamWrapper(target, adapter_name, config=lora_config, **kwargs)
        return lora.LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name, module in self.model.named_modules():
            base = getattr(module, "base_layer", None)
            if isinstance(module, LoraLayer) and isinstance(base, HqqLinear):
                raise no_merge(name)
            if isinstance(module, ParamWrapper) and isinstance(module.get_base_layer(), OffloadedExperts):
                raise _no_merge(layer_of(module.get_base_layer()).name)


_VARIANTS = ("use_dora", "lora_bias", "fan_in_fan_out", "lora_dropout", "layer_replication", "megatron_config")
"""Options that PEFT does not support for parameters, or that change the base model."""


def _refuse(model: nn.Module, config: lora.LoraConfig) -> None:
    """Raise for options that are not supported on offloaded experts or packed layers, before anything is changed."""
    whole = config.modules_to_save or ()
    for path, module in model.named_modules():
        if isinstance(module, HqqLinear) and any(path == one or path.endswith(f".{one}") for one in whole):
            raise no_training(path)
    targets = config.target_parameters or ()
    for path, experts in offloaded_layers(model).items():
        plain_path = path.replace(".base_layer", "")
        for field in layer_of(experts).fields:
            names = {f"{plain_path}.{parameter}" for parameter in field.paths}
            meant = [target for target in targets if any(n == target or n.endswith(f".{target}") for n in names)]
            if not meant:
                continue
            if not is_adaptable(field):
                raise _unknown_layout(plain_path, meant[0])
            for option in _VARIANTS:
                if getattr(config, option, None):
                    raise ConfigError(
                        f"{option}={getattr(config, option)!r} is not supported for LoRA on experts ({meant[0]}); "
                        f"leave it out, or adapt other modules with it in an adapter of their own"
                    )
            if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
                raise ConfigError(
                    f"init_lora_weights={config.init_lora_weights!r} computes with the experts' weights, which are "
                    f"offloaded; use True, False or 'gaussian'"
                )


def _unknown_layout(path: str, target: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"LoRA on {target} is not possible while {path} is offloaded: its experts are not matrices stacked in one "
        f"parameter; exclude it (LoraConfig.exclude_modules), or restore() the model first"
    )


def _no_merge(name: str) -> ConfigError:
    return ConfigError(
        f"adapters on {name} cannot be merged while it is offloaded: its experts are read from the checkpoint as they "
        f"are; restore() the model first, or write a merged checkpoint with training.save_merged"
    )
