"""A few rows on a CPU, such as those of a decode step or of drafted tokens: all experts of the layer by one call of the
compiled kernels."""

# T tokens, H hidden, K experts per token

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from transformers_moe_offload.compute.deltas import NOTHING
from transformers_moe_offload.compute.one_call import OneCall
from transformers_moe_offload.hf.model.layer_forward import Call, LayerExperts
from transformers_moe_offload.kernels.cpu import TYPES
from transformers_moe_offload.kernels.few_rows import is_watched
from transformers_moe_offload.kernels.layer import takes


@dataclass(frozen=True)
class OneCallPath:
    """Computes what neither adapts experts nor needs gradients, for few rows.

    While every expert that is wanted is resident, the cache is not asked: its table says where they are, and it is told
    afterwards. Otherwise they are visited, and computed in the order in which they become available, to the same bits.
    """

    one_call: OneCall
    experts: LayerExperts

    def serves(self, call: Call) -> bool:
        """For inputs that the kernel takes, while the module is what it was and no hook watches its activation."""
        module = call.module
        if call.needs_grad or call.adaptation is not NOTHING or len(call.inputs) != 3 or module.training:
            return False
        hidden, index, weights = call.inputs
        if hidden.dim() != 2 or index.dim() != 2 or call.is_changed or has_hooks(module._modules.get("act_fn")):
            return False
        return (
            takes(index.shape[0], index.shape[1], self.one_call.kernel.num_experts)
            and hidden.dtype == self.experts.dtype
            and index.dtype == torch.int64
            and weights.dtype in TYPES
            and hidden.is_contiguous()
            and index.is_contiguous()
            and weights.is_contiguous()
            and type(hidden) is Tensor
            and not torch.is_autocast_enabled("cpu")
            and not is_watched()
        )

    def forward(self, call: Call) -> Tensor:
        """The experts' contribution to each token, (T, H)."""
        hidden, index, weights = call.inputs
        experts, kernel = self.experts, self.one_call.kernel
        cache, out = experts.cache, torch.empty_like(hidden)
        with cache.turn:
            now = time.monotonic()
            if (experts.look_ahead is None or cache.holds_everything) and cache.can_use_tables(now):
                is_done = kernel.step(hidden, index, weights, out, now)
                if is_done:
                    cache.note(experts.index, kernel.wanted())
                    return out
            else:
                kernel.begin(hidden, index, weights, out)
            started = None if experts.look_ahead is None else experts.look_ahead(hidden)
            with cache.visit(experts.index, kernel.wanted(), started) as visit:
                for batch in visit.batches():
                    kernel.some(list(batch))
            kernel.end()
        return out


def has_hooks(module: nn.Module | None) -> bool:
    """Whether hooks are called with a module's forward: its own, or those of all modules."""
    if module is None:
        return False
    of_all = hooks._global_forward_hooks or hooks._global_forward_pre_hooks
    return bool(module._forward_hooks or module._forward_pre_hooks or of_all)
