"""The rows of routers: from sums over a layer's hidden states, or drawn. Pure; no model, no file."""

# E experts, H hidden, N sampled tokens, L layers

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from transformers_moe_offload.builder.gates.sums import Sums
from transformers_moe_offload.builder.recipe import Gate
from transformers_moe_offload.errors import RecipeError

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


def targets(sums: Sums) -> Tensor:
    """(E, H) float64: b, what the rows are fitted to."""
    mean = sums.mean
    return mean[::2] - mean[1::2]


def ridge_rows(second_moment: Tensor, targets: Tensor, regularization: float) -> Tensor:
    """The linear scores that come closest to 1 for an expert's own tokens and 0 for others'.

    second_moment (H, H), targets (E, H), float64 -> (E, H) float64.

    Closed form, as in DUME (arXiv 2603.29765): rows = b (A + lambda I)^-1 with A the second moment of the hidden states
    and b their means by expert; -1 for an expert's negative prompts. Each expert's texts weigh the same.
    `regularization` is lambda as a share of the mean square of the hidden states.
    """
    hidden_size = second_moment.shape[0]
    penalty = regularization * second_moment.diagonal().mean()
    if penalty == 0:
        return torch.zeros_like(targets)
    regular = second_moment + penalty * torch.eye(hidden_size, dtype=second_moment.dtype)
    return torch.linalg.solve(regular, targets.T, left=True).T.contiguous()


def drawn_rows(
    mode: str, num_layers: int, num_experts: int, hidden_size: int, *, seed: int, initializer_range: float
) -> Tensor:
    """Rows of all layers, (L, E, H) float32; they do not depend on which of the layers get experts.

    `random` is normal with a standard deviation of 1, which sends nearly every token to one expert at full weight,
    `noise` with that of the model's own initialization, `uniform` what `torch.nn.Linear` begins with; rows of
    `orthogonal` have length 1. The first and the third are what mergekit-moe 0.1.5 draws from the same seed.
    """
    generator = Generator().manual_seed(seed)
    shape = (num_layers, num_experts, hidden_size)
    if mode == "gateless":
        return torch.zeros(shape)
    if mode == "uniform":
        bound = math.sqrt(1.0 / hidden_size)
        return torch.rand(shape, generator=generator) * 2 * bound - bound
    rows = torch.randn(shape, generator=generator)
    if mode == "random":
        return rows
    if mode == "noise":
        return rows * initializer_range
    assert mode == "orthogonal", mode
    if num_experts > hidden_size:
        raise RecipeError(
            f"{num_experts} experts cannot have orthogonal gates in {hidden_size} dimensions; set gate.mode to random"
        )
    return torch.linalg.qr(rows.mT).Q.mT.contiguous()
