"""New values of a tensor of all experts, or of one, when an expert is added, dropped or replaced."""

# E experts, H hidden size

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from transformers_moe_offload.builder.edit.anatomy import Anatomy, SparseBlock
from transformers_moe_offload.builder.edit.matrices import Copied, Donor, with_dtype
from transformers_moe_offload.builder.edit.rows import Row, row_of
from transformers_moe_offload.builder.edit.surgery import stored


def with_row(anatomy: Anatomy, row: Row, noise_scale: float, seed: int, block: SparseBlock) -> Tensor:
    """A router with one row more: (E + 1, H), in the dtype that it is stored in."""
    rows = stored(anatomy.tensors[block.router])
    return torch.cat([rows, row_of(row, anatomy, block, noise_scale, seed)[None].to(rows.dtype)])


def grown(anatomy: Anatomy, donor: Donor, block: SparseBlock, name: str) -> Tensor:
    """A tensor of all experts with the new one's part: the others' mean, where a dense model has no such tensor."""
    old, axis = stored(anatomy.tensors[name]), block.stacked[name]
    is_matrix = len(old.shape) > 2 or isinstance(donor, Copied)
    new = donor.part(block, name) if is_matrix else old.float().mean(axis)
    return torch.cat([old, new.to(old.dtype).unsqueeze(axis)], axis)


def without(anatomy: Anatomy, name: str, axis: int, number: int) -> Tensor:
    """A tensor of all experts without one of them."""
    tensor = stored(anatomy.tensors[name])
    kept = [position for position in range(tensor.shape[axis]) if position != number]
    return tensor.index_select(axis, torch.tensor(kept))


def exchanged(anatomy: Anatomy, name: str, axis: int, number: int, value: Callable[[], Tensor]) -> Tensor:
    """A tensor of all experts in which one has another value."""
    tensor = stored(anatomy.tensors[name]).clone()
    tensor.select(axis, number).copy_(value())
    return tensor


def alike(read: Callable[[SparseBlock, str], Tensor], block: SparseBlock, place: str, dtype: str) -> Tensor:
    """A tensor of one expert, cast to a dtype."""
    return with_dtype(read(block, place), dtype)


def cast(read: Callable[[], Tensor], dtype: str) -> Tensor:
    """A tensor that is computed without arguments, cast to a dtype."""
    return with_dtype(read(), dtype)
