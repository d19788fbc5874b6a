"""The disk tier: every expert of a model, read in place from the checkpoint's safetensors files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from transformers_moe_offload.expert import ExpertId, ExpertSpec, FieldSpec
from transformers_moe_offload.formats.by_expert import AS_USED, LayerCodings
from transformers_moe_offload.memory.expert_source import ExpertSource
from transformers_moe_offload.memory.field_source import FieldSource, Stretch
from transformers_moe_offload.memory.ram_file import RamFile
from transformers_moe_offload.memory.record import RecordLayout, host_bytes

Weights = dict[str, Tensor]
"""One expert's tensors by field name."""


@dataclass(frozen=True)
class LayerSource:
    """Where the experts of one sparse layer come from, and what they are made of."""

    spec: ExpertSpec
    """What the layer's module computes with."""
    experts: tuple[ExpertSource, ...]
    spare: Mapping[str, tuple[FieldSource, ...]] = field(default_factory=dict)
    """By field, what the checkpoint stores behind the last expert and no expert uses: only of interest to whoever
    writes the checkpoint again."""
    codings: LayerCodings = AS_USED
    """How records stand for the fields of `spec`, expert by expert."""

    @property
    def is_in_ram(self) -> bool:
        """Whether experts are in memory of ours, not in files."""
        return any(isinstance(piece.file, RamFile) for expert in self.experts for piece in expert.pieces)

    def stored(self, expert: int) -> tuple[FieldSpec, ...]:
        """What an expert's record is made of."""
        coding = self.codings.of(expert)
        return self.spec.fields if coding is None else coding.stored

    def cast(self, dtype: str) -> LayerSource:
        """The same layer with every field cast to another dtype; a coded one is decoded to it."""
        spec = replace(self.spec, fields=tuple(f.cast(dtype) for f in self.spec.fields))
        experts = tuple(
            one if self.codings.of(expert) is not None else one.then_cast(dtype)
            for expert, one in enumerate(self.experts)
        )
        spare = {name: tuple(s.then_cast(dtype) for s in sources) for name, sources in self.spare.items()}
        return LayerSource(spec, experts, spare, self.codings.cast(dtype))

    def read(self, expert: int) -> Weights:
        """One expert as the module knows it, in memory of its own."""
        record = self.read_record(expert)
        weights, coding = RecordLayout(self.stored(expert)).views(record), self.codings.of(expert)
        return weights if coding is None else coding.decode(weights)

    def read_record(self, expert: int) -> Tensor:
        """One expert as it is stored, uint8 (nbytes,), its checksum compared."""
        layout = RecordLayout(self.stored(expert))
        record = torch.zeros(layout.nbytes, dtype=torch.uint8)
        self.experts[expert].read_into(record, layout)
        self.experts[expert].check(host_bytes(record))
        return record

    def __deepcopy__(self, memo: dict[int, object]) -> LayerSource:
        return self


class ExpertStore:
    """Reads any expert of a model into a record. Read-only and safe to use from several threads."""

    def __init__(self, layers: Sequence[LayerSource], *, past_cache: bool = False) -> None:
        """`past_cache` reads verbatim fields past the page cache, where that can be done."""
        self.past_cache = past_cache
        self.layers = {source.spec.layer: source for source in layers}
        self._layouts = {layer: _layouts(source) for layer, source in self.layers.items()}
        self._checked: set[ExpertId] = set()

    def layout(self, layer: int, expert: int) -> RecordLayout:
        """The record layout of one expert; those of experts that are stored alike are the same."""
        return self._layouts[layer][expert]

    def stored_bytes(self, expert: ExpertId) -> int:
        """Bytes read from files for this expert."""
        return sum(piece.nbytes for piece in self._source(expert).pieces)

    def is_mappable(self, layer: int) -> bool:
        """Whether the layer's experts can be used where they lie in the files.

        A few may not: of the expert at the end of a file, one part lies in the next one.
        """
        experts = range(len(self.layers[layer].experts))
        return 2 * sum(self.stretches(ExpertId(layer, expert)) is not None for expert in experts) > len(experts)

    def stretches(self, expert: ExpertId) -> tuple[Stretch, ...] | None:
        """Where each field of an expert lies in one piece; None if one of them does not."""
        return self._source(expert).stretches(self.layout(*expert))

    def read_into(self, expert: ExpertId, record: Tensor) -> int:
        """Fill a record, (nbytes,) uint8 in host memory, and return the bytes read.

        Raises `CheckpointError` and leaves the record half filled if a file is not what it was.
        """
        layout = self.layout(*expert)
        self._source(expert).read_into(record[: layout.nbytes], layout, past_cache=self.past_cache)
        self.check(expert, record[: layout.nbytes])
        return self.stored_bytes(expert)

    def check(self, expert: ExpertId, record: Tensor) -> None:
        """Compare an expert's checksum, if there is one, the first time it is brought in: record (nbytes,) uint8."""
        if expert not in self._checked:
            self._source(expert).check(host_bytes(record))
            self._checked.add(expert)

    def _source(self, expert: ExpertId) -> ExpertSource:
        return self.layers[expert.layer].experts[expert.expert]

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertStore:
        return self


def _layouts(source: LayerSource) -> tuple[RecordLayout, ...]:
    """By expert; one for each way in which experts of the layer are stored."""
    codings = source.codings
    of_kind = {id(kind): RecordLayout(source.spec.fields if kind is None else kind.stored) for kind in codings.kinds}
    return tuple(of_kind[id(codings.of(expert))] for expert in range(len(source.experts)))
