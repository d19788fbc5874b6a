"""Where the experts of one sparse layer come from, and what they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from transformers_moe_offload.expert import ExpertSpec, FieldSpec
from transformers_moe_offload.formats.base import AS_USED, LayerCodecs
from transformers_moe_offload.store.expert_source import ExpertSource, RecordedExpert
from transformers_moe_offload.store.field_source import FieldSource
from transformers_moe_offload.store.ram_file import RamFile
from transformers_moe_offload.store.record import RecordLayout
from transformers_moe_offload.system.host_memory import host_bytes

Weights = dict[str, Tensor]
"""One expert's tensors by field name."""


@dataclass(frozen=True)
class LayerSource:
    """Where the experts of one sparse layer come from, and what they are made of."""

    spec: ExpertSpec
    """What the layer's module computes with."""
    experts: tuple[ExpertSource, ...]
    spare: Mapping[str, tuple[FieldSource, ...]] = field(default_factory=dict)
    """By field, the parts that the checkpoint stores behind the last expert and that no expert uses; needed only to
    write the checkpoint again."""
    codecs: LayerCodecs = AS_USED
    """How records stand for the fields of `spec`, expert by expert."""

    @property
    def is_in_ram(self) -> bool:
        """Whether experts are in a `RamFile`, not in the checkpoint's files."""
        return any(isinstance(piece.file, RamFile) for expert in self.experts for piece in expert.pieces)

    @property
    def is_recorded(self) -> bool:
        """Whether experts were written as records, to be used as they are."""
        return all(isinstance(expert, RecordedExpert) for expert in self.experts)

    def stored(self, expert: int) -> tuple[FieldSpec, ...]:
        """What an expert's record is made of."""
        codec = self.codecs.of(expert)
        return self.spec.fields if codec is None else codec.stored

    def cast(self, dtype: str) -> LayerSource:
        """The same layer with every field cast to another dtype; a coded one is decoded to it."""
        spec = replace(self.spec, fields=tuple(f.cast(dtype) for f in self.spec.fields))
        experts = tuple(
            one if self.codecs.of(expert) is not None else one.then_cast(dtype)
            for expert, one in enumerate(self.experts)
        )
        spare = {name: tuple(s.then_cast(dtype) for s in sources) for name, sources in self.spare.items()}
        return LayerSource(spec, experts, spare, self.codecs.cast(dtype))

    def read(self, expert: int) -> Weights:
        """One expert as the module knows it, in memory of its own."""
        record = self.read_record(expert)
        weights, codec = RecordLayout(self.stored(expert)).views(record), self.codecs.of(expert)
        return weights if codec is None else codec.decode(weights)

    def read_record(self, expert: int) -> Tensor:
        """One expert as it is stored, uint8 (nbytes,), its checksum compared."""
        layout = RecordLayout(self.stored(expert))
        record = torch.zeros(layout.nbytes, dtype=torch.uint8)
        raw = host_bytes(record)
        for piece in self.experts[expert].reads(layout):
            piece.read_into([raw[start:stop] for start, stop in piece.segments])
        self.experts[expert].check(raw)
        return record

    def __deepcopy__(self, memo: dict[int, object]) -> LayerSource:
        return self
