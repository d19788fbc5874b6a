"""Where the experts of a model are and how they can be used: the facts from which `planning.py` sizes the caches."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch

from transformers_moe_offload.compute.alignment import gives_equal_bits
from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.expert import ExpertSpec
from transformers_moe_offload.formats.base import AS_USED, LayerCodecs
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.layer_source import LayerSource
from transformers_moe_offload.store.record import RecordLayout


@dataclass(frozen=True)
class Placement:
    """One sparse layer and the device it computes on."""

    spec: ExpertSpec
    device: torch.device
    codecs: LayerCodecs = AS_USED
    """How its experts are quantized, if they are."""
    is_mappable: bool = False
    """Whether its experts can be used in place in the mapped files of the checkpoint."""
    is_in_ram: bool = False
    """Whether its experts are in our own memory instead of files."""
    is_addressed: bool = False
    """Whether its experts should be read by address if all of them fit into page-locked memory."""
    spare_bytes: int | None = None
    """Bytes of whole pages beyond the expert in them; None if experts cannot be used inside whole pages of a file."""

    @property
    def slot_bytes(self) -> int:
        """Bytes of one expert's record, not counting hot experts, whose records may differ."""
        return self.record_bytes[0]

    @property
    def record_bytes(self) -> list[int]:
        """Bytes of an expert's record for each codec of the layer."""
        return [RecordLayout(self.spec.fields if c is None else c.stored).nbytes for c in self.codecs.kinds]


def placements_of(
    layers: Sequence[SparseLayer],
    sources: Mapping[int, LayerSource],
    config: OffloadConfig,
    obstacles: Container[str] = (),
) -> list[Placement]:
    """One placement for each layer; `obstacles` has the module paths of layers that cannot decode on the device."""
    store = ExpertStore(list(sources.values()))
    return [
        Placement(
            sources[layer.index].spec,
            layer.device,
            codecs=sources[layer.index].codecs,
            is_mappable=config.mmap is not False and store.can_be_mapped and is_as_used,
            is_in_ram=sources[layer.index].is_in_ram,
            is_addressed=layer.name not in obstacles,
            spare_bytes=store.spare_bytes(layer.index) if is_as_used else None,
        )
        for layer in layers
        for is_as_used in [_is_as_used(layer, sources[layer.index], store)]
    ]


def _is_as_used(layer: SparseLayer, source: LayerSource, store: ExpertStore) -> bool:
    """Whether a CPU can use a layer's experts in place in the files, with the same bits in results as from records."""
    if layer.device.type != "cpu" or not store.is_as_used(layer.index):
        return False
    if source.is_recorded:  # records begin at the same alignment everywhere
        return True
    fields = set(source.spec.fields)
    kinds = [fields if kind is None else fields.intersection(kind.stored) for kind in source.codecs.kinds]
    used_in_place = set().union(*kinds)  # others are decoded first
    return all(gives_equal_bits(field.shape, field.dtype) for field in used_in_place)
