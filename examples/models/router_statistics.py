"""Which experts the router of `tiny-moe` chooses on held-out text: load per layer, and preference for a domain.

Pure counting over a model's router logits; `plots.py` draws the result, `evaluate.py` judges it.
"""

# B sequences, S positions, T tokens, L layers, E experts, K experts per token, D domains

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class RouterStatistics:
    """Shares counted with every domain given the same weight."""

    load: Tensor
    """(L, E) float, share of the layer's choices that fall on the expert, times E: 1 is uniform."""
    domain_share: Tensor
    """(L, E, D) float, share of the expert's tokens that come from the domain; each sums to 1 over D."""

    @property
    def least_load(self) -> float:
        return self.load.min().item()

    @property
    def most_load(self) -> float:
        return self.load.max().item()

    @property
    def mean_strongest_share(self) -> float:
        """Average over experts of the share of their favourite domain; 1/D when routing ignores the domain."""
        return self.domain_share.max(-1).values.mean().item()


@torch.no_grad()
def choices(model: nn.Module, windows: Tensor) -> Tensor:
    """How often each expert was among a token's chosen. windows (B, S) int64 -> (L, E) int64."""
    top_k, num_experts = model.config.num_experts_per_tok, model.config.num_experts
    total = torch.zeros(model.config.num_hidden_layers, num_experts, dtype=torch.int64)
    for part in windows.split(8):
        output = model(input_ids=part, use_cache=False, output_router_logits=True)
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.reshape(-1, num_experts).topk(top_k, -1).indices
            total[layer] += torch.bincount(chosen.reshape(-1), minlength=num_experts)
    return total


def router_statistics(model: nn.Module, windows: dict[str, Tensor]) -> RouterStatistics:
    """Statistics over each domain's windows, each (B, S) int64; domains in the order of `windows`."""
    counts = torch.stack([choices(model, rows) for rows in windows.values()], -1).double()
    share = counts / counts.sum(1, keepdim=True)
    return RouterStatistics(
        load=share.mean(-1) * counts.shape[1], domain_share=share / share.sum(-1, keepdim=True).clamp_min(1e-12)
    )
