"""Turn experts as a checkpoint has them into coded records, one at a time: nothing larger is ever held."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from transformers_moe_offload.formats.base import Codec, LayerCodecs
from transformers_moe_offload.formats.codec import ExpertCodec
from transformers_moe_offload.store.layer_source import LayerSource, RecordedExpert
from transformers_moe_offload.store.ram_file import RamFile
from transformers_moe_offload.store.record import RecordLayout
from transformers_moe_offload.system.host_memory import host_bytes
from transformers_moe_offload.tensor_files.index import StoredTensor


def encoded_row(source: LayerSource, codecs: LayerCodecs, expert: int) -> Tensor:
    """One expert's record and zeros up to the next row, uint8 (row bytes,).

    Raises `CheckpointError` for weights that the format cannot represent, with the expert's name.
    """
    return row_of(source.read(expert), codecs.of(expert), f"expert {expert} of {source.spec.name}")


def row_of(weights: Mapping[str, Tensor], codec: Codec | None, name: str) -> Tensor:
    """The same for weights that are in memory; errors call them `name`."""
    assert isinstance(codec, ExpertCodec)
    layout = RecordLayout(codec.stored)
    row = torch.zeros(layout.row_bytes, dtype=torch.uint8)
    views = layout.views(row)
    for part_name, part in codec.encode(weights, name).items():
        views[part_name].copy_(part)
    return row


def encoded_in_ram(source: LayerSource, codecs: LayerCodecs, workers: int, done: Callable[[], object]) -> LayerSource:
    """The same layer with its experts coded, in RAM; those that have no format stay where they are.

    `done` is called after each expert that is coded.
    """
    rows = row_sizes(codecs, len(source.experts))
    if not rows:
        return source
    file = RamFile(source.spec.name, sum(rows.values()))
    starts = dict(zip(rows, accumulate(rows.values(), initial=0), strict=False))

    def encode(expert: int) -> None:
        file.write(host_bytes(encoded_row(source, codecs, expert)), starts[expert])
        done()

    with ThreadPoolExecutor(workers, thread_name_prefix="moe-offload-quantize") as pool:
        for _ in pool.map(encode, rows):
            pass
    coded = {
        expert: RecordedExpert(StoredTensor(source.spec.name, file, starts[expert], "uint8", (nbytes,)))
        for expert, nbytes in rows.items()
    }
    experts = tuple(coded.get(expert, left) for expert, left in enumerate(source.experts))
    as_it_was = source.codecs.usual
    usual, hot = (codec if _has_format(codec) else as_it_was for codec in (codecs.usual, codecs.hot))
    return replace(source, experts=experts, codecs=LayerCodecs(usual, hot, codecs.hot_experts))


def row_sizes(codecs: LayerCodecs, num_experts: int) -> dict[int, int]:
    """The experts that have a format, and the bytes of the row that `encoded_in_ram` makes of each."""
    sizes = {
        id(kind): RecordLayout(kind.stored).row_bytes for kind in codecs.kinds if kind is not None and _has_format(kind)
    }
    kinds = {expert: id(codecs.of(expert)) for expert in range(num_experts)}
    return {expert: sizes[kind] for expert, kind in kinds.items() if kind in sizes}


def _has_format(codec: Codec | None) -> bool:
    return isinstance(codec, ExpertCodec) and codec.format is not None
