"""What a sparse layer is: the place and kind of its experts module, and their arithmetic. Descriptions; no weights."""

# T tokens, H hidden

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.hf.layouts import ExpertField, ExpertsLayout

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class SparseLayer:
    """One sparse layer of a model."""

    index: int
    name: str
    """Path of the experts module in the model."""
    plain_class: type[nn.Module]
    """Transformers' class of the module."""
    layout: ExpertsLayout
    fields: tuple[ExpertField, ...]
    num_experts: int
    eager_forward: Callable[..., Tensor]
    """The forward of the plain class: (module, hidden (T, H), ...) -> (T, H)."""
    parameter_order: dict[str, tuple[str, ...]]
    mlp: ExpertMlp | None = None
    """The arithmetic of our own forward; None where the module's eager forward is used."""
    device: torch.device = _CPU
    """Where the layer computes."""

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in the dtypes that the model was built with, before loading or casts."""
        return sum(prod(field.shape) * field.dtype.itemsize for field in self.fields)

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of the module's forward in their order, whether passed by position or by name."""
        return args + tuple(kwargs[name] for name in self._input_names[len(args) :])

    @cached_property
    def _input_names(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.eager_forward).parameters)[1:]
