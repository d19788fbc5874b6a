"""State dicts of the plain model, for `save_pretrained` and `load_state_dict`.

Saving adds the experts to the model's or the given state dict. Loading accepts saved files, as when Trainer resumes
from a checkpoint: they have the names and shapes of the architecture's authors, which Transformers only converts in
`from_pretrained`. Without this conversion, a router or an expert with another name in files would silently keep its
weights.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.errors import CheckpointError, ConfigError
from transformers_moe_offload.hf.layouts import ExpertField
from transformers_moe_offload.hf.loading.locate import ParameterSource, assembled, trace_parameters
from transformers_moe_offload.hf.model.own_experts import NAME, is_of_own_experts, named_own_experts, own_experts
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.hf.upstream import get_model_conversion_mapping

logger = logging.getLogger(__name__)


def with_experts(model: Any, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of the plain model; `given` replaces the model's own values, also those of experts.

    Experts are given under their names in the plain model; own experts may also have their names in this model. Raises
    `ConfigError` for other names of experts, which would be written in addition to the model's.
    """
    live = model.state_dict()
    state = dict(live if given is None else given)
    experts = model.moe_offload.state_dict(without=state)
    for layer in () if given is None else model.moe_offload.layers:
        _expect_known(layer, state, live)
        for name, expert, field in named_own_experts(state, layer.name):
            stack = experts.get(f"{layer.name}.{field}")
            if stack is not None:
                stack[expert] = state[name].detach()
    return {name: value for name, value in state.items() if not is_of_own_experts(name)} | {
        name: value for name, value in experts.items() if name not in state
    }


def _expect_known(layer: SparseLayer, state: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    known = [f"{layer.name}.{path}" for field in layer.fields for path in field.paths]
    prefix = f"{layer.name}."
    unknown = next((n for n in state if n.startswith(prefix) and n not in known and n not in live), None)
    if unknown is not None:
        raise ConfigError(
            f"the state_dict to be saved holds {unknown}, but the experts of {layer.name} are called "
            f"{', '.join(known[:2])}; give them under these names, as model.moe_offload.state_dict() does, or leave "
            f"them out"
        )


_WRITERS = {("accelerate.accelerator", "save_model"): "Accelerator.save_model"}
_WRITERS |= {("safetensors.torch", "save_model"): "safetensors.torch.save_model"}
"""Functions (accelerate 1.15, safetensors 0.8) that write what `state_dict()` returns as if it were the whole model."""


def install_state_dict_hooks(model: Any) -> None:
    """Convert state dicts that this model, or a copy of it, loads; warn if one is saved without the experts."""
    model.register_load_state_dict_pre_hook(_convert)
    model.register_state_dict_post_hook(_warn_if_written)


def remove_state_dict_hooks(model: Any) -> None:
    """Remove the hooks, found by their functions: the handles that torch returns do not work for copies of a model."""
    for hooks in (model._load_state_dict_pre_hooks, model._state_dict_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) in (_convert, _warn_if_written)]:
            del hooks[key]


