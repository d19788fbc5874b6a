"""Own experts: parameters of the model, while the other experts of their layer are offloaded.

They are in a child of the experts module, `own_experts.{expert}.{field}`, where optimizers and `to` find them. In saved
checkpoints, and after `restore`, they are at their places in the stacks of all experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.hf.layouts import ExpertField

NAME = "own_experts"


def own_experts(module: nn.Module) -> dict[int, dict[str, Tensor]]:
    """The own experts of a module: expert -> field -> parameter."""
    child: Any = module._modules.get(NAME)
    if child is None:
        return {}
    return {int(expert): dict(fields._parameters) for expert, fields in child._modules.items()}


def is_of_own_experts(name: str) -> bool:
    """Whether a name in a state dict belongs to an own expert."""
    return f".{NAME}." in name


def named_own_experts(names: Iterable[str], path: str) -> Iterator[tuple[str, int, str]]:
    """Names in a state dict that belong to own experts of the module at a path, with the expert and the field.

    Ignores the wrappers that PEFT may have put around the module.
    """
    for name in names:
        plain = name.replace(".base_layer.", ".")
        if plain.startswith(f"{path}.{NAME}."):
            expert, _, field = plain.removeprefix(f"{path}.{NAME}.").partition(".")
            yield name, int(expert), field


@torch.no_grad()
def put_among_the_others(module: nn.Module, fields: Iterable[ExpertField], tensors: Mapping[str, Tensor]) -> None:
    """Write a module's own experts into the stacks of all its experts; `tensors`: path in the module -> stack."""
    for expert, own in own_experts(module).items():
        for field in fields:
            tensors[field.paths[0]][expert].copy_(own[field.name])
