"""Fit the centroids of strategy `k_means` to recorded hidden states."""

# N recorded tokens, K experts per token, E experts, H hidden

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing.strategies.clusters import centroids_of
from transformers_moe_offload.routing.trace import RoutingTrace


def fit_centroids(trace: RoutingTrace, *, rounds: int = 20, seed: int = 0) -> dict[int, Tensor]:
    """Centroids (E, H) for each router of a trace that was recorded with `hidden_states=True`.

    The trace must hold the routers' own choices, or other meaningful ones: a cluster starts from the tokens that its
    expert was given. Holds all hidden states of one router at a time.
    """
    centroids = {}
    for router, facts in enumerate(trace.routers):
        rows = [*trace.rows(router)]
        if not rows or any(one.hidden is None for one in rows):
            raise ConfigError("the trace has no hidden states; record it with record_routing(..., hidden_states=True)")
        hidden = torch.from_numpy(np.concatenate([one.hidden for one in rows]))
        first = torch.from_numpy(np.concatenate([one.experts[:, :1] for one in rows]).astype(np.int64))
        is_kept = first[:, 0] >= 0
        centroids[facts.router] = centroids_of(
            hidden[is_kept], first[is_kept], facts.num_with_weights, rounds=rounds, seed=seed
        )
    return centroids
