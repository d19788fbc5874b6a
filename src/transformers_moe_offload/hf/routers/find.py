"""Find a sparse layer's router: the module beside the experts that scores them.

A router has a matrix of (experts, hidden), perhaps with a correction that is added to its scores, and as a rule it is
named so. Without any such matrix, a module with a router's name is taken, in the block or in the nearest module around
it: wrappers of PEFT lie between the experts and it, and a mixture of adapters can have one router for all layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from transformers_moe_offload.hf.layouts import ExpertField, ExpertsLayout, layout_of
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts, experts_at, layer_of

_WRAPPED = ".base_layer"
"""Suffix of the path of a module that PEFT has wrapped."""

_NAMES = ("gate", "router")
_CLASS = re.compile(r"(Router|Gating)$")


class ParameterAt(NamedTuple):
    """A parameter or buffer by its owner and name, so that replacements by `to` or a device map are used."""

    owner: nn.Module
    name: str

    def __call__(self) -> Tensor:
        """The current tensor."""
        tensor = getattr(self.owner, self.name)
        assert isinstance(tensor, Tensor)
        return tensor


class Router(NamedTuple):
    """A sparse layer's router."""

    path: str
    """Path of the module."""
    weight: ParameterAt | None
    """Its matrix (rows, H): one row for each expert, and perhaps some for experts without weights; None if the module
    has no such matrix."""
    correction: ParameterAt | None
    """One number for each row, added to the scores only to choose experts, so it gets no gradient; None if there is
    none."""


def find_router(model: nn.Module, experts_path: str) -> Router | None:
    """The router of an experts module, by the module's path; None if none is found, or several could be it."""
    layout, num_experts, fields = facts_of(experts_at(model, experts_path))
    while experts_path.endswith(_WRAPPED):
        experts_path = experts_path.removesuffix(_WRAPPED)
    block_path, _, inside = experts_path.rpartition(".")
    block = model.get_submodule(block_path)
    matrices = _matrices(block, inside, num_experts, fields[0].shape) if layout.has_router_beside else {}
    named = _named(block, inside)
    candidates = [name for name in named if name in matrices] or named or list(matrices)
    candidates = [name for name in candidates if name in _NAMES] or candidates
    if len(candidates) > 1:
        return None
    for name in candidates:
        weight = matrices.get(name)
        correction = None if weight is None else _find_correction(block, inside, num_experts, weight)
        return Router(_join(block_path, name), weight, correction)
    while block_path:
        block_path, _, inside = block_path.rpartition(".")
        named = _named(model.get_submodule(block_path), inside)
        if named:
            return Router(_join(block_path, named[0]), None, None) if len(named) == 1 else None
    return None


def _named(block: nn.Module, inside: str) -> list[str]:
    """The children of a block that are named like routers, without the one that has the experts `inside`; those without
    parameters only if there are no others."""
    children = {name: child for name, child in block.named_children() if name != inside}
    found = [name for name, child in children.items() if _is_named_router(name, child)]
    return [name for name in found if next(children[name].parameters(), None) is not None] or found


def facts_of(experts: nn.Module) -> tuple[ExpertsLayout, int, tuple[ExpertField, ...]]:
    """Layout, number of experts and fields of an experts module, whether or not it is offloaded."""
    if isinstance(experts, OffloadedExperts):
        layer = layer_of(experts)
        return layer.layout, layer.num_experts, layer.fields
    layout = layout_of(experts)
    assert layout is not None, f"{type(experts).__name__} holds no routed experts"
    return layout, layout.num_experts(experts), layout.fields(experts)


def _is_named_router(name: str, child: nn.Module) -> bool:
    return name == "gate" or "router" in name or _CLASS.search(type(child).__name__) is not None


def _join(block_path: str, name: str) -> str:
    return f"{block_path}.{name}" if block_path else name


def _matrices(
    block: nn.Module, experts_name: str, num_experts: int, field_shape: tuple[int, ...]
) -> dict[str, ParameterAt]:
    """The first (experts, hidden) matrix of each child of the block that has any."""
    found: dict[str, ParameterAt] = {}
    for path, module in _beside(block, experts_name):
        weight = module._parameters.get("weight")
        if path and weight is not None and weight.dim() == 2:
            rows, columns = weight.shape
            if num_experts <= rows <= 2 * num_experts and columns in field_shape:
                found.setdefault(path.partition(".")[0], ParameterAt(module, "weight"))
    return found


def _find_correction(block: nn.Module, experts_name: str, num_experts: int, weight: ParameterAt) -> ParameterAt | None:
    """A bias with one entry per expert that is not the bias of the matrix; it may be a buffer."""
    for _, module in _beside(block, experts_name):
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is None or "bias" not in name or (module is weight.owner and name == "bias"):
                continue
            if tensor.numel() in (num_experts, weight().shape[0]) and tensor.shape[-1] == tensor.numel():
                return ParameterAt(module, name)
    return None


def _beside(block: nn.Module, experts_name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a block, with their paths, without its experts."""
    for path, module in block.named_modules():
        if path.partition(".")[0] != experts_name:
            yield path, module
