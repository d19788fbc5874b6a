"""Attach the runtime to a freshly loaded model: choose each layer's arithmetic and device, and size the caches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.hf.few_rows.swap import use_kernels
from transformers_moe_offload.hf.loading.arithmetic_probe import reproduces
from transformers_moe_offload.hf.model.cache_aware import prefer_residents
from transformers_moe_offload.hf.model.handle import OffloadRuntime
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.hf.model.state_dicts import install_state_dict_hooks
from transformers_moe_offload.hf.packed_linear import HqqLinear
from transformers_moe_offload.hf.peft.register import install_adapters
from transformers_moe_offload.hf.prebuilt.names import GUARD
from transformers_moe_offload.kernels import Activations
from transformers_moe_offload.store.layer_source import LayerSource
from transformers_moe_offload.system.cores import warn_of_idle_threads

logger = logging.getLogger(__name__)


def attach(model: Any, config: OffloadConfig, layers: Sequence[SparseLayer], sources: Sequence[LayerSource]) -> None:
    """Attach an `OffloadRuntime` to a model as `model.moe_offload`; the model is then ready to run."""
    arithmetic = _arithmetic(model, config, layers)
    placed = [replace(layer, mlp=arithmetic.get(layer.index), device=_device_of(model, layer.name)) for layer in layers]
    runtime = OffloadRuntime(model, config, placed)
    for module in model.modules():
        if isinstance(module, HqqLinear):
            module.activations = activations_of(config)
    runtime.attach(sources)
    model.moe_offload = runtime
    if arithmetic:
        use_kernels(model, [layer.name for layer in placed])
    if any(layer.device.type == "cpu" for layer in placed):
        warn_of_idle_threads()
    install_adapters()
    install_state_dict_hooks(model)
    _unmark_as_quantized(model)
    if config.cache_aware is not None:
        prefer_residents(model, config.cache_aware)


def _arithmetic(model: nn.Module, config: OffloadConfig, layers: Sequence[SparseLayer]) -> dict[int, ExpertMlp]:
    """The arithmetic of the layers that do not use their modules' eager forward."""
    if config.arithmetic == "exact":
        return {}
    found: dict[int, ExpertMlp] = {}
    verdicts: dict[tuple[type, ExpertMlp], bool] = {}
    for layer in layers:
        module = model.get_submodule(layer.name)
        mlp = layer.layout.mlp(module)
        if mlp is None:
            continue
        kind = (layer.plain_class, mlp)
        if kind not in verdicts:
            verdicts[kind] = reproduces(layer, module, mlp)
            if not verdicts[kind]:
                logger.info(f"the arithmetic of {layer.plain_class.__name__} is not supported; using its eager forward")
        if verdicts[kind]:
            found[layer.index] = replace(mlp, activations=activations_of(config))
    return found


def activations_of(config: OffloadConfig) -> Activations:
    """Whether the config lets products with matrices in low bits round their inputs to int8."""
    return "int8" if config.arithmetic == "int8" else "exact"


def _device_of(model: Any, name: str) -> torch.device:
    """The device of a module's inputs.

    Modules that accelerate keeps on CPU or disk are computed on the first GPU in the device map, if there is one.
    """
    device_map = getattr(model, "hf_device_map", None)
    if not device_map:
        return torch.device(next((p.device for p in model.parameters()), "cpu"))
    owners = [owner for owner in device_map if not owner or name == owner or name.startswith(f"{owner}.")]
    if not owners:  # the map lists submodules or parameters of the module, whose parameters were taken out
        owners = [owner for owner in device_map if owner.startswith(f"{name.rpartition('.')[0]}.")] or list(device_map)
    place = device_map[max(owners, key=len)]
    if place in ("cpu", "disk"):
        place = next((other for other in device_map.values() if other not in ("cpu", "disk")), "cpu")
    device = torch.device(place)
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _unmark_as_quantized(model: Any) -> None:
    """Remove the marks by which Transformers recognises a quantized model.

    The model may be cast, trained and saved like any other, and its saved config must not claim a format of ours.
    """
    model.is_quantized = False
    vars(model).pop("quantization_method", None)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            vars(config).pop("quantization_config", None)
            vars(config).pop("_is_quantized", None)
            if GUARD.stem in str(vars(config).get("auto_map")):  # a plain model needs no guard
                del config.auto_map
