"""Attention of a decode step, of a layer with its four linear layers, by two calls of the compiled kernels.

Between the calls the caller puts new keys and values into its cache. Sums are in float32; queries, keys, values and
what goes into the last linear layer are rounded to their dtype, as the layers of a model round them.
"""

# B texts, H hidden, N heads of queries, M heads of keys and values, D columns of a head, S tokens, 2 R rotated columns

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transformers_moe_offload.kernels import native
from transformers_moe_offload.kernels.cpu import TYPES
from transformers_moe_offload.kernels.few_rows import Norm
from transformers_moe_offload.kernels.packed import PackedMatrix
from transformers_moe_offload.kernels.stored import Arrays, Matrix, Shape, Stored, fill, shape_of

MOST_TEXTS = 8


class _Linear(ctypes.Structure):
    _fields_ = [("shape", Shape), ("arrays", Arrays)]


class _Norm(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("type", "cols", "rounds")),
        *((name, ctypes.c_double) for name in ("epsilon", "shift")),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("head_dim", "rounded")),
        ("scaling", ctypes.c_double),
        ("linears", _Linear * 4),
        ("norms", _Norm * 2),
    ]


class Attention(NamedTuple):
    """How a layer attends: softmax(scaling q k^T) v."""

    head_dim: int
    rotary_dims: tuple[int, ...]
    """How many columns of queries and keys, 2 R, may be turned by their position, i with i + R; () where none are."""
    scaling: float
    norms: tuple[Norm | None, Norm | None]
    """Of queries and keys, before they are turned: of each head, or of all together, as the norm's weight is long."""


class AttentionKernel:
    """A layer's attention, with its weights, which the caller keeps alive."""

    def __init__(
        self,
        attention: Attention,
        linears: Sequence[tuple[Matrix, Tensor | None]],
        norms: Sequence[Tensor | None] = (None, None),
        *,
        rounds: bool = False,
    ) -> None:
        """`linears`: matrix (out, in) and bias of queries, keys, values and of the output. `norms`: the weights of both
        norms. `rounds`: whether products with matrices in low bits round their rows to int8."""
        library = native.library()
        assert library is not None
        self._library = library
        self._attention = _Attention(attention.head_dim, rounds, attention.scaling)
        for made, (matrix, bias) in zip(self._attention.linears, linears, strict=True):
            made.shape = shape_of(_stored(matrix, bias))
            fill(made.arrays, matrix, bias)
        for made, norm, weight in zip(self._attention.norms, attention.norms, norms, strict=True):
            if norm is not None and weight is not None:
                made.weight, made.type, made.cols = weight.data_ptr(), TYPES[weight.dtype], len(weight)
                made.epsilon, made.shift, made.rounds = norm
        self._address = ctypes.addressof(self._attention)
        self._heads = [made.shape.rows // attention.head_dim for made in self._attention.linears[:3]]
        self._head_dim = attention.head_dim
        self._hidden = self._attention.linears[3].shape.rows

    def project(self, hidden: Tensor, turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (B, 1, H), cosines and sines (B or 1, 1, 2 R) -> queries (B, N, 1, D), keys and values (B, M, 1, D) of
        hidden's dtype; all contiguous, of dtypes in `TYPES`."""
        texts, dtype = len(hidden), hidden.dtype
        queries, keys, values = (torch.empty((texts, heads, 1, self._head_dim), dtype=dtype) for heads in self._heads)
        if self._library.moe_project(
            self._address,
            hidden.data_ptr(),
            TYPES[dtype],
            texts,
            *_turn(turn),
            queries.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            torch.get_num_threads(),
        ):
            raise MemoryError(f"no memory for queries, keys and values of {texts} tokens")
        return queries, keys, values

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """queries (B, N, 1, D) contiguous, keys and values (B, M, S, D) with contiguous columns, all of one dtype ->
        (B, 1, H): of the newest token of each text, which attends to all S."""
        texts, tokens = len(keys), keys.shape[2]
        out = torch.empty((texts, 1, self._hidden), dtype=queries.dtype)
        steps = array("q", (*keys.stride()[:3], *values.stride()[:3]))
        if self._library.moe_attend(
            self._address,
            queries.data_ptr(),
            TYPES[queries.dtype],
            texts,
            keys.data_ptr(),
            values.data_ptr(),
            steps.buffer_info()[0],
            tokens,
            out.data_ptr(),
            torch.get_num_threads(),
        ):
            raise MemoryError(f"no memory to attend to {tokens} tokens of {texts} texts")
        return out


def _turn(turn: tuple[Tensor, Tensor] | None) -> tuple[int, int, int, int, int]:
    """Cosines and sines as the kernel takes them."""
    if turn is None:
        return 0, 0, 0, 0, 0
    cos, sin = turn
    return cos.data_ptr(), sin.data_ptr(), TYPES[cos.dtype], len(cos), cos.shape[-1]


def _stored(matrix: Matrix, bias: Tensor | None) -> Stored:
    bias_dtype = None if bias is None else bias.dtype
    if isinstance(matrix, PackedMatrix):
        return Stored(matrix.packing.rows, matrix.packing.cols, matrix.packing, torch.float32, bias_dtype)
    rows, cols = matrix.shape
    return Stored(rows, cols, None, matrix.dtype, bias_dtype)
