"""The sparse layers, routers and hidden states that predictors are tested with."""

# T tokens, E experts, H hidden

import torch

from transformers_moe_offload.prefetch.predictors import LayerShape

HIDDEN = 4
SHAPES = [LayerShape(0, 6, 2), LayerShape(2, 4, 1), LayerShape(3, 8, 3), LayerShape(7, 4, 4)]
"""Layers with gaps between their numbers and with sizes of their own."""


def routers(shapes=SHAPES):
    """Routers with random weights."""
    generator = torch.Generator().manual_seed(0)
    weights = {shape.layer: torch.randn(shape.num_experts, HIDDEN, generator=generator) for shape in shapes}
    return {layer: weight_applied(weight) for layer, weight in weights.items()}


def weight_applied(weight):
    return lambda hidden: hidden @ weight.T


def hidden_states(num_tokens=1, seed=0):
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def experts_of(predictions):
    return [prediction.expert.expert for prediction in predictions]
