"""Experts that are modules of their own in a `ModuleDict`: Switch Transformers and NLLB-MoE."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from transformers_moe_offload.hf.layouts.base import ExpertField, ExpertsLayout, parameter


class ModuleDictLayout(ExpertsLayout):
    """`expert_0`, `expert_1`, ... of one class (`SwitchTransformersExperts`, `NllbMoeExperts`, 5.23)."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether the module is a dictionary of experts with its own forward."""
        return (
            isinstance(module, nn.ModuleDict)
            and "expert_0" in module
            and type(module).forward is not nn.Module.forward
            and next(module["expert_0"].parameters(), None) is not None
        )

    def num_experts(self, module: nn.Module) -> int:
        """Experts in the dictionary."""
        return sum(name.startswith("expert_") for name in module._modules)

    def fields(self, module: nn.Module) -> tuple[ExpertField, ...]:
        """Every parameter of an expert."""
        experts = range(self.num_experts(module))
        found = []
        for name, _ in module.get_submodule("expert_0").named_parameters():
            first = parameter(module, f"expert_0.{name}")
            paths = tuple(f"expert_{expert}.{name}" for expert in experts)
            found.append(ExpertField(name, paths, tuple(first.shape), first.dtype, num_entries=None))
        return tuple(found)

    def wanted(self, num_experts: int, *args: Any, keep_zero_weights: bool = False) -> list[int]:
        """From hidden_states (T, H), a mask or choice of experts, and routing weights."""
        return self._chosen(num_experts, args[1])

    @staticmethod
    def _chosen(num_experts: int, selected: Tensor) -> list[int]:
        # Both architectures build a mask from this and loop over the experts in it, also those of weight zero.
        hit = selected.reshape(-1, selected.shape[-1])
        if selected.dim() == 3:  # Switch Transformers: (T, 1, E) mask
            return hit.any(dim=0).nonzero().flatten().tolist()  # sync: device -> host
        return [e for e in selected.unique().tolist() if e < num_experts]  # NLLB: values that one_hot expands
