"""Run Transformers' eager forward over weights that are fetched when it indexes them.

The forward gets a shallow copy of its module, in which placeholders replace the expert weights and fetch an expert
when they are indexed. This makes every kind of experts exact by construction, and is the reference for our own
forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.backward.saved_tensors import Fetch
from transformers_moe_offload.cache.visit import Visit
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.errors import UnsupportedModelError
from transformers_moe_offload.expert import ExpertSpec
from transformers_moe_offload.formats.base import LayerCodecs
from transformers_moe_offload.hf.layouts import ExpertField


def fetch_from(
    visit: Visit, spec: ExpertSpec, device: torch.device, *, codecs: LayerCodecs, cast_to: torch.dtype | None
) -> Fetch:
    """A function that fetches wanted experts through a visit, and returns zeros for others.

    Some forwards index experts without rows, or with rows of weight zero only: their weights do not affect the output,
    so they are not loaded. `codecs` says how the visit returns each expert; `cast_to` is the dtype to return, None for
    the experts' own.
    """
    by_name = {field.name: field for field in spec.fields}

    def fetch(name: str, expert: int) -> Tensor:
        if visit.wants(expert):
            held, codec = visit.take(expert), codecs.of(expert)
            weight = held[name] if codec is None else codec.decode_field(name, held)
            return weight if cast_to is None else weight.to(cast_to)
        field = by_name[name]
        return torch.zeros((), dtype=cast_to or torch_dtype(field.dtype), device=device).expand(field.shape)

    return fetch


def copy_of(module: nn.Module, plain_class: type, fields: tuple[ExpertField, ...], fetch: Fetch) -> nn.Module:
    """A shallow copy of an experts module whose expert weights come from `fetch`."""
    placeholders: dict[str, Any] = {field.paths[0]: _Stack(field, fetch) for field in fields if field.is_stacked}
    copied = with_attributes(module, plain_class, placeholders)
    if any(not field.is_stacked for field in fields):
        vars(copied)["_modules"] = _Modules(module._modules, fields, fetch)
    return copied


class _Stack:
    """Placeholder for a parameter that stacks all experts along its first dimension."""

    def __init__(self, field: ExpertField, fetch: Fetch) -> None:
        self._field = field
        self._fetch = fetch

    def __getitem__(self, expert: Any) -> Tensor:
        return self._fetch(self._field.name, int(expert))

    def view(self, *shape: Any) -> _Stack:
        """The stack itself; raises `UnsupportedModelError` if the shape differs from the shape it has."""
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if tuple(sizes[1:]) != self._field.shape:
            raise UnsupportedModelError(
                f"the model views {self._field.name} as experts of shape {tuple(sizes[1:])}, but they have "
                f"{self._field.shape}; load it without offloading"
            )
        return self


class _Modules(Mapping[str, nn.Module]):
    """Placeholder for the modules of a `ModuleDict` whose experts are modules."""

    def __init__(self, modules: Mapping[str, Any], fields: tuple[ExpertField, ...], fetch: Fetch) -> None:
        self._plain = modules
        self._fields = fields
        self._fetch = fetch

    def __getitem__(self, key: str) -> nn.Module:
        child: nn.Module = self._plain[key]
        prefix, _, number = key.rpartition("_")
        if prefix != "expert":
            return child
        weights = {field.name: self._fetch(field.name, int(number)) for field in self._fields}
        return with_attributes(child, type(child), weights)

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)


def with_attributes(module: nn.Module, cls: type, values: Mapping[str, Any]) -> nn.Module:
    """A shallow copy of a module, as an instance of `cls`, with attributes set: path below the module -> value."""
    copied: nn.Module = object.__new__(cls)
    vars(copied).update(vars(module))
    below: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        head, _, rest = path.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = value
        else:
            vars(copied)[head] = value
    if below:
        children = dict(module._modules)
        for name, inner in below.items():
            child = module.get_submodule(name)
            children[name] = with_attributes(child, type(child), inner)
        vars(copied)["_modules"] = children
    return copied
