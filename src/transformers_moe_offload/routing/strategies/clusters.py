"""Choose by where a token's hidden state lies: each expert has a centroid, and the nearest ones are chosen.

Centroids are fitted to recorded hidden states.
"""

# N recorded tokens, K experts per token, T tokens, E experts, H hidden

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing.choice import Choice, RouterCall, best
from transformers_moe_offload.routing.strategy import RoutingStrategy, check_count, check_seed, register_strategy
from transformers_moe_offload.routing.trace import RoutingTrace


@register_strategy("k_means")
@dataclass(frozen=True)
class KMeans(RoutingStrategy):
    """The experts whose centroids are nearest to the router's input.

    `centroids` are (E, H) for each router, by its number: `routing.fit_centroids` fits them to recorded hidden states.
    Clusters in place of a trained router: Gururangan et al. 2023, "Scaling Expert Language Models with Unsupervised
    Domain Discovery", section 2 (arXiv 2303.14177), there for documents.
    """

    centroids: Mapping[int, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.centroids, Mapping):
            raise ConfigError(
                f"centroids={type(self.centroids).__name__} is not a mapping from numbers of routers to centroids, as "
                f"routing.fit_centroids makes it"
            )
        if not self.centroids:
            raise ConfigError(
                "strategy 'k_means' has no centroids; record with record_routing(..., hidden_states=True), and pass "
                "centroids=routing.fit_centroids(trace)"
            )

    def check(self, layer: int, num_experts: int, top_k: int | None) -> None:
        """There are centroids for the router, one for each expert."""
        if layer not in self.centroids:
            raise ConfigError(
                f"centroids were fitted for routers {sorted(self.centroids)}, and not for router {layer}; fit it, or "
                f"name the others in layers="
            )
        if len(self.centroids[layer]) != num_experts:
            raise ConfigError(
                f"{len(self.centroids[layer])} centroids for router {layer}, which has {num_experts} experts; "
                f"fit as many"
            )
        if not self.centroids[layer].isfinite().all():
            raise ConfigError(f"the centroids of router {layer} are not all finite numbers; fit them again")

    def choose(self, call: RouterCall) -> Choice:
        """The nearest experts that the architecture does not rule out; experts without weights have no centroid."""
        assert call.hidden is not None
        centroids = self.centroids[call.layer].to(call.hidden.device)
        if centroids.shape[1:] != call.hidden.shape[1:]:
            raise ConfigError(
                f"the centroids of router {call.layer} are {tuple(centroids.shape)}, and its hidden states have "
                f"{call.hidden.shape[1]} values; fit them on a recording of this model"
            )
        nearness = -torch.cdist(call.hidden.float(), centroids.float())
        ranking = torch.full_like(call.scores, -torch.inf, dtype=torch.float32)
        ranking[:, : len(centroids)] = nearness
        return best(ranking.masked_fill(call.scores.isneginf(), -torch.inf), call.top_k)


def centroids_of(hidden: Tensor, chosen: Tensor, num_experts: int, *, rounds: int = 20, seed: int = 0) -> Tensor:
    """Centroids for experts: hidden (N, H), chosen (N, K), what the router chose for them -> (E, H) float32.

    Lloyd's algorithm from the mean of the tokens that each expert was given, so that a cluster belongs to the expert
    that starts it; an expert that was given none starts from a random token. A cluster that runs empty stays where it
    is.
    """
    check_count("rounds", rounds)
    check_seed(seed)
    if len(hidden) < num_experts:
        raise ConfigError(f"{len(hidden)} recorded tokens are too few for {num_experts} centroids; record more")
    hidden = hidden.float()
    random = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(seed))[:num_experts]
    centroids = hidden[random].clone()
    centroids = _means(hidden, chosen[:, 0], centroids)
    for _ in range(rounds):
        centroids = _means(hidden, torch.cdist(hidden, centroids).argmin(-1), centroids)
    return centroids


def _means(hidden: Tensor, cluster: Tensor, before: Tensor) -> Tensor:
    """The mean of each cluster's tokens: hidden (N, H), cluster (N,) -> (E, H)."""
    is_expert = cluster < len(before)
    hidden, cluster = hidden[is_expert], cluster[is_expert]
    counts = torch.bincount(cluster, minlength=len(before))[:, None]
    sums = torch.zeros_like(before).index_add_(0, cluster, hidden)
    return torch.where(counts > 0, sums / counts.clamp(min=1), before)


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
