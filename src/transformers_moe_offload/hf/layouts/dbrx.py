"""DBRX: three matrices, each with the rows of all experts one after another, in a module below the experts module."""

from __future__ import annotations

from typing import Any

from torch import nn

from transformers_moe_offload.hf.layouts.base import ExpertField, ExpertsLayout, chosen, stacked_field

_NAMES = ("w1", "v1", "w2")


class DbrxLayout(ExpertsLayout):
    """`mlp.w1`, `mlp.v1`, `mlp.w2` of shape (E * I, H) (`DbrxExperts`, 5.23)."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether the module has a child with the three matrices."""
        mlp = module._modules.get("mlp")
        return mlp is not None and set(mlp._parameters) == set(_NAMES) and hasattr(mlp, "moe_num_experts")

    def num_experts(self, module: nn.Module) -> int:
        """From the module's `moe_num_experts`, because shapes do not show where one expert ends."""
        count = module.get_submodule("mlp").moe_num_experts
        assert isinstance(count, int)
        return count

    def fields(self, module: nn.Module) -> tuple[ExpertField, ...]:
        """The three matrices."""
        return tuple(stacked_field(module, f"mlp.{name}", self.num_experts(module)) for name in _NAMES)

    def wanted(self, num_experts: int, *args: Any, keep_zero_weights: bool = False) -> list[int]:
        """From hidden_states, top_k_index, top_k_weights."""
        _, top_k_index, top_k_weights = args
        return chosen(num_experts, top_k_index, top_k_weights, keep_zero_weights)
