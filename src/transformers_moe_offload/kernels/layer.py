"""The experts of one sparse layer for few tokens, by one call of the compiled kernels of `csrc/layer.c`.

Both products of each expert, the activation between them and the weighted sum at the end are added up in float32 and
rounded once. Experts are found by a table of addresses; a layer some of whose experts are absent is computed by several
calls, to the same bits.
"""

# T tokens, K experts per token, P = T * K pairs, E experts, H hidden, I intermediate

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from transformers_moe_offload.kernels import native
from transformers_moe_offload.kernels.cpu import TYPES
from transformers_moe_offload.kernels.grouped import Activation, Function
from transformers_moe_offload.kernels.stored import Arrays, Matrix, Shape, Stored, fill, shape_of

MOST_TOKENS = 32
"""A forward that verifies drafted tokens has up to 21 by default. With 9 to 32 tokens a layer of 64 experts, 8 chosen,
takes 0.60 to 0.66 times as long as expert by expert in bfloat16, 0.40 to 0.53 in 4 bits; one of 8 experts, 2 chosen,
0.72 to 0.94 and 0.81 to 0.85 (hidden size 1024, two cores of an EPYC with bfloat16 units; on one core 0.63 to 0.91)."""

MOST_ROWS_PER_EXPERT = 8
"""On average, for more tokens than that: more rows are multiplied faster by other kernels (`dense.FEW_ROWS`)."""

MOST_CHOICES, MOST_PAIRS = 64, 512
"""As in `csrc/lowbit.h`."""


def takes(num_tokens: int, choices: int, num_experts: int) -> bool:
    """Whether a forward of so many tokens, with so many choices each, is computed by one call.

    It depends on nothing else, so that results do not depend on what is in memory.
    """
    pairs = num_tokens * choices
    is_short = num_tokens <= MOST_ROWS_PER_EXPERT or pairs <= MOST_ROWS_PER_EXPERT * num_experts
    return is_short and 0 < num_tokens <= MOST_TOKENS and 0 < choices <= MOST_CHOICES and pairs <= MOST_PAIRS


class _Expert(ctypes.Structure):
    """Where one expert lies: `kind` is 0 where it is absent, else 1 or 2."""

    _fields_ = [("kind", ctypes.c_int64), ("until", ctypes.c_double), ("first", Arrays), ("second", Arrays)]


class _Activation(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("function", "has_gate", "is_interleaved", "has_limit")),
        *((name, ctypes.c_double) for name in ("limit", "slope", "shift")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("num_experts", ctypes.c_int64),
        ("rounded", ctypes.c_int64),
        ("activation", _Activation),
        ("first", Shape * 2),
        ("second", Shape * 2),
        ("sure_for", ctypes.c_double),
        ("experts", ctypes.POINTER(_Expert)),
    ]


