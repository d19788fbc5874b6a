"""New values of a tensor of all experts, or of one, when an expert is added, dropped or replaced."""

# E experts, H hidden size

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from transformers_moe_offload.builder.edit.donors import Copied, Donor, with_dtype
from transformers_moe_offload.builder.edit.expert_tensors import SparseBlock, SparseCheckpoint
from transformers_moe_offload.builder.edit.rewrite_files import stored
from transformers_moe_offload.builder.edit.rows import Row, row_of


def with_row(checkpoint: SparseCheckpoint, row: Row, noise_scale: float, seed: int, block: SparseBlock) -> Tensor:
    """A router with one row more: (E + 1, H), in the dtype that it is stored in."""
    rows = stored(checkpoint.tensors[block.router])
    return torch.cat([rows, row_of(row, checkpoint, block, noise_scale, seed)[None].to(rows.dtype)])


def grown(checkpoint: SparseCheckpoint, donor: Donor, block: SparseBlock, name: str) -> Tensor:
    """A tensor of all experts with the new one's part: the others' mean, where a dense model has no such tensor."""
    old, axis = stored(checkpoint.tensors[name]), block.stacked[name]
    is_matrix = len(old.shape) > 2 or isinstance(donor, Copied)
    new = donor.part(block, name) if is_matrix else old.float().mean(axis)
    return torch.cat([old, new.to(old.dtype).unsqueeze(axis)], axis)


def without(checkpoint: SparseCheckpoint, name: str, axis: int, number: int) -> Tensor:
    """A tensor of all experts without one of them."""
    tensor = stored(checkpoint.tensors[name])
    kept = [position for position in range(tensor.shape[axis]) if position != number]
    return tensor.index_select(axis, torch.tensor(kept))


def exchanged(checkpoint: SparseCheckpoint, name: str, axis: int, number: int, value: Callable[[], Tensor]) -> Tensor:
    """A tensor of all experts in which one has another value."""
    tensor = stored(checkpoint.tensors[name]).clone()
    tensor.select(axis, number).copy_(value())
    return tensor


def alike(read: Callable[[SparseBlock, str], Tensor], block: SparseBlock, place: str, dtype: str) -> Tensor:
    """A tensor of one expert, cast to a dtype."""
    return with_dtype(read(block, place), dtype)


def cast(read: Callable[[], Tensor], dtype: str) -> Tensor:
    """A tensor that is computed without arguments, cast to a dtype."""
    return with_dtype(read(), dtype)
