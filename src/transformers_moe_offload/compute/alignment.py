"""Check that CPU kernels give the same bits wherever in memory a weight begins.

A tensor in a slot begins at a cache line. One that is used where it lies in a checkpoint begins where the file has
it, at a multiple of 8 bytes as a rule. Kernels may take another path then, with another order of summation; libraries
leave that open (see "conditional numerical reproducibility" in Intel's guide to MKL). So it is tested.
"""

# N rows, O out, I in

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from transformers_moe_offload import kernels
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.store.record import ALIGNMENT

_ROWS = (1, 2, 17)
_MOST_OUTPUTS = 256
"""Outputs are summed independently of each other, so some of them stand for all."""


@cache
def gives_equal_bits(shape: tuple[int, ...], dtype: str) -> bool:
    """Whether products with a matrix (O, I) or (I, O) have the same bits at every alignment that a file can give it."""
    if len(shape) != 2 or not torch_dtype(dtype).is_floating_point:
        return len(shape) < 2
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(min(shape[0], _MOST_OUTPUTS), shape[1], generator=random).to(torch_dtype(dtype))
    transposed = torch.randn(shape[0], min(shape[1], _MOST_OUTPUTS), generator=random).to(torch_dtype(dtype))
    rows = torch.randn(max(_ROWS), max(shape), generator=random).to(torch_dtype(dtype))
    step = torch_dtype(dtype).itemsize
    with torch.no_grad():
        expected = _products(_placed(weight, 0), _placed(transposed, 0), rows)
        for offset in {step, 8, 16, 32}:
            products = _products(_placed(weight, offset), _placed(transposed, offset), rows)
            if not all(torch.equal(one, other) for one, other in zip(products, expected, strict=True)):
                return False
    return True


def _products(weight: Tensor, transposed: Tensor, rows: Tensor) -> list[Tensor]:
    """Every product that our own forward or an eager one takes of a weight and N rows."""
    found = [torch.mv(weight, rows[0, : weight.shape[1]]), torch.mv(transposed.t(), rows[0, : transposed.shape[0]])]
    for count in _ROWS:
        found.append(functional.linear(rows[:count, : weight.shape[1]], weight))
        found.append(kernels.dense.linear(rows[:count, : weight.shape[1]], weight))
        found.append(rows[:count, : transposed.shape[0]] @ transposed)
    return found


def _placed(tensor: Tensor, offset: int) -> Tensor:
    """A copy that begins so many bytes behind a multiple of the alignment."""
    raw = torch.empty(tensor.nbytes + 2 * ALIGNMENT, dtype=torch.uint8)
    start = -raw.data_ptr() % ALIGNMENT + offset
    placed = raw[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return placed.copy_(tensor)
