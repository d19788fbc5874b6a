"""What every codec has, a form in which experts are stored that differs from the form they are used in.

Hot experts of a sparse layer may have one codec, and all others another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.kernels.packed import PackedMatrix


class _FieldCodec(Protocol):
    """How one field of an expert is stored: in the arrays `parts`, from which `decode` makes it."""

    @property
    def field(self) -> FieldSpec: ...

    @property
    def parts(self) -> tuple[FieldSpec, ...]: ...

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor: ...


class Codec(ABC):
    """How experts of a sparse layer are stored: the arrays of a record, and what they stand for."""

    @property
    @abstractmethod
    def codecs(self) -> Sequence[_FieldCodec]:
        """How each field is stored, in the order of the fields."""

    @cached_property
    def stored(self) -> tuple[FieldSpec, ...]:
        """All arrays of an expert, in the order in which they are stored."""
        return tuple(part for codec in self.codecs for part in codec.parts)

    def decode(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The fields of an expert from the arrays of `stored`, in their shapes and the dtype they are loaded in. The
        results never share memory with the arrays."""
        fields = {codec.field.name: codec.decode(parts) for codec in self.codecs}
        return {
            name: field.clone() if any(field is part for part in parts.values()) else field
            for name, field in fields.items()
        }

    def decode_field(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """One of the fields that `decode` returns; may share memory with the arrays."""
        return next(codec for codec in self.codecs if codec.field.name == name).decode(parts)

    @property
    def is_packed(self) -> bool:
        """Whether all matrices are in low bits that the kernels can multiply with."""
        return False

    def matrices(self, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor | PackedMatrix]:
        """The operands to compute with: packed matrices where there are kernels for them, without a copy, and decoded
        fields elsewhere."""
        return {codec.field.name: codec.decode(parts) for codec in self.codecs}

    @abstractmethod
    def cast(self, dtype: str) -> Codec:
        """This codec for a model in another dtype: the stored arrays stay, and are decoded to `dtype`."""


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
