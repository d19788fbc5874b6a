"""How much a model's answers depend on the choice of experts: run it several times with sampled routing, and compare.

As dropout at test time samples from an ensemble of thinned networks (Gal and Ghahramani 2016, "Dropout as a Bayesian
Approximation", arXiv 1506.02142), sampled experts sample from an ensemble of paths through one model.
"""

# B sequences, S their length, V tokens of the vocabulary, R repeats

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing.strategy import check_count, check_seed, make_strategy
from transformers_moe_offload.routing.switching import Layers, set_routing


@dataclass(frozen=True)
class RoutingUncertainty:
    """How predictions at each position vary between repeats with sampled routing; (B, S) float32, entropies in bits."""

    logit_variance: Tensor
    """Variance of a logit between repeats, averaged over the vocabulary."""
    disagreement: Tensor
    """Share of repeats whose likeliest token is not the one that most repeats have (variation ratio)."""
    entropy: Tensor
    """Entropy of the mean of the repeats' predictions."""
    mutual_information: Tensor
    """Mutual information of prediction and routing, the part of `entropy` that comes from the choice of experts:
    `entropy` less the mean entropy of single repeats (Houlsby et al. 2011, section 2, arXiv 1112.5745)."""
    repeats: int


@torch.no_grad()
def routing_uncertainty(
    model: Any,
    inputs: Mapping[str, Any] | Tensor,
    strategy: str = "temperature",
    *,
    repeats: int = 8,
    layers: Layers = None,
    seed: int = 0,
    **options: Any,
) -> RoutingUncertainty:
    """Run a model `repeats` times under a strategy that draws its experts, each time with another seed.

    `inputs` are the keyword arguments of a forward, or input_ids (B, S); `options` are those of the strategy.
    The model's earlier strategies are restored afterwards. Holds a few tensors of (B, S, V), independent of `repeats`.
    """
    check_count("repeats", repeats, least=2)
    check_seed(seed)
    if not hasattr(make_strategy(strategy, options), "seed"):
        raise ConfigError(f"strategy {strategy!r} draws nothing, so all repeats would be equal; use one with a seed")
    forward = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    mean = squares = predictions = entropies = torch.zeros(())
    likeliest = []
    for number in range(repeats):
        with set_routing(model, strategy, layers, seed=seed + number, **options):
            logits = model(**forward).logits.float()
        step = logits - mean  # running mean and variance: Welford 1962
        mean = mean + step / (number + 1)
        squares = squares + step * (logits - mean)
        prediction = logits.softmax(-1)
        predictions = predictions + prediction
        entropies = entropies + _entropy(prediction)
        likeliest.append(logits.argmax(-1))
    entropy = _entropy(predictions / repeats)
    tokens = torch.stack(likeliest)  # (R, B, S)
    votes = (tokens == tokens.mode(0).values).float().mean(0)
    variance = (squares / (repeats - 1)).mean(-1)
    return RoutingUncertainty(variance, 1 - votes, entropy, (entropy - entropies / repeats).clamp(min=0), repeats)


def _entropy(prediction: Tensor) -> Tensor:
    """In bits: (..., V) -> (...)."""
    entropy: Tensor = torch.special.entr(prediction).sum(-1) / math.log(2)
    return entropy
