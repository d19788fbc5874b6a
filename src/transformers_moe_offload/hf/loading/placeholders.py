"""Take the experts' parameters out of a model, and put them back.

A parameter that stays registered on `meta` breaks `model.to()`; a missing one breaks code that reads its shape or
initialises it. So an unregistered meta parameter in `module.__dict__` replaces it: visible to `getattr` and
`get_parameter`, invisible to `state_dict`, `named_parameters`, `to` and accelerate. Values written to it would be lost,
so writing is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from transformers_moe_offload.errors import UnsupportedModelError
from transformers_moe_offload.hf.layouts import ExpertField
from transformers_moe_offload.hf.read_only import ReadOnlyTensor
from transformers_moe_offload.hf.upstream import mark_initialised


class Placeholder(ReadOnlyTensor, nn.Parameter):
    """Shows the shape and the dtype of experts whose weights are elsewhere."""

    @classmethod
    def refusal(cls) -> Exception:
        """A placeholder cannot be written to."""
        return UnsupportedModelError(
            "the experts of this model are offloaded and constant, and what is written to their parameters would be "
            "lost; use training.unfreeze_experts for those that are to be changed, or moe_offload.restore()"
        )


def take_out(module: nn.Module, fields: Iterable[ExpertField]) -> dict[str, tuple[str, ...]]:
    """Replace parameters by placeholders; returns the order of each owner's parameters, for `put_back`."""
    order: dict[str, tuple[str, ...]] = {}
    for field in fields:
        for path in field.paths:
            owner_path, _, leaf = path.rpartition(".")
            owner = module.get_submodule(owner_path)
            order.setdefault(owner_path, tuple(owner._parameters))
            taken = owner._parameters.pop(leaf)
            assert taken is not None
            placeholder = Placeholder(torch.empty_like(taken, device="meta"), requires_grad=False)
            # Transformers initialises parameters that no checkpoint filled; this mark prevents it.
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
