"""Where the experts of a model are and how they can be used: the facts from which `plan.py` sizes the caches."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

from transformers_moe_offload.compute.alignment import gives_equal_bits
from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.formats.by_expert import LayerCodecs
from transformers_moe_offload.hf.model.plan import Placement
from transformers_moe_offload.hf.model.planning import expect_enough
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.store.expert_store import ExpertStore
from transformers_moe_offload.store.layer_source import LayerSource


def placements(
    layers: Sequence[SparseLayer],
    sources: Mapping[int, LayerSource],
    config: OffloadConfig,
    on_the_host: Container[str] = (),
) -> list[Placement]:
    """One placement for each layer; `on_the_host`: module paths of layers that cannot decode on the device."""
    store = ExpertStore(list(sources.values()))
    return [
        Placement(
            sources[layer.index].spec,
            layer.device,
            codecs=sources[layer.index].codecs,
            is_mappable=config.mmap is not False and store.can_be_mapped() and is_as_used,
            is_in_ram=sources[layer.index].is_in_ram,
            is_addressed=layer.name not in on_the_host,
            spare_bytes=store.spare_bytes(layer.index) if is_as_used else None,
        )
        for layer in layers
        for is_as_used in [_is_as_used(layer, sources[layer.index], store)]
    ]


def expect_enough_for(
    layers: Sequence[SparseLayer],
    sources: Mapping[int, LayerSource],
    config: OffloadConfig,
    coded: Mapping[int, LayerCodecs],
) -> None:
    """Raise `CapacityError` if the budget is too small, before anything is built or encoded.

    `coded` are the codecs of layers whose experts will be in RAM.
    """
    found = [
        replace(one, codecs=coded[layer], is_in_ram=True, is_mappable=one.device.type == "cpu", spare_bytes=None)
        if (layer := one.spec.layer) in coded
        else one
        for one in placements(layers, sources, config)
    ]
    expect_enough(found, config)


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
