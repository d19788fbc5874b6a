"""Parts of channels that are active for the same tokens (as MoEfication does it, arXiv 2110.01786).

A channel adds its activation times its column of the down projection. For each token the largest activations count as
active; channels are clustered by the tokens that they are active for.
"""

# I channels, N tokens, n parts

from __future__ import annotations

import torch
from torch import Tensor

from transformers_moe_offload.builder.channel_split.k_means import balanced_k_means
from transformers_moe_offload.builder.channel_split.parts import Parts, parts_of, sizes_of

ACTIVE_SHARE = 0.2
"""Share of channels that count as active for a token; each channel is then active for about 100 of 512 tokens."""


def active(activations: Tensor) -> Tensor:
    """Which channels are active for which token: (N, I) float -> (N, I) bool."""
    count = max(1, round(activations.shape[-1] * ACTIVE_SHARE))
    chosen = activations.abs().topk(count, dim=-1).indices
    return torch.zeros_like(activations, dtype=torch.bool).scatter_(-1, chosen, True)


def co_activation_parts(active: Tensor, num_parts: int, *, num_shared: int = 0, seed: int = 0) -> Parts:
    """Parts of channels that are active together, (N, I) bool; the first `num_shared` have those most often active."""
    sizes = sizes_of(active.shape[1], num_parts)
    often = active.sum(0).argsort(descending=True, stable=True)
    shared = list(often[: sum(sizes[:num_shared])].split(sizes[:num_shared])) if num_shared else []
    others = often[sum(sizes[:num_shared]) :].sort().values
    labels = balanced_k_means(active[:, others].T, sizes[num_shared:], seed=seed)
    return [part.sort().values for part in shared] + [others[part] for part in parts_of(labels, num_parts - num_shared)]
