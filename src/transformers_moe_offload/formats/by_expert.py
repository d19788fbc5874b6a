"""How each expert of a sparse layer is stored: hot experts in one way, all others in another."""

from __future__ import annotations

from dataclasses import dataclass

from transformers_moe_offload.formats.base import Coding


@dataclass(frozen=True)
class LayerCodings:
    """How each expert of one sparse layer is stored."""

    usual: Coding | None = None
    """How all experts that are not hot are stored; None where they are stored as they are used."""
    hot: Coding | None = None
    hot_experts: frozenset[int] = frozenset()

    def of(self, expert: int) -> Coding | None:
        """How an expert is stored."""
        return self.hot if expert in self.hot_experts else self.usual

    @property
    def kinds(self) -> tuple[Coding | None, ...]:
        """The distinct codings of the layer: one, or two if some experts are hot."""
        return (self.usual, self.hot) if self.hot_experts else (self.usual,)

    def cast(self, dtype: str) -> LayerCodings:
        """These codings for a model in another dtype: the stored arrays stay, and are decoded to `dtype`."""
        usual, hot = (None if coding is None else coding.cast(dtype) for coding in (self.usual, self.hot))
        return LayerCodings(usual, hot, self.hot_experts)


AS_USED = LayerCodings()
"""All experts stored as they are used."""
