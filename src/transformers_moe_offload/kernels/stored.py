"""How matrices are stored, and where, as the kernels of `csrc` are told: the structures of `csrc/work.h`."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from transformers_moe_offload.kernels.cpu import TYPES
from transformers_moe_offload.kernels.packed import PackedMatrix, Packing

_PLAIN = 16
_ARRAYS = ("codes", "high", "scale", "zero", "scale_range", "zero_range")


class Arrays(ctypes.Structure):
    """Addresses of a matrix and its bias; 0 for what it does not have."""

    _fields_ = [(name, ctypes.c_void_p) for name in (*_ARRAYS, "bias")]


class Shape(ctypes.Structure):
    """How a matrix, or a matrix of many experts, is stored."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("rows", "cols", "nbits", "group_size", "meta_nbits", "type", "bias_type")
    ]


Matrix = PackedMatrix | Tensor
"""(out, in): in low bits, or contiguous of a dtype in `TYPES`."""


class Stored(NamedTuple):
    """How a matrix, or a matrix of many experts, is stored."""

    rows: int
    """Outputs."""
    cols: int
    """Inputs."""
    packing: Packing | None
    """None where it is dense."""
    dtype: torch.dtype
    """Of a dense matrix."""
    bias_dtype: torch.dtype | None
    """None where there is no bias."""


def shape_of(stored: Stored) -> Shape:
    """What the kernels are told of how a matrix is stored."""
    packing, bias_type = stored.packing, -1 if stored.bias_dtype is None else TYPES[stored.bias_dtype]
    if packing is None:
        bits = 8 * stored.dtype.itemsize
        return Shape(stored.rows, stored.cols, _PLAIN, stored.cols, bits, TYPES[stored.dtype], bias_type)
    return Shape(stored.rows, stored.cols, packing.nbits, packing.group_size, packing.meta_nbits, 0, bias_type)


def fill(entry: Arrays, matrix: Matrix, bias: Tensor | None) -> None:
    """Tell the kernels where a matrix and its bias lie."""
    arrays: Mapping[str, Tensor] = {"codes": matrix} if isinstance(matrix, Tensor) else matrix.parts
    for name in _ARRAYS:
        setattr(entry, name, arrays[name].data_ptr() if name in arrays else 0)
    if bias is not None:
        entry.bias = bias.data_ptr()
