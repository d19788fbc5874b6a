"""One sparse layer with random weights in a real file, and the arithmetic it should do, written out."""

# T tokens, K experts per token, E experts, H hidden, I intermediate

from types import SimpleNamespace

import torch

from stores import stacked_store
from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.compute.forward import combine
from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.compute.token_grouping import group_by_expert
from transformers_moe_offload.policies import LRU
from transformers_moe_offload.slots.buffers import CopiedSlots, SlotPool
from transformers_moe_offload.slots.transfer import HostCopier

E, H, I = 8, 16, 24  # noqa: E741 - the letters of the legend

MLP = ExpertMlp(has_gate=False)
EXPERTS = SimpleNamespace(act_fn=torch.tanh, training=False)


class Layer:
    """The weights, up_proj (E, I, H) and down_proj (E, H, I), and a store of them."""

    def __init__(self, folder, dtype, seed=0):
        random = torch.Generator().manual_seed(seed)
        self.up = (torch.randn(E, I, H, generator=random) / H**0.5).to(dtype)
        self.down = (torch.randn(E, H, I, generator=random) / I**0.5).to(dtype)
        self.store = stacked_store(folder, {"0.up_proj": self.up, "0.down_proj": self.down})

    def cache(self, num_slots):
        pool = SlotPool(self.store.layout(0, 0).nbytes, torch.device("cpu"))
        slots = CopiedSlots(self.store, pool, HostCopier(self.store.fill, 2))
        return ExpertCache(slots, num_slots, {0: self.store.layers[0].spec.num_experts}, LRU())

    def by_autograd(self, hidden, index, weights, experts=EXPERTS):
        """The layer's arithmetic over all weights in memory, expert by expert in ascending order."""
        grouping = group_by_expert(index, weights, E, keep_zero_weights=True)
        outputs = [
            MLP(experts, hidden[tokens], {"up_proj": self.up[expert], "down_proj": self.down[expert]})
            for expert, tokens in grouping.tokens.items()
        ]
        return combine(outputs, grouping, hidden, weights)

    def by_loop(self, hidden, index, weights, dtype, act_fn=torch.tanh):
        """Token by token and choice by choice, everything in one dtype, idle pairs left out."""
        rows = []
        for token in range(len(hidden)):
            row = torch.zeros(H, dtype=dtype)
            for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
                if expert < E:
                    inner = act_fn(self.up[expert].to(dtype) @ hidden[token].to(dtype))
                    row = row + weight.to(dtype) * (self.down[expert].to(dtype) @ inner)
            rows.append(row)
        return torch.stack(rows)


def inputs(num_tokens, num_choices, dtype, seed=0):
    """hidden_states (T, H), top_k_index (T, K) with different experts for a token, top_k_weights (T, K)."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, H, generator=random).to(dtype)
    scores = torch.rand(num_tokens, E, generator=random)
    weights, index = scores.softmax(-1).topk(num_choices)
    return hidden, index, weights.to(dtype)
