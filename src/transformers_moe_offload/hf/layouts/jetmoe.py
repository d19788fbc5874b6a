"""JetMoE: one stacked matrix per module, called with rows already sorted by expert. Two modules make one MLP, and two
more the query and output projections of its mixture of attention heads."""

from __future__ import annotations

from typing import Any

from torch import nn

from transformers_moe_offload.hf.layouts.base import ExpertField, ExpertsLayout, parameter, stacked_field


class JetMoeLayout(ExpertsLayout):
    """`weight` of shape (E, out, in) (`JetMoeParallelExperts`, 5.23)."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether the module's only parameter is one stack of matrices."""
        weight = module._parameters.get("weight")
        return (
            weight is not None
            and weight.dim() == 3
            and set(module._parameters) == {"weight"}
            and getattr(module, "num_experts", None) == weight.shape[0]
        )

    def num_experts(self, module: nn.Module) -> int:
        """Matrices in the stack."""
        return parameter(module, "weight").shape[0]

    def fields(self, module: nn.Module) -> tuple[ExpertField, ...]:
        """The one stack."""
        return (stacked_field(module, "weight", self.num_experts(module)),)

    def wanted(self, num_experts: int, *args: Any, keep_zero_weights: bool = False) -> list[int]:
        """From inputs and expert_size, the number of rows of each expert."""
        _, expert_size = args
        return [expert for expert, size in enumerate(expert_size) if size]
