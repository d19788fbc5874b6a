"""A matrix in low bits: which arrays it is made of, what a code in them means, and how codes are packed into bytes.

Weight (n, k) is `(code[n, k] - zero[n, k // g]) * scale[n, k // g]`, in float32. Codes of 8, 4, 2 and 1 bits lie as
hqq 0.2.8 packs them along axis 1 (`hqq/core/bitpack.py`): with `f = 8 / nbits` codes in a byte, byte (r, k) holds the
codes of the rows r, r + R, r + 2R, ... of column k, the first one in the highest bits, where R is `ceil(N / f)`.
3-bit codes are two planes of that kind: `codes` has their lower 2 bits, `high` the bit above.
"""

# N rows (outputs), K columns (inputs), g group size, G = K / g groups in a row, R rows of bytes

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from transformers_moe_offload.expert import FieldSpec

META_BLOCK = 128
"""Scales, or zeros, in 8 bits that share a minimum and a step: consecutive ones in the order of (N, G)."""


@dataclass(frozen=True)
class Packing:
    """How a matrix of a certain shape is packed."""

    rows: int
    cols: int
    nbits: int
    group_size: int
    meta_nbits: int

    def __post_init__(self) -> None:
        assert self.cols % self.group_size == 0

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return self.cols // self.group_size

    @property
    def fields(self) -> int:
        """Codes in a byte of `codes`."""
        return 8 // (2 if self.nbits == 3 else self.nbits)

    @cached_property
    def parts(self) -> tuple[FieldSpec, ...]:
        """The arrays of a packed matrix.

        `codes` uint8 (R, K), with 3 bits `high` uint8 (ceil(N / 8), K); `scale` and `zero` (N, G), either float16, or
        uint8 values that mean `minimum + step * value`, with `scale_range` and `zero_range` float16
        (ceil(N * G / META_BLOCK), 2), minimum and step of each block.
        """
        plane = 2 if self.nbits == 3 else self.nbits
        parts = [FieldSpec("codes", (-(-self.rows * plane // 8), self.cols), "uint8")]
        if self.nbits == 3:
            parts.append(FieldSpec("high", (-(-self.rows // 8), self.cols), "uint8"))
        meta = (self.rows, self.groups)
        if self.meta_nbits == 16:
            return (*parts, FieldSpec("scale", meta, "float16"), FieldSpec("zero", meta, "float16"))
        blocks = (-(-self.rows * self.groups // META_BLOCK), 2)
        return (
            *parts,
            FieldSpec("scale", meta, "uint8"),
            FieldSpec("zero", meta, "uint8"),
            FieldSpec("scale_range", blocks, "float16"),
            FieldSpec("zero_range", blocks, "float16"),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class PackedMatrix:
    """A packed matrix: the arrays that `packing.parts` names, contiguous, on one device."""

    packing: Packing
    parts: Mapping[str, Tensor]


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
