"""Arithmetic with packed matrices in torch, on any device: the reference for every other kernel.

A matrix is dequantized a few rows at a time into reused buffers, never into memory of its full size: on CPUs, fresh
pages cost more than the arithmetic (4096 x 14336, one Zen 3 core: 600 ms at once, 50 ms by rows).
"""

# T rows of input, N rows and K columns of the matrix, g group size, G = K / g groups in a row

from __future__ import annotations

import threading
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from transformers_moe_offload.kernels.packed import META_BLOCK, PackedMatrix, unpack_rows


class _Buffers(threading.local):
    """Per thread, the largest buffer requested so far for each purpose."""

    def __init__(self) -> None:
        self.largest: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


_BUFFERS = _Buffers()


def scratch(purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised buffer of this thread, valid until the thread requests one for the same purpose again."""
    key, size = (purpose, dtype, device), prod(shape)
    found = _BUFFERS.largest.get(key)
    if found is None or found.numel() < size:
        with torch.inference_mode(False):
            found = torch.empty(size, dtype=dtype, device=device)
        _BUFFERS.largest[key] = found
    return found[:size].view(shape)


TILE_ROWS = 64
"""Rows of a matrix that are dequantized at a time: 14336 columns of them in float32 are 3.5 MiB, which the L2 or L3
of a core still holds when they are multiplied."""


def scales_and_zeros(matrix: PackedMatrix) -> tuple[Tensor, Tensor]:
    """Scale and zero of every group, both (N, G) float32."""
    return _meta(matrix, "scale"), _meta(matrix, "zero")


def dequantize(matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """The weights, (N, K): computed in float32, then cast."""
    packing = matrix.packing
    weights = torch.empty((packing.rows, packing.cols), dtype=dtype, device=matrix.parts["codes"].device)
    for start, tile in _tiles(matrix):
        weights[start : start + len(tile)] = tile
    return weights


def linear(rows: Tensor, matrix: PackedMatrix) -> Tensor:
    """rows (T, K) of any float dtype -> their products with the rows of the matrix, (T, N), added up in float32."""
    out = torch.empty((len(rows), matrix.packing.rows), dtype=rows.dtype, device=rows.device)
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        inputs = rows.float()
        for start, tile in _tiles(matrix):
            out[:, start : start + len(tile)] = inputs @ tile.t()
    return out


def linear_transposed(rows: Tensor, matrix: PackedMatrix) -> Tensor:
    """rows (T, N) of any float dtype -> their products with the columns of the matrix, (T, K)."""
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        inputs = rows.float()
        out = torch.zeros((len(rows), matrix.packing.cols), device=rows.device)
        for start, tile in _tiles(matrix):
            out.addmm_(inputs[:, start : start + len(tile)], tile)
    return out.to(rows.dtype)


def _meta(matrix: PackedMatrix, name: str) -> Tensor:
    packing = matrix.packing
    stored = matrix.parts[name].float()
    if packing.meta_nbits == 16:
        return stored
    minimum, step = matrix.parts[f"{name}_range"].float().repeat_interleave(META_BLOCK, 0)[: stored.numel()].unbind(1)
    return minimum.add(step * stored.view(-1)).view(packing.rows, packing.groups)


def _tiles(matrix: PackedMatrix) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row and the float32 weights (rows, K) of each tile. The next tile overwrites the last one."""
    packing = matrix.packing
    scale, zero = (meta.unsqueeze(-1) for meta in scales_and_zeros(matrix))
    shape, device = (TILE_ROWS, packing.cols), matrix.parts["codes"].device
    buffers = [scratch(name, shape, torch.uint8, device) for name in ("codes", "high")]
    buffers.append(scratch("weights", shape, torch.float32, device))
    for start in range(0, packing.rows, TILE_ROWS):
        stop = min(start + TILE_ROWS, packing.rows)
        codes, high, weights = (buffer[: stop - start] for buffer in buffers)
        unpack_rows(matrix, start, codes, high)
        weights.copy_(codes)
        grouped = weights.view(stop - start, packing.groups, packing.group_size)
        grouped.sub_(zero[start:stop]).mul_(scale[start:stop])
        yield start, weights
