"""Gates that read no text: drawn from a seed, or zero for all experts."""

# L layers, E experts, H hidden

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from transformers_moe_offload.errors import RecipeError

DRAWN = ("random", "uniform", "noise", "orthogonal", "gateless")


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
