"""Which expert of a sparse layer is stored how: all alike, but for those that are hot."""

from __future__ import annotations

from dataclasses import dataclass

from transformers_moe_offload.formats.base import Coding


@dataclass(frozen=True)
class LayerCodings:
    """How each expert of one sparse layer is stored."""

    usual: Coding | None = None
    """How all experts are that are not hot; None where they are stored as they are used."""
    hot: Coding | None = None
    hot_experts: frozenset[int] = frozenset()

    def of(self, expert: int) -> Coding | None:
        """How an expert is stored."""
        return self.hot if expert in self.hot_experts else self.usual

    @property
    def kinds(self) -> tuple[Coding | None, ...]:
        """The ways in which experts of the layer are stored."""
        return (self.usual, self.hot) if self.hot_experts else (self.usual,)

    def cast(self, dtype: str) -> LayerCodings:
        """The same for a model in another dtype: what is coded stays, and is decoded to that."""
        usual, hot = (None if coding is None else coding.cast(dtype) for coding in (self.usual, self.hot))
        return LayerCodings(usual, hot, self.hot_experts)


AS_USED = LayerCodings()
"""All experts stored as they are used."""
