"""Quantize a matrix: code its groups in chunks that fit a CPU cache, then pack the codes."""

# N rows (outputs), K columns (inputs), g group size, G = K / g groups in a row, M = N * G groups

from __future__ import annotations

import torch
from torch import Tensor

from transformers_moe_offload.config.formats import HqqFormat
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.formats.groups import code_groups
from transformers_moe_offload.kernels.packed import META_BLOCK, PackedMatrix, Packing
from transformers_moe_offload.kernels.packing import pack
from transformers_moe_offload.kernels.solver import Solver, solver_for


def packing_of(rows: int, cols: int, format: HqqFormat, *, name: str = "the matrix") -> Packing:
    """How a format packs a matrix (rows, cols); errors call it `name`."""
    if cols % format.group_size:
        raise ConfigError(
            f"group_size={format.group_size} does not divide the {cols} inputs of {name}, {rows} x {cols}; "
            "choose one that does, or leave this layer as it is"
        )
    return Packing(rows, cols, format.nbits, format.group_size, format.meta_nbits)


@torch.no_grad()
def quantize(
    weight: Tensor, format: HqqFormat, *, name: str = "the matrix", solver: Solver | None = None
) -> PackedMatrix:
    """weight (N, K) of any float dtype, on any device -> the quantized matrix, on the same device.

    The same weights always give the same bytes. A weight that is infinite or not a number is a `CheckpointError`, which
    calls the matrix `name`.
    """
    if format.axis != 1:
        raise ConfigError(
            f"{name} cannot be quantized with axis={format.axis}, which is for reading only; choose axis=1"
        )
    rows, cols = weight.shape
    packing = packing_of(rows, cols, format, name=name)
    solver = solver or solver_for(weight)
    groups = weight.reshape(-1, format.group_size)
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
    pieces: list[dict[str, Tensor]] = []
    step = max(1, solver.chunk_of(weight) // (format.group_size * META_BLOCK)) * META_BLOCK
    for start in range(0, len(groups), step):
        coded = code_groups(groups[start : start + step].float().contiguous(), format, solver, name)
        codes[start : start + step] = coded.codes
        pieces.append(coded.meta)
    meta = {
        part.name: torch.cat([piece[part.name] for piece in pieces]).view(part.shape)
        for part in packing.parts
        if part.name not in ("codes", "high")
    }
    return PackedMatrix(packing, pack(codes.view(weight.shape), packing) | meta)
