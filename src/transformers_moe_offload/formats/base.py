"""What everything that stores experts in another form than they are used in has to answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.kernels.packed import PackedMatrix


class Coding(Protocol):
    """How experts of a sparse layer are stored: the arrays of a record, and what they stand for."""

    @property
    def stored(self) -> tuple[FieldSpec, ...]:
        """All arrays of an expert, in the order in which they are stored."""

    def decode(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The fields of an expert from the arrays of `stored`, in their shapes and the dtype they are loaded in, all in
        memory of their own."""

    def decode_field(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """One of these fields."""

    @property
    def is_packed(self) -> bool:
        """Whether all matrices are in low bits that there is arithmetic for."""

    def matrices(self, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor | PackedMatrix]:
        """What to compute with: matrices in low bits where there is arithmetic for them, decoded fields elsewhere."""

    def cast(self, dtype: str) -> Coding:
        """The same for a model in another dtype: what is stored stays, and is decoded to that."""