def _warn_if_written(model: Any, *_: Any) -> None:
    """Hook of `state_dict()`: warn if the caller writes its result as the whole model."""
    frame = sys._getframe(1)
    while frame is not None:
        writer = _WRITERS.get((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
        if writer is not None:
            logger.warning(
                f"{writer} writes {type(model).__name__}.state_dict(), which does not contain the offloaded experts; "
                f"use save_pretrained, which writes the whole model"
            )
            return
        frame = frame.f_back  # type: ignore[assignment]


def _convert(model: Any, state_dict: MutableMapping[str, Any], prefix: str, *rest: Any) -> None:
    """Hook of `load_state_dict`: convert `state_dict`, torch's copy of the argument, in place."""
    runtime = vars(model).get("moe_offload")
    own_names = set(model.state_dict())
    if runtime is None or prefix or own_names.issuperset(state_dict):
        return
    given = dict(state_dict)
    found = _by_parameter(model, given)
    for name, source in found.items():
        if name in own_names and name not in given:
            state_dict[name] = _whole(model, name, source)
    for module, layer in runtime.modules():
        _load_experts(model, module, layer, found, given, state_dict)
    for name in set(given) - own_names:
        if any(name in _keys(source, given) for source in found.values()):
            state_dict.pop(name, None)


def _by_parameter(model: Any, given: Mapping[str, Tensor]) -> dict[str, ParameterSource]:
    """Every parameter of the plain model -> the given tensors that make it up."""
    parameters = dict(model.state_dict())
    for layer in model.moe_offload.layers:
        for field in layer.fields:
            shape = field.shape if field.num_entries is None else (field.num_entries, *field.shape)
            parameters |= {f"{layer.name}.{path}": torch.empty(shape, device="meta") for path in field.paths}
    return trace_parameters(model, parameters, get_model_conversion_mapping(model), given)  # type: ignore[arg-type]


def _whole(model: Any, name: str, source: ParameterSource) -> Tensor:
    """A whole parameter, converted."""
    if source.converter is None:
        (tensors,) = source.stored.values()
        return tensors[0]  # type: ignore[return-value]
    conversion = copy(source.converter)
    conversion.collected_tensors = {pattern: list(tensors) for pattern, tensors in source.stored.items()}
    out: Any = conversion.convert(name, model=model, config=model.config)[name]
    return out[0] if isinstance(out, list) else out


def _load_experts(
    model: Any,
    module: Any,
    layer: SparseLayer,
    found: Mapping[str, ParameterSource],
    given: Mapping[str, Tensor],
    state_dict: MutableMapping[str, Any],
) -> None:
    """Load own experts; raise `CheckpointError` if frozen ones differ from those of this model."""
    own, source = own_experts(module), model.moe_offload.source(layer)
    frozen = [expert for expert in range(layer.num_experts) if expert not in own]
    fields = [field for field in layer.fields if f"{layer.name}.{field.paths[0]}" in found]
    for expert in own:
        for field in fields:
            state_dict[f"{layer.name}.{NAME}.{expert}.{field.name}"] = _expert(model, layer, field, found, expert)
    if fields and any(source.codecs.of(expert) is not None for expert in frozen):
        raise CheckpointError(
            f"the weights that are loaded have experts of {layer.name}, but this model's are in low bits and "
            f"constant; leave them out of what is loaded, or load these weights with from_pretrained"
        )
    for expert in frozen if fields else ():
        there = source.read(expert)
        for field in fields:
            if not torch.equal(_expert(model, layer, field, found, expert).to(there[field.name]), there[field.name]):
                raise CheckpointError(
                    f"{field.name} of expert {expert} of {layer.name} is not the same in the weights that are "
                    f"loaded and in the checkpoint of this model, where it is frozen; load the model that was trained"
                )


def _expert(
    model: Any, layer: SparseLayer, field: ExpertField, found: Mapping[str, ParameterSource], expert: int
) -> Tensor:
    """A field of an expert from the loaded weights."""
    spec = next(spec for spec in model.moe_offload.spec(layer).fields if spec.name == field.name)
    name = f"{layer.name}.{field.paths[0 if field.is_stacked else expert]}"
    if not field.is_stacked:
        tensor = _whole(model, name, found[name])
    elif field.is_flattened:
        tensor = _whole(model, name, found[name]).unflatten(0, (layer.num_experts, -1))[expert]
    else:
        tensor = assembled(name, found[name], field, expert, spec.dtype, model.config)
    return tensor.reshape(field.shape).to(torch_dtype(spec.dtype))


def _keys(source: ParameterSource, given: Mapping[str, Tensor]) -> set[str]:
    ids = {id(tensor) for tensors in source.stored.values() for tensor in tensors}
    return {name for name, tensor in given.items() if id(tensor) in ids}
