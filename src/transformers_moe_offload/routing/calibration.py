"""Calibration of routers: their confidence, compared with the loss that other experts cause.

One router at a time is perturbed while the others choose for themselves, and every token's loss is compared with the
loss without perturbation. If confidence means something, the loss rises more where the router was sure.
"""

# B sequences, S their length, N predicted tokens, V tokens of the vocabulary

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from transformers_moe_offload.config.options import choose
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing import measures
from transformers_moe_offload.routing.recorder import record_routing
from transformers_moe_offload.routing.sites import find_sites, select
from transformers_moe_offload.routing.strategy import RoutingStrategy, check_count, make_strategy
from transformers_moe_offload.routing.switching import Layers, set_routing

Measure = Literal["margin", "confidence", "entropy"]


@dataclass(frozen=True)
class RouterCalibration:
    """One router: how sure it was of each token, and how much the loss of that token changed."""

    router: int
    sureness: NDArray[np.float64] = field(repr=False)
    """(N,): margin, probability of the chosen experts, or negative entropy in bits."""
    change: NDArray[np.float64] = field(repr=False)
    """(N,): by how many nats the loss rises with the other experts; negative where it falls."""

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation of sureness and change: above zero, the router is right to be sure."""
        return measures.rank_correlation(self.sureness, self.change)

    def bins(self, count: int = 10) -> list[tuple[float, float, int]]:
        """Mean sureness, mean change and number of tokens, in bins of about as many tokens each, least sure first."""
        check_count("count", count)
        parts = np.array_split(np.argsort(self.sureness, kind="stable"), count)
        return [(float(self.sureness[p].mean()), float(self.change[p].mean()), len(p)) for p in parts if len(p)]


def calibration(
    model: Any,
    batches: Iterable[Tensor],
    strategy: str | RoutingStrategy = "random",
    *,
    layers: Layers = None,
    measure: Measure = "margin",
    **options: Any,
) -> list[RouterCalibration]:
    """Compare routers' sureness with the change in loss when a strategy chooses in their place.

    `batches` are input_ids (B, S) without padding. Takes a forward for each router and one more, per batch. A token's
    change includes the effect of the perturbed tokens before it, so read means, not values of single tokens.
    """
    choose("measure", measure, get_args(Measure))
    made = make_strategy(strategy, options)
    sites = select(find_sites(model), layers)
    found: dict[int, tuple[list[Any], list[Any]]] = {site.index: ([], []) for site in sites}
    for input_ids in batches:
        if input_ids.dim() != 2 or input_ids.shape[1] < 2:
            raise ConfigError(
                f"a batch of {tuple(input_ids.shape)} has nothing to predict; give input_ids (B, S), S > 1"
            )
        with record_routing(model, layers=layers, scores="float32") as recorder:
            before = token_losses(model, input_ids)
        for place, site in enumerate(sites):
            statistics = recorder.trace.statistics(place)
            sure = -statistics.entropy if measure == "entropy" else getattr(statistics, measure)
            if len(sure) != input_ids.numel():
                raise ConfigError(f"{site.path} routed {len(sure)} rows of a batch of {input_ids.numel()} tokens")
            with set_routing(model, made, [site.index]):
                after = token_losses(model, input_ids)
            found[site.index][0].append(sure.reshape(input_ids.shape)[:, :-1].ravel())
            found[site.index][1].append((after - before).double().cpu().numpy().ravel())
    if not any(sure for sure, _ in found.values()):
        raise ConfigError("there are no batches to calibrate on")
    return [RouterCalibration(index, np.concatenate(a), np.concatenate(b)) for index, (a, b) in found.items()]


@torch.no_grad()
def token_losses(model: Any, input_ids: Tensor) -> Tensor:
    """Nats of each token but the first: input_ids (B, S) -> (B, S - 1) float32."""
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(input_ids), -1)
