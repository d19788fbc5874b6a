"""Rows of routers, computed from the adapters' weights alone (Arrow, arXiv 2405.11157, section 3.2)."""

# E adapters, R rank, I inputs, O outputs of a linear layer

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transformers_moe_offload.builder.adapters.plan import Adapter


def arrow_rows(adapters: Sequence[Adapter], paths: Sequence[str], num_inputs: int) -> Tensor:
    """For each adapter the direction of inputs that it changes most, of length 1: (E, I) float32.

    `paths` are linear layers with the same input, taken as one. An adapter that adds to none of them has zeros: it is
    chosen last.
    """
    return torch.stack([_direction(adapter, paths, num_inputs) for adapter in adapters])


def _direction(adapter: Adapter, paths: Sequence[str], num_inputs: int) -> Tensor:
    reduced = []
    for path in paths:
        found = adapter.folder.read(path)
        if found is not None:
            lora_a, lora_b = (matrix.double() for matrix in found)
            # B A = Q (R A) with orthonormal Q: the same right singular vectors, from a matrix of R rows.
            triangle = torch.linalg.qr(lora_b).R
            reduced.append(adapter.folder.scaling(path) * triangle @ lora_a)
    if not reduced:
        return torch.zeros(num_inputs)
    return torch.linalg.svd(torch.cat(reduced), full_matrices=False).Vh[0].float()
