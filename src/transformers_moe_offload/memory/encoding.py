"""Turn experts as a checkpoint has them into coded records, one at a time: nothing larger is ever held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from transformers_moe_offload.formats.coding import LayerCoding
from transformers_moe_offload.memory.checkpoint import LayerSource
from transformers_moe_offload.memory.expert_source import recorded_experts
from transformers_moe_offload.memory.ram_file import RamFile
from transformers_moe_offload.memory.record import RecordLayout, host_bytes
from transformers_moe_offload.memory.safetensors_index import StoredTensor


def encoded_row(source: LayerSource, coding: LayerCoding, expert: int) -> Tensor:
    """One expert's record and zeros up to the next row, uint8 (row bytes,).

    Raises `CheckpointError` for weights that the format cannot represent, with the expert's name.
    """
    layout = RecordLayout(coding.stored)
    row = torch.zeros(layout.row_bytes, dtype=torch.uint8)
    views = layout.views(row)
    for name, part in coding.encode(source.read(expert), f"expert {expert} of {source.spec.name}").items():
        views[name].copy_(part)
    return row


def encoded_in_ram(source: LayerSource, coding: LayerCoding, workers: int, done: Callable[[], None]) -> LayerSource:
    """The same layer, its experts coded, in RAM; `done` is called after each expert."""
    num_experts, nbytes = len(source.experts), RecordLayout(coding.stored).row_bytes
    file = RamFile(source.spec.name, num_experts * nbytes)

    def encode(expert: int) -> None:
        file.write(host_bytes(encoded_row(source, coding, expert)), expert * nbytes)
        done()

    with ThreadPoolExecutor(workers, thread_name_prefix="moe-offload-quantize") as pool:
        for _ in pool.map(encode, range(num_experts)):
            pass
    stack = StoredTensor(source.spec.name, file, 0, "uint8", (num_experts, nbytes))
    return replace(source, experts=recorded_experts(stack), coding=coding)


def encoded_bytes(sources: Sequence[tuple[LayerSource, LayerCoding]]) -> int:
    """Bytes of all rows."""
    return sum(len(source.experts) * RecordLayout(coding.stored).row_bytes for source, coding in sources)
