"""Take the experts' parameters out of a model, and put them back.

A parameter that stays registered on `meta` breaks `model.to()`; one that is missing breaks code that looks at its
shape or initialises it. So its place in `module.__dict__` is taken by a meta parameter that is not registered: visible
to `getattr` and `get_parameter`, invisible to `state_dict`, `named_parameters`, `to` and accelerate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from transformers_moe_offload.hf.layouts import ExpertField
from transformers_moe_offload.hf.upstream import mark_initialised


def take_out(module: nn.Module, fields: Iterable[ExpertField]) -> dict[str, tuple[str, ...]]:
    """Replace parameters by placeholders; returns what `put_back` needs: each owner's parameters in their order."""
    order: dict[str, tuple[str, ...]] = {}
    for field in fields:
        for path in field.paths:
            owner_path, _, leaf = path.rpartition(".")
            owner = module.get_submodule(owner_path)
            order.setdefault(owner_path, tuple(owner._parameters))
            taken = owner._parameters.pop(leaf)
            assert taken is not None
            placeholder = nn.Parameter(torch.empty_like(taken, device="meta"), requires_grad=False)
            # Transformers initialises what no checkpoint filled; this says that there is nothing to do.
            mark_initialised(placeholder)
            vars(owner)[leaf] = placeholder
    return order


def put_back(module: nn.Module, order: Mapping[str, tuple[str, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Register parameters again, in the place and order that they had."""
    for path, tensor in tensors.items():
        owner_path, _, leaf = path.rpartition(".")
        owner = module.get_submodule(owner_path)
        vars(owner).pop(leaf, None)
        owner.register_parameter(leaf, nn.Parameter(tensor))
    for owner_path, names in order.items():
        owner = module.get_submodule(owner_path)
        parameters = dict(owner._parameters)
        owner._parameters.clear()
        owner._parameters.update({name: parameters[name] for name in names})
