"""Take the experts' parameters out of a model, and put them back.

A parameter that stays registered on `meta` breaks `model.to()`; a missing one breaks code that reads its shape or
initialises it. So an unregistered meta parameter in `module.__dict__` replaces it: visible to `getattr` and
`get_parameter`, invisible to `state_dict`, `named_parameters`, `to` and accelerate. Values written to it would be lost,
so writing is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.errors import UnsupportedModelError
from transformers_moe_offload.hf.layouts import ExpertField
from transformers_moe_offload.hf.upstream import mark_initialised


class Placeholder(nn.Parameter):
    """Has the shape and dtype of offloaded experts' parameters. Writing to it, or to a view of it, raises
    `UnsupportedModelError`."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called by torch for every operation on a placeholder."""
        given = dict(kwargs or {})
        if _changes(func.__name__, args, given):
            raise UnsupportedModelError(
                "the experts of this model are offloaded and constant, and what is written to their parameters would "
                "be lost; use training.unfreeze_experts for those that are to be changed, or moe_offload.restore()"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **given)
            if isinstance(result, tuple | list):
                return type(result)(_as_guarded(one, args[0]) for one in result)
            return _as_guarded(result, args[0]) if args else result


def _changes(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a torch function with this name and these arguments writes to a placeholder."""
    if isinstance(kwargs.get("out"), Placeholder):
        return True
    if not args or not isinstance(args[0], Placeholder):
        return False
    if name == "requires_grad_":  # freezing it changes nothing
        return (args[1] if len(args) > 1 else kwargs.get("requires_grad", True)) is True
    is_operator = name.startswith("__i") and name not in ("__iter__", "__index__", "__int__", "__invert__")
    return name in ("__setitem__", "__set__") or is_operator or (name.endswith("_") and not name.endswith("__"))


def _as_guarded(result: Any, placeholder: Any) -> Any:
    """A result of an operation; views of a placeholder become placeholders."""
    if not isinstance(result, Tensor) or not isinstance(placeholder, Placeholder) or not result.is_meta:
        return result
    is_view = result.untyped_storage()._cdata == placeholder.untyped_storage()._cdata
    return result.as_subclass(Placeholder) if is_view else result


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
