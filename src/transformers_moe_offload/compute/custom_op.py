"""The experts of a layer as one operator, for `torch.compile`: what is inside is neither traced nor fused.

So a model is compiled in one piece. Were its experts left out, each layer would be two pieces, and a piece that comes
in many layers is compiled for eight of them and no more (`recompile_limit` of torch 2.13).
"""

# T tokens, K experts per token, H hidden

from __future__ import annotations

from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Operand(Protocol):
    """Computes the operator's result."""

    def compute(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What `experts` returns."""


_numbers = count()
_operands: WeakValueDictionary[str, Operand] = WeakValueDictionary()


def key_for(operand: Operand) -> str:
    """The key of a (weakly held) operand. A string: torch.compile would guard on an int, or generalise it."""
    key = str(next(_numbers))
    _operands[key] = operand
    return key


def fits(device: torch.device) -> bool:
    """Whether code that is being compiled can use the operator, which supports neither gradients nor autocast."""
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled(device.type)


@torch.library.custom_op("transformers_moe_offload::experts", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def experts(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, key: str) -> Tensor:
    """hidden_states (T, H), top_k_index (T, K) int64, top_k_weights (T, K) -> (T, H) in the dtype of hidden_states."""
    return _operands[key].compute(hidden_states, top_k_index, top_k_weights)


@experts.register_fake
def _shape(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, key: str) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
