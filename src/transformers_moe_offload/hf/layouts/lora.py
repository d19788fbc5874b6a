"""Adapters of one linear layer: A and B of all of them, stacked and padded to one rank, each in its own PEFT folder."""

# E adapters, R rank

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hf.layouts.base import (
    ExpertField,
    ExpertsLayout,
    ReadHeader,
    chosen,
    parameter,
    stacked_field,
)
from transformers_moe_offload.models.adapter_moe.adapter_folders import WEIGHTS_NAME, key
from transformers_moe_offload.store.field_source import FieldSource
from transformers_moe_offload.store.layer_source import ExpertSource, ScatteredExpert
from transformers_moe_offload.tensor_files.index import StoredTensor

_NAMES = ("lora_A", "lora_B")


class LoraLayout(ExpertsLayout):
    """`lora_A` (E, R, in) and `lora_B` (E, out, R) (`LoraExperts` of `models/adapter_moe`)."""

    has_own_files = True
    has_router_beside = False  # beside them is the linear layer that they add to

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether the module has the two stacks and the `folders` that they come from.

        Its class is not checked: a published model may bring its own copy of the class.
        """
        return all(module._parameters.get(name) is not None for name in _NAMES) and hasattr(module, "folders")

    def num_experts(self, module: nn.Module) -> int:
        """How many adapters there are."""
        return parameter(module, "lora_A").shape[0]

    def fields(self, module: nn.Module) -> tuple[ExpertField, ...]:
        """The two matrices."""
        return tuple(stacked_field(module, name, self.num_experts(module)) for name in _NAMES)

    def wanted(self, num_experts: int, *args: Any, keep_zero_weights: bool = False) -> list[int]:
        """From hidden_states, top_k_index, top_k_weights; the forward also visits adapters of weight zero."""
        _, top_k_index, top_k_weights = args
        return chosen(num_experts, top_k_index, top_k_weights, keep_zero_weights=True)

    def own_sources(self, module: nn.Module, dtype: str, read: ReadHeader) -> tuple[ExpertSource, ...]:
        """Each adapter's matrices, in its folder."""
        path, folders = str(module.path), list(vars(module)["folders"])
        if not folders:
            raise CheckpointError(f"the adapters of {path} are in no folder; save the model, and load that")
        fields = self.fields(module)
        return tuple(
            ScatteredExpert(tuple(_source(read(Path(folder) / WEIGHTS_NAME), path, field, dtype) for field in fields))
            for folder in folders
        )


def _source(stored: Mapping[str, StoredTensor], path: str, field: ExpertField, dtype: str) -> FieldSource:
    tensor = stored.get(key(path, field.name[-1]))
    if tensor is None:  # the adapter does not add to this layer
        return FieldSource((), (dtype,), lambda tensors: torch.zeros(field.shape, dtype=field.dtype))
    if any(size > room for size, room in zip(tensor.shape, field.shape, strict=True)):
        raise CheckpointError(
            f"{tensor.file.path}: {tensor.name} is {list(tensor.shape)}, but the model has room for "
            f"{list(field.shape)}; its config has another rank, or is another model's"
        )
    if tensor.shape == field.shape:
        return FieldSource((tensor,), (dtype,))
    return FieldSource((tensor,), (dtype,), partial(_padded, shape=field.shape))


def _padded(tensors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """A matrix of lower rank, padded with zeros, which add nothing to any product."""
    (matrix,) = tensors
    padding = [(0, room - size) for size, room in zip(matrix.shape, shape, strict=True)]
    return nn.functional.pad(matrix, [*padding[1], *padding[0]])
