"""How each expert of a sparse layer is stored: hot experts in one way, all others in another."""

from __future__ import annotations

from dataclasses import dataclass

from transformers_moe_offload.formats.base import Codec


@dataclass(frozen=True)
class LayerCodecs:
    """How each expert of one sparse layer is stored."""

    usual: Codec | None = None
    """How all experts that are not hot are stored; None where they are stored as they are used."""
    hot: Codec | None = None
    hot_experts: frozenset[int] = frozenset()

    def of(self, expert: int) -> Codec | None:
        """How an expert is stored."""
        return self.hot if expert in self.hot_experts else self.usual

    @property
    def kinds(self) -> tuple[Codec | None, ...]:
        """The distinct codecs of the layer: one, or two if some experts are hot."""
        return (self.usual, self.hot) if self.hot_experts else (self.usual,)

    def cast(self, dtype: str) -> LayerCodecs:
        """These codecs for a model in another dtype: the stored arrays stay, and are decoded to `dtype`."""
        usual, hot = (None if codec is None else codec.cast(dtype) for codec in (self.usual, self.hot))
        return LayerCodecs(usual, hot, self.hot_experts)


AS_USED = LayerCodecs()
"""All experts stored as they are used."""
