"""Additions to frozen experts in training or with adapters: low-rank factors, and experts with weights of their own.

Values of one forward; `hf` keeps the tensors and their names.
"""

# N rows of one expert, R rank; in and out are those of the product, whatever way round the weight is stored

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class LowRank:
    """An addition of low rank to one field of every expert of a layer (LoRA, arXiv 2106.09685, section 4.1)."""

    down: Sequence[Tensor] | Tensor
    """By expert, (R, in)."""
    up: Sequence[Tensor] | Tensor
    """By expert, (out, R)."""
    scaling: float
    is_transposed: bool = False
    """Whether the field is stored (in, out) instead of (out, in)."""

    def product(self, expert: int, rows: Tensor) -> Tensor:
        """rows (N, in) -> what is added to their product with the expert's weight, (N, out), in the factors' dtype."""
        down, up = self.down[expert], self.up[expert]
        return functional.linear(functional.linear(rows.to(down.dtype), down), up) * self.scaling

    def added_to(self, expert: int, weight: Tensor) -> Tensor:
        """The expert's weight with the addition in it, in the weight's shape and dtype.

        As PEFT 0.21 does it for one adapter (`_LoraFactorsProxy` in `tuners/lora/layer.py`), but for one expert.
        """
        left, right = self.up[expert], self.down[expert]
        if self.is_transposed:
            left, right = right.t(), left.t()
        left, right = left.to(weight.dtype), right.to(weight.dtype)
        return torch.baddbmm(weight[None], left[None], right[None], alpha=self.scaling)[0]


@dataclass(frozen=True)
class Adaptation:
    """All that is added to one layer's experts."""

    low_rank: Mapping[str, Sequence[LowRank]] = field(default_factory=dict)
    """By field of the experts."""
    own: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    """Experts whose weights are here instead of where the others are, each with its fields."""

    def __bool__(self) -> bool:
        return bool(self.low_rank or self.own)

    def _trainable(self) -> Iterator[Tensor]:
        """The tensors that may have a gradient; the factors of the first expert stand for those of all."""
        for additions in self.low_rank.values():
            for one in additions:
                yield from (one.down[0], one.up[0])
        for fields in self.own.values():
            yield from fields.values()

    def needs_gradient(self) -> bool:
        """Whether something here is being trained."""
        return any(tensor.requires_grad for tensor in self._trainable())

    def weight(self, expert: int, name: str, weight: Tensor) -> Tensor:
        """A field of an expert, with the additions to it."""
        for one in self.low_rank.get(name, ()):
            weight = one.added_to(expert, weight)
        return weight


NOTHING = Adaptation()
