"""Llama 4: every token goes through every expert, scaled by a score that is zero for the experts not chosen.

Transformers multiplies all rows (`Llama4TextExperts`, 5.23). An expert maps a zero row to zero, so only nonzero rows
need its weights. The matmuls then have fewer rows, so this is the only kind of experts that agrees with eager
Transformers up to rounding instead of bit for bit.
"""

# E experts, T tokens, H hidden, I intermediate

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.hf.layouts.base import ExpertField, ExpertsLayout, parameter, stacked_field


class Llama4Layout(ExpertsLayout):
    """`gate_up_proj` (E, H, 2I) and `down_proj` (E, I, H), called with (E * T, H) rows."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether the module has the two stacks and is called with rows only."""
        return set(module._parameters) == {"gate_up_proj", "down_proj"} and hasattr(module, "expert_dim")

    def num_experts(self, module: nn.Module) -> int:
        """Matrices in the stacks."""
        return parameter(module, "down_proj").shape[0]

    def fields(self, module: nn.Module) -> tuple[ExpertField, ...]:
        """The two stacks."""
        names = ("gate_up_proj", "down_proj")
        return tuple(stacked_field(module, name, self.num_experts(module)) for name in names)

    def wanted(self, num_experts: int, *args: Any, keep_zero_weights: bool = False) -> list[int]:
        """Experts with a nonzero row."""
        is_used = _is_used(args[0].view(num_experts, -1, args[0].shape[-1]))
        return is_used.any(dim=1).nonzero().flatten().tolist()  # sync: device -> host

    def is_transposed(self, module: nn.Module) -> bool:
        """Rows are multiplied from the left."""
        return True

    def eager_forward(self, module: nn.Module) -> Callable[..., Tensor]:
        """Our own forward: the same arithmetic, on nonzero rows only."""
        return _forward


def _is_used(rows: Tensor) -> Tensor:
    """rows (E, T, H) -> (E, T) bool."""
    return (rows != 0).any(dim=-1)


def _forward(experts: Any, hidden_states: Tensor) -> Tensor:
    rows = hidden_states.view(experts.num_experts, -1, hidden_states.shape[-1])
    is_used = _is_used(rows)
    out = torch.zeros_like(rows)
    for expert in is_used.any(dim=1).nonzero().flatten().tolist():  # sync: device -> host
        used = is_used[expert]
        gate, up = (rows[expert, used] @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
        out[expert, used] = (up * experts.act_fn(gate)) @ experts.down_proj[expert]
    return out.view(-1, hidden_states.shape[-1])
