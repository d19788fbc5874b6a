"""Experts stacked along the first dimension of a few parameters: modules that `use_experts_implementation` decorates.

`step3p7` and `longcat_flash` (5.23) are built the same way and only lack the decorator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.hf.layouts.base import ExpertField, ExpertsLayout, chosen, parameter, stacked_field
from transformers_moe_offload.hf.upstream import EXPERTS_FLAGS, undecorated_forward

_UP = ("gate_up_proj", "up_proj")


class StackedLayout(ExpertsLayout):
    """`gate_up_proj` or `up_proj`, and `down_proj`, each perhaps with a bias, called with top-k indices and weights."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether the module has the stacks and is called with a token's choices and weights."""
        stacks = [module._parameters.get(name) for name in (*_UP, "down_proj")]
        return (
            stacks[2] is not None
            and any(stack is not None and stack.dim() == 3 for stack in stacks[:2])
            and len(inspect.signature(undecorated_forward(module)).parameters) == 4
        )

    def num_experts(self, module: nn.Module) -> int:
        """Length of `down_proj`; in longcat_flash `gate_up_proj` is longer, for experts that have no weights."""
        return parameter(module, "down_proj").shape[0]

    def fields(self, module: nn.Module) -> tuple[ExpertField, ...]:
        """Every stack, in the order in which the module declares them."""
        num_experts = self.num_experts(module)
        names = [n for n in module._parameters if n.removesuffix("_bias") in (*_UP, "down_proj")]
        return tuple(stacked_field(module, name, num_experts) for name in names)

    def wanted(self, num_experts: int, *args: Any, keep_zero_weights: bool = False) -> list[int]:
        """From hidden_states, top_k_index, top_k_weights."""
        _, top_k_index, top_k_weights = args
        return chosen(num_experts, top_k_index, top_k_weights, keep_zero_weights)

    def eager_forward(self, module: nn.Module) -> Callable[..., Tensor]:
        """The class's own loop over experts, without the decorator's dispatch."""
        return undecorated_forward(module)

    def is_transposed(self, module: nn.Module) -> bool:
        """From the decorator's flag."""
        return bool(getattr(module, "is_transposed", False))

    def mlp(self, module: nn.Module) -> ExpertMlp | None:
        """From the decorator's flags, or its defaults where it is missing."""
        if not hasattr(module, "_apply_gate") and getattr(module, "has_gate", True):
            return None
        return ExpertMlp(**{flag: getattr(module, flag) for flag in EXPERTS_FLAGS if hasattr(module, flag)})
