"""The interface of a layout: how one kind of experts module stores its weights and is called.

A layout reads the module itself (its parameters and flags), never the model's name or config.
"""

# T tokens, K experts per token

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.store.layer_source import ExpertSource
from transformers_moe_offload.tensor_files.index import StoredTensor

ReadHeader = Callable[[Path], Mapping[str, StoredTensor]]
"""The tensors of one file, by name."""


@dataclass(frozen=True)
class ExpertField:
    """One tensor of every expert of a module."""

    name: str
    paths: tuple[str, ...]
    """Parameters that hold it, relative to the module: one that stacks all experts, or one for each expert."""
    shape: tuple[int, ...]
    """Shape for one expert."""
    dtype: torch.dtype
    num_entries: int | None
    """Experts in the parameter that stacks them, some of which may have no weights; None where each expert has a
    parameter of its own."""

    is_flattened: bool = False
    """Whether the parameter stacks experts along its rows instead of along a dimension of their own."""

    @property
    def is_stacked(self) -> bool:
        """Whether one parameter holds the tensor of all experts."""
        return self.num_entries is not None


class ExpertsLayout(ABC):
    """One kind of experts module."""

    @staticmethod
    @abstractmethod
    def matches(module: nn.Module) -> bool:
        """Whether a module is of this kind and still has its parameters."""

    @abstractmethod
    def num_experts(self, module: nn.Module) -> int:
        """How many experts the module's parameters hold."""

    @abstractmethod
    def fields(self, module: nn.Module) -> tuple[ExpertField, ...]:
        """The tensors of each expert."""

    @abstractmethod
    def wanted(self, num_experts: int, *args: Any, keep_zero_weights: bool = False) -> list[int]:
        """The experts that a call of the module's forward needs, ascending."""

    has_router_beside: bool = True
    """Whether the module with the scores' matrix is beside the experts, whatever it is called."""

    has_own_files: bool = False
    """Whether experts are in files of their own instead of the files that the model is loaded from."""

    def own_sources(self, module: nn.Module, dtype: str, read: ReadHeader) -> tuple[ExpertSource, ...] | None:
        """Where each expert is stored if they have files of their own, else None."""
        return None

    def eager_forward(self, module: nn.Module) -> Callable[..., Tensor]:
        """Transformers' forward of the module's class, as an unbound function."""
        return type(module).forward

    def is_transposed(self, module: nn.Module) -> bool:
        """Whether matrices are stored (in, out) instead of (out, in)."""
        return False

    def mlp(self, module: nn.Module) -> ExpertMlp | None:
        """The arithmetic of one expert, if the module's forward maps (T, H), (T, K), (T, K) -> (T, H) with it."""
        return None


def parameter(module: nn.Module, path: str) -> Tensor:
    """A parameter by its path; unlike `get_parameter` it also finds unregistered placeholders."""
    owner, _, leaf = path.rpartition(".")
    tensor = getattr(module.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def stacked_field(module: nn.Module, path: str, num_experts: int) -> ExpertField:
    """A field whose parameter stacks all experts along its first dimension (or along its rows, E * R of them)."""
    stack = parameter(module, path)
    if stack.dim() == 2 and not path.endswith("_bias"):
        shape = (stack.shape[0] // num_experts, stack.shape[1])
        return ExpertField(path, (path,), shape, stack.dtype, num_experts, is_flattened=True)
    return ExpertField(path, (path,), tuple(stack.shape[1:]), stack.dtype, stack.shape[0])


def chosen(num_experts: int, top_k_index: Tensor, top_k_weights: Tensor, keep_zero_weights: bool) -> list[int]:
    """Experts chosen by any token, ascending: top_k_index (T, K) int64, top_k_weights (T, K).

    Choices of weight zero count only with `keep_zero_weights`.
    """
    index = top_k_index if keep_zero_weights else top_k_index[top_k_weights != 0]
    return [expert for expert in index.unique().tolist() if expert < num_experts]  # sync: device -> host
