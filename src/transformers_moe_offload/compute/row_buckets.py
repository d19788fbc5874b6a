"""How many rows an expert's products are given where the processor's library has a kernel for each number of them.

Half precision on a CPU is multiplied by oneDNN, which compiles a kernel for every shape it meets, and keeps the latest
1024 of them: 0.5 MiB and some 5 ms each (torch 2.13 with oneDNN 3.12, an EPYC with bfloat16 units). Routers give every
expert another number of tokens each time, so kernels would take hundreds of MiB beside the model, and be compiled all
along. Time hardly grows with the rows, as it goes into reading the matrix: 0.6 to 0.9 ms for 12 to 256 rows and
1024 x 1024. So the number is rounded up to one of few. Prompts of some 512 tokens, each of another length, then take
0.79 s instead of 0.91 with 16 layers of 64 experts of 1024 x 512, and 430 MiB less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transformers_moe_offload.kernels.dense import FEW_ROWS, has_bfloat16_units, wants_tiles

_FEWEST, _STEPS = 16, 4
"""The smallest number above those that have kernels of their own, and how many there are from one power of two to the
next: at most a quarter of the rows is added."""


def padded(tokens: Tensor | list[int], hidden_states: Tensor) -> Tensor | list[int]:
    """The tokens whose rows an expert is to have, (N,) int64, and the first of them again, as often as is needed."""
    missing = padded_count(len(tokens), hidden_states) - len(tokens)
    if not missing:
        return tokens
    if isinstance(tokens, list):
        return tokens + tokens[:1] * missing
    return torch.cat([tokens, tokens[:1].expand(missing)])


def padded_count(count: int, hidden_states: Tensor) -> int:
    """The number of rows to compute with, where `count` are wanted of hidden states like these."""
    if count <= FEW_ROWS or not compiles_by_shape(hidden_states):
        return count
    step = max(_FEWEST, (1 << (count - 1).bit_length()) // (2 * _STEPS))
    return -(-count // step) * step


def compiles_by_shape(hidden_states: Tensor) -> bool:
    """Whether products with rows like these are oneDNN's."""
    if hidden_states.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu"):
        return True
    dtype = hidden_states.dtype
    is_half = dtype in (torch.bfloat16, torch.float16)
    return is_half and not wants_tiles(FEW_ROWS + 1, dtype, has_units=has_bfloat16_units())
