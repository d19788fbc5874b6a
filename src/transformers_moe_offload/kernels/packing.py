"""Pack codes into bytes, and unpack them.

With n bits a code, byte (r, k) of a plane holds, the highest bits first, column k of the rows r, r + R, r + 2R, ...,
where R is the number of rows of bytes; `packed.py` lists the planes of a matrix.
"""

# N rows, K columns, R rows of bytes

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from transformers_moe_offload.kernels.packed import PackedMatrix, Packing


def pack(codes: Tensor, packing: Packing) -> dict[str, Tensor]:
    """codes (N, K) uint8, each below `2 ** nbits` -> the arrays of a packed matrix that hold them.

    Bits of a byte without a row are zero.
    """
    assert codes.shape == (packing.rows, packing.cols)
    assert codes.dtype == torch.uint8
    if packing.nbits == 3:
        return {"codes": _pack_plane(codes & 3, 2), "high": _pack_plane(codes >> 2, 1)}
    return {"codes": _pack_plane(codes, packing.nbits)}


def unpack(matrix: PackedMatrix) -> Tensor:
    """The codes of a matrix, (N, K) uint8."""
    packing, parts = matrix.packing, matrix.parts
    codes = torch.empty((packing.rows, packing.cols), dtype=torch.uint8, device=parts["codes"].device)
    unpack_rows(matrix, 0, codes, torch.empty_like(codes) if packing.nbits == 3 else None)
    return codes


def unpack_rows(matrix: PackedMatrix, start: int, codes: Tensor, scratch: Tensor | None) -> None:
    """Write the codes of consecutive rows, from row `start` on, to `codes` (rows, K) uint8.

    3-bit codes also need a buffer `scratch` of the same shape and dtype.
    """
    parts, nbits = matrix.parts, matrix.packing.nbits
    if nbits != 3:
        _unpack_plane(parts["codes"], nbits, start, codes)
        return
    assert scratch is not None
    _unpack_plane(parts["codes"], 2, start, codes)
    _unpack_plane(parts["high"], 1, start, scratch)
    codes.bitwise_or_(scratch.bitwise_left_shift_(2))


def _pack_plane(codes: Tensor, nbits: int) -> Tensor:
    """codes (N, K) -> bytes (R, K)."""
    in_a_byte = 8 // nbits
    byte_rows = -(-len(codes) // in_a_byte)
    fields = functional.pad(codes, (0, 0, 0, in_a_byte * byte_rows - len(codes))).view(in_a_byte, byte_rows, -1)
    packed = torch.zeros_like(fields[0])
    for field in fields:
        packed = (packed << nbits if nbits < 8 else packed) | field
    return packed


def _unpack_plane(plane: Tensor, nbits: int, start: int, codes: Tensor) -> None:
    """Codes of the rows from `start` on, as many as fit `codes` (rows, K), from bytes (R, K)."""
    byte_rows, stop = len(plane), start + len(codes)
    for field in range(start // byte_rows, (stop - 1) // byte_rows + 1):
        first, last = max(start, field * byte_rows), min(stop, (field + 1) * byte_rows)
        packed = plane[first - field * byte_rows : last - field * byte_rows]
        unpacked = codes[first - start : last - start]
        torch.bitwise_right_shift(packed, 8 - nbits * (field + 1), out=unpacked)
        unpacked.bitwise_and_(2**nbits - 1)
