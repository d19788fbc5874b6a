"""Watch the scores of a model's routers while it is trained.

Every architecture calls its routers in its own way; common to all is that a router's first output with an entry for
each expert is its scores, before a softmax or after it.
"""

# T tokens, K experts per token, E experts

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transformers_moe_offload.hf.layouts import layout_of
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts, layer_of
from transformers_moe_offload.training.recipes import experts_paths, router_paths


class RouterWatch:
    """Calls `scored` with a router's scores, logits (T, E), each time a router is called."""

    def __init__(self, model: nn.Module, scored: Callable[[Tensor], None]) -> None:
        module = model.get_submodule(experts_paths(model)[0])
        self.num_experts = _num_experts(module)
        self._scored = scored
        self._handles = [model.get_submodule(path).register_forward_hook(self._called) for path in router_paths(model)]

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _called(self, router: nn.Module, args: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        for tensor in outputs:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.shape[-1] >= self.num_experts:
                self._scored(as_logits(tensor.reshape(-1, tensor.shape[-1]).float()))
                return


def as_logits(scores: Tensor) -> Tensor:
    """scores (T, E), logits or probabilities -> logits (T, E)."""
    with torch.no_grad():
        is_distribution = bool(((scores >= 0).all() & (scores.sum(-1) - 1).abs().lt(1e-3).all()).item())
    return scores.clamp_min(torch.finfo(scores.dtype).tiny).log() if is_distribution else scores


def entropy(logits: Tensor) -> float:
    """Mean entropy of the routers' distributions in nats: logits (T, E); log E for uniform ones."""
    with torch.no_grad():
        return torch.distributions.Categorical(logits=logits).entropy().mean().item()


def _num_experts(module: nn.Module) -> int:
    if isinstance(module, OffloadedExperts):
        return layer_of(module).num_experts
    layout = layout_of(module)
    assert layout is not None
    return layout.num_experts(module)
