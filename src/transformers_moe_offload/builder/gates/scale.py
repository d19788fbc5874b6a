"""How sharply routers choose: the entropy of routing weights, and the scale of the rows that gives a wanted entropy.

A router's softmax is as sharp as its rows are long. Their length says nothing by itself (hidden states differ in size
from layer to layer and from model to model), so it is calibrated: routing weights over all experts are to have a
given entropy on the texts of the experts.
"""

# N tokens, E experts

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Scores = Literal["softmax", "sigmoid"]
"""How routers turn logits into scores; weights are the scores divided by their sum."""

_OCTAVES = (-20, 40)
"""Scales that are tried, as powers of 2; the first of them makes any gate flat."""


def entropy(logits: Tensor, scores: Scores = "softmax") -> Tensor:
    """Entropy of routing weights before the top k are taken, as a share of its maximum: (N, E) -> (N,) float64."""
    num_experts = logits.shape[-1]
    if num_experts == 1:
        return torch.zeros(logits.shape[:-1], dtype=torch.float64)
    logits = logits.double()
    if scores == "sigmoid":
        logits = torch.nn.functional.logsigmoid(logits)
    log_weights = logits.log_softmax(-1)
    return -(log_weights.exp() * log_weights).sum(-1) / math.log(num_experts)


def scale_for(logits: Tensor, target: float, scores: Scores = "softmax") -> float | None:
    """The factor on logits (N, E) at which their mean entropy is `target`; None where none comes close.

    The smallest such factor: softmax has one, sigmoid may have several, as its weights are flat again where all scores
    saturate.
    """

    def at(scale: float) -> float:
        return entropy(logits * scale, scores).mean().item()

    if logits.shape[-1] == 1 or not logits.numel():
        return None
    spread = (logits - logits.mean(-1, keepdim=True)).abs().mean().item()
    if spread == 0:
        return None
    low = 2.0 ** _OCTAVES[0] / spread
    for _ in range(_OCTAVES[1] - _OCTAVES[0]):
        high = low * 2
        if at(high) <= target:
            break
        low = high
    else:
        return None
    for _ in range(50):  # float64 has 52 bits
        middle = math.sqrt(low * high)
        low, high = (middle, high) if at(middle) > target else (low, middle)
    return high
