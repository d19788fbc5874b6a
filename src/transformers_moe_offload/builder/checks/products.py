"""Products with matrices as they are stored, in float32.

A matrix is widened a few rows at a time, so that these are still in the processor's cache when they are multiplied.
Widening a whole matrix moves many times as many bytes through memory, into pages that were never touched before.
"""

# T tokens, I inputs of a linear layer, O outputs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_ROWS_BYTES = 4 * 2**20
"""Bytes in float32 of the rows that are widened at once. A matrix of 2048 times 5632 in bfloat16 and 12 tokens take 5.1
ms with this, 8.0 with 512 KiB, 6.6 with 16 MiB, and 27 when it is widened as a whole (one core of an EPYC, 2026-11)."""


class WidenedProducts(TorchFunctionMode):
    """In this block, linear layers take weights of any dtype, and compute as if these were float32."""

    def __init__(self) -> None:
        super().__init__()
        self._room = torch.empty(_ROWS_BYTES // 4)

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch instead of each of its functions."""
        if func is functional.linear and not kwargs and args[0].dtype != args[1].dtype:
            answer = product(args[0], args[1], self._room)
            return answer if len(args) < 3 or args[2] is None else answer + args[2].float()
        return func(*args, **(kwargs or {}))


def product(states: Tensor, matrix: Tensor, room: Tensor) -> Tensor:
    """What `linear(states, matrix.float())` gives, up to rounding: (..., I) float32, (O, I) -> (..., O) float32.

    `room` is float32 of any size, for the rows that are widened.
    """
    num_outputs, num_inputs = matrix.shape
    step = max(1, room.numel() // num_inputs)
    if num_inputs > room.numel():
        room = torch.empty(num_inputs)
    answer = states.new_empty(*states.shape[:-1], num_outputs)
    for start in range(0, num_outputs, step):
        rows = matrix[start : start + step]
        wide = room[: rows.numel()].view(rows.shape).copy_(rows)
        answer[..., start : start + step] = functional.linear(states, wide)
    return answer
