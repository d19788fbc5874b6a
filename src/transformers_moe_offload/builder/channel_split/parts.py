"""Parts of a block: how many channels each has, and parts drawn at random.

A gated block is a sum over its channels, so the parts of any partition add up to the block.
"""

# I channels, n parts

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transformers_moe_offload.errors import RecipeError

Parts = Sequence[Tensor]
"""The channels of each part in ascending order, int64; every channel is in exactly one."""


def sizes_of(num_channels: int, num_parts: int) -> list[int]:
    """Channels of each part: as equal as can be, the larger ones first."""
    if num_parts > num_channels:
        raise RecipeError(f"a block of {num_channels} channels cannot be split into {num_parts} parts")
    small, larger = divmod(num_channels, num_parts)
    return [small + (part < larger) for part in range(num_parts)]


def random_parts(num_channels: int, num_parts: int, *, seed: int) -> Parts:
    """Channels dealt out at random."""
    order = torch.randperm(num_channels, generator=torch.Generator().manual_seed(seed))
    return [part.sort().values for part in order.split(sizes_of(num_channels, num_parts))]


def parts_of(labels: Tensor, num_parts: int) -> Parts:
    """The channels of each part, given the part of each channel, (I,) int64."""
    return [(labels == part).nonzero().flatten() for part in range(num_parts)]
