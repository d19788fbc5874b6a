"""Give offloaded experts placeholder parameters while PEFT searches for parameters to adapt.

A placeholder has the shape, dtype and device of the parameter, and takes the memory of a single number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.hf.layouts import ExpertField
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts, OffloadedLayer, offloaded


def offloaded_layers(model: nn.Module) -> dict[str, OffloadedExperts]:
    """The offloaded experts modules of a model, by their current paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, OffloadedExperts)}


def is_adaptable(field: ExpertField) -> bool:
    """Whether low-rank factors can be added to a field: a matrix for each expert, stacked in one parameter."""
    return field.is_stacked and not field.is_flattened and len(field.shape) == 2 and "." not in field.name


def placeholder_of(experts: OffloadedLayer, field: ExpertField) -> nn.Parameter:
    """A parameter (E, ...) like the one that holds a field in the plain model."""
    assert experts.handle is not None
    spec = next(spec for spec in experts.handle.spec(experts.layer).fields if spec.name == field.name)
    number = torch.zeros((), dtype=torch_dtype(spec.dtype), device=experts.layer.device)
    return nn.Parameter(number.expand(field.num_entries or 0, *field.shape), requires_grad=False)


@contextmanager
def placeholders(model: Any) -> Iterator[None]:
    """Give offloaded experts placeholder parameters inside a `with` block."""
    hidden = []
    try:
        for module in offloaded_layers(model).values():
            held = offloaded(module)
            for field in filter(is_adaptable, held.layer.fields):
                parameter = placeholder_of(held, field)  # raises if the model was closed
                hidden.append((module, field.name, vars(module).pop(field.name)))
                module._parameters[field.name] = parameter
        yield
    finally:
        for module, name, unregistered in hidden:
            module._parameters.pop(name, None)
            vars(module)[name] = unregistered
