"""The rows of a layer's router, from sums over the layer's hidden states. Pure; no model, no file."""

# E experts, H hidden, N sampled tokens

from __future__ import annotations

import torch
from torch import Tensor

from transformers_moe_offload.builder.gates.ridge import ridge_rows, targets
from transformers_moe_offload.builder.gates.sums import Sums
from transformers_moe_offload.builder.recipe import Gate

READ = ("ridge", "mean", "hidden", "hidden_avg", "base_first")
"""Modes that need hidden states."""

NEED_SECOND_MOMENT = ("ridge", "base_first")


def programmed_rows(gate: Gate, sums: Sums) -> Tensor:
    """Rows of a mode that reads hidden states, before they are scaled: (E, H) float64."""
    if gate.mode == "ridge":
        assert sums.second_moment is not None
        return centred(ridge_rows(sums.second_moment, targets(sums), gate.regularization), gate.center)
    if gate.mode == "base_first":
        return base_first_rows(sums, gate.regularization)
    return directions(_vectors(gate, sums), gate.center)


def directions(vectors: Tensor, center: bool) -> Tensor:
    """Rows of length 1 that point where an expert's texts differ from the others': (E, H) -> (E, H)."""
    rows = centred(vectors, center)
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def centred(rows: Tensor, center: bool) -> Tensor:
    """Rows minus their mean, if `center`. Softmax is invariant to that; lengths and sigmoids are not."""
    return rows - rows.mean(0, keepdim=True) if center and len(rows) > 1 else rows


def base_first_rows(sums: Sums, regularization: float) -> Tensor:
    """The first expert scores about 1 for every token, the others 0: rows (E, H) float64.

    Routers have no bias, so the 1 is a linear function of the hidden state, by ridge regression.
    """
    assert sums.second_moment is not None
    own = sums.counts > 0
    everything = sums.mean[own].sum(0, keepdim=True)
    first = ridge_rows(sums.second_moment, everything, regularization)
    return torch.cat([first, first.new_zeros(len(sums.counts) // 2 - 1, first.shape[1])])


def _vectors(gate: Gate, sums: Sums) -> Tensor:
    """One vector per expert, less that of its negative prompts: (E, H) float64."""
    if gate.mode == "hidden" or (gate.mode == "mean" and gate.pool == "last"):
        by_list = sums.mean_last
    elif gate.mode == "hidden_avg":
        by_list = sums.mean_of_means
    else:
        by_list = sums.mean
    return by_list[::2] - by_list[1::2]
