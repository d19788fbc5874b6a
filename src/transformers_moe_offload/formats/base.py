"""The interface of every codec: a form in which experts are stored that differs from the form they are used in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.kernels.packed import PackedMatrix


class Codec(Protocol):
    """How experts of a sparse layer are stored: the arrays of a record, and what they stand for."""

    @property
    def stored(self) -> tuple[FieldSpec, ...]:
        """All arrays of an expert, in the order in which they are stored."""

    def decode(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The fields of an expert from the arrays of `stored`, in their shapes and the dtype they are loaded in. The
        results never share memory with the arrays."""

    def decode_field(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """One of the fields that `decode` returns; may share memory with the arrays."""

    @property
    def is_packed(self) -> bool:
        """Whether all matrices are in low bits that the kernels can multiply with."""

    def matrices(self, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor | PackedMatrix]:
        """The operands to compute with: packed matrices where there are kernels for them, decoded fields elsewhere."""

    def cast(self, dtype: str) -> Codec:
        """This codec for a model in another dtype: the stored arrays stay, and are decoded to `dtype`."""
