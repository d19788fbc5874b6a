"""Feed-forward blocks as experts: the channels of some models that make up an expert, and its matrices.

A gated block is a sum over its channels, y = sum_i down_i * act(gate_i . x) * (up_i . x). So blocks are added by
putting their channels side by side, multiplied by scaling `down`, taken apart by choosing channels, and widened by
channels of zeros, all of it exactly. An expert is fully described by where its channels come from.
"""

# H hidden size, I width of a block

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transformers_moe_offload.builder.recipe import Expert
from transformers_moe_offload.builder.sources import Source
from transformers_moe_offload.tensor_files.index import StoredTensor

Channels = Callable[[int], Sequence[Tensor]]
"""Layer -> the channels of each part of its block, int64."""


@dataclass(frozen=True)
class Part:
    """Channels that one model contributes to an expert."""

    source: int = 0
    """Which of the plan's sources; 0 is the base model."""
    scale: float = 1.0
    """Factor on the channels' contribution."""
    delta_scale: float = 1.0
    """Interpolates between the base model's weights (0) and the source's (1)."""
    noise_scale: float = 0.0
    reinitialize: float = 0.0
    """Share of the channels that is drawn anew."""
    seed: str = ""
    """Seed of what is drawn; parts that should differ have different seeds."""
    index: int = 0
    count: int = 1
    """The channels are part `index` of `count` of the source's block."""

    @classmethod
    def of(cls, expert: Expert, source: int, seed: str) -> Part:
        """The whole block of a source, changed as a recipe's expert says."""
        return cls(source, expert.residual_scale, expert.delta_scale, expert.noise_scale, seed=seed)


@dataclass(frozen=True)
class Block:
    """An expert: some parts, side by side."""

    parts: tuple[Part, ...]


class Blocks:
    """The matrices of experts, read from sources when they are asked for."""

    def __init__(
        self, sources: Sequence[Source], names: Callable[[int], dict[str, str]], channels: Channels | None = None
    ) -> None:
        """`names` gives the tensors of a layer's block by role; without `channels`, parts are equal ranges."""
        self._sources = sources
        self._names = names
        self._channels = channels

    def width(self, source: int, layer: int) -> int:
        """Channels of a source's block."""
        return self._sources[source].tensors[self._names(layer)["gate"]].shape[0]

    def matrix(self, block: Block, layer: int, role: str, width: int | None = None) -> Tensor:
        """One matrix of an expert, padded to a width: (I, H), or (H, I) for `down`; of a dtype that loses nothing."""
        parts = [self._part(part, layer, role) for part in block.parts]
        dimension = 1 if role == "down" else 0
        missing = 0 if width is None else width - sum(part.shape[dimension] for part in parts)
        assert missing >= 0, f"layer {layer}: {-missing} channels more than a width of {width}"
        if missing:
            shape = list(parts[0].shape)
            shape[dimension] = missing
            parts.append(parts[0].new_zeros(shape))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dimension)  # in the widest dtype

    def stored(self, block: Block, layer: int, role: str) -> StoredTensor | None:
        """The stored tensor that equals what `matrix` returns; None if that is computed."""
        part, *others = block.parts
        if others or replace(part, source=0, seed="") != Part():
            return None
        return self._sources[part.source].stored(self._names(layer)[role])

    def _part(self, part: Part, layer: int, role: str) -> Tensor:
        name = self._names(layer)[role]
        tensor = self._sources[part.source].read(name)
        if part.delta_scale != 1 and part.source != 0:
            base = self._sources[0].read(name).float()
            tensor = torch.lerp(base, tensor.float(), part.delta_scale)
        if part.count > 1:
            tensor = tensor.index_select(1 if role == "down" else 0, self._chosen(part, layer))
        if part.reinitialize:
            tensor = _reinitialized(tensor, part, layer, role)
        if part.noise_scale:
            noise = torch.randn(tensor.shape, generator=generator_for(part.seed, "noise", layer, role))
            tensor = torch.add(tensor.float(), noise, alpha=part.noise_scale)
        if part.scale != 1 and role == "down":
            tensor = tensor.float() * part.scale
        return tensor

    def _chosen(self, part: Part, layer: int) -> Tensor:
        if self._channels is not None:
            return self._channels(layer)[part.index]
        return torch.arange(self.width(part.source, layer)).tensor_split(part.count)[part.index]


def _reinitialized(tensor: Tensor, part: Part, layer: int, role: str) -> Tensor:
    """Some channels drawn anew from a normal distribution with their own mean and deviation (arXiv 2502.19261).

    The same channels in all three matrices: (I, H) or (H, I) -> the same shape.
    """
    dimension = 1 if role == "down" else 0
    width = tensor.shape[dimension]
    count = round(part.reinitialize * width)
    if not count:
        return tensor
    drawn = torch.randperm(width, generator=generator_for(part.seed, "channels", layer, ""))[:count]
    tensor = tensor.float().clone()
    old = tensor.index_select(dimension, drawn)
    new = torch.randn(old.shape, generator=generator_for(part.seed, "values", layer, role)) * old.std() + old.mean()
    return tensor.index_copy_(dimension, drawn, new)


def generator_for(*what: object) -> torch.Generator:
    """Random numbers for one purpose, which its seed and its names tell apart; independent of any drawn before."""
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