class Workspace:
    """Memory for one step at a time, of any of a model's layers; it grows to what is needed."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.address = 0
        """Of its first byte, a multiple of 64."""
        self._memory: Tensor | None = None

    def fit(self, nbytes: int) -> None:
        """Make room for so many bytes; what was in it is lost."""
        with torch.inference_mode(False):
            self._memory = memory = torch.empty(nbytes + 64, dtype=torch.uint8)
        self.nbytes, self.address = nbytes, -(-memory.data_ptr() // 64) * 64


class LayerKernel:
    """One sparse layer: the table of its experts, and the steps that compute with them. One thread at a time."""

    def __init__(
        self,
        num_experts: int,
        kinds: Sequence[tuple[Stored, Stored]],
        activation: Activation,
        workspace: Workspace,
        *,
        rounds: bool = False,
        sure_for: float = math.inf,
    ) -> None:
        """`kinds`: one or two ways in which experts may be stored; of each the matrix before the activation, and that
        behind it. `rounds`: whether products with matrices in low bits round their rows to int8. `sure_for`: how many
        seconds an expert counts as being in memory after each use."""
        library = native.library()
        assert library is not None
        self.num_experts = num_experts
        self._library = library
        self._workspace = workspace
        self._table = (_Expert * num_experts)()
        number = get_args(Function).index(activation.function)
        limit = activation.limit
        self._layer = _Layer(
            num_experts=num_experts,
            rounded=rounds,
            activation=_Activation(
                number, activation.has_gate, activation.is_interleaved, limit is not None,
                0.0 if limit is None else limit, activation.slope, activation.shift,
            ),
            sure_for=sure_for,
            experts=self._table,
        )  # fmt: skip
        for kind, (first, second) in enumerate(kinds):
            self._layer.first[kind], self._layer.second[kind] = shape_of(first), shape_of(second)
        self._address = ctypes.addressof(self._layer)
        self._bytes: dict[torch.Size, int] = {}
        self._wanted = ctypes.POINTER(ctypes.c_int32)()

    def put(
        self,
        expert: int,
        kind: int,
        first: Matrix,
        second: Matrix,
        biases: Sequence[Tensor | None] = (None, None),
        until: float = math.inf,
    ) -> None:
        """An expert of a kind, 0 or 1, is in memory until it is taken away: the caller keeps its matrices alive.

        From the time `until` on, in seconds of `time.monotonic`, it counts as absent.
        """
        entry = self._table[expert]
        entry.kind, entry.until = kind + 1, until
        fill(entry.first, first, biases[0])
        fill(entry.second, second, biases[1])

    def keep_until(self, expert: int, until: float) -> None:
        """Another time from which an expert counts as absent."""
        self._table[expert].until = until

    def take_away(self, expert: int) -> None:
        """An expert is not in memory any more."""
        self._table[expert].kind = 0

    def step(self, hidden: Tensor, index: Tensor, weights: Tensor, out: Tensor, now: float) -> bool:
        """Compute a step if all experts that it wants are in memory at the time `now`; returns whether it was done.

        hidden (T, H), index (T, K) int64, weights (T, K) -> out (T, H) of hidden's dtype; all contiguous. What was not
        done has begun: `some` and `end` do it in pieces.
        """
        absent: int = self._library.moe_layer(*self._inputs(hidden, index, weights, out), now, torch.get_num_threads())
        return absent == 0

    def begin(self, hidden: Tensor, index: Tensor, weights: Tensor, out: Tensor) -> None:
        """Begin a step that is done in pieces, whatever is in memory."""
        self._library.moe_layer_begin(*self._inputs(hidden, index, weights, out))

    def _inputs(self, hidden: Tensor, index: Tensor, weights: Tensor, out: Tensor) -> tuple[int, ...]:
        """What both ways to begin a step are told."""
        return (
            self._address,
            self._room(index),
            *index.shape,
            hidden.data_ptr(),
            TYPES[hidden.dtype],
            index.data_ptr(),
            weights.data_ptr(),
            TYPES[weights.dtype],
            out.data_ptr(),
        )

    def _room(self, index: Tensor) -> int:
        """The address of a workspace for index (T, K)."""
        shape = index.shape
        nbytes = self._bytes.get(shape)
        if nbytes is None:
            nbytes = self._bytes[shape] = self._library.moe_layer_bytes(self._address, *shape)
        if self._workspace.nbytes < nbytes:
            self._workspace.fit(nbytes)
        return self._workspace.address

    def wanted(self) -> list[int]:
        """The experts that the latest step wants, by the last token that wants them, the earliest first."""
        number = self._library.moe_layer_wanted(self._workspace.address, ctypes.byref(self._wanted))
        return self._wanted[:number]

    def some(self, experts: Sequence[int]) -> None:
        """Compute the rows of some experts of the latest step, which are all in memory."""
        numbers = (ctypes.c_int32 * len(experts))(*experts)
        self._library.moe_layer_some(
            self._address, self._workspace.address, numbers, len(experts), torch.get_num_threads()
        )

    def end(self) -> None:
        """Write the result of the latest step, all of whose experts have been computed."""
        self._library.moe_layer_end(self._address, self._workspace.address, torch.get_num_threads())
