"""Write the tensors of a plan, shard by shard: one piece of a tensor is in memory while the next one is read.

The tensors written do not depend on the division into shards, nor on interruptions: finished shards stay, and the
others are written again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from transformers_moe_offload.builder.plan import BuildPlan
from transformers_moe_offload.builder.plan.tensors import FromBlock, PlannedTensor
from transformers_moe_offload.builder.weights.tensor_reader import TensorReader
from transformers_moe_offload.expert import ITEMSIZE
from transformers_moe_offload.output.shards import (
    MAX_SHARD_BYTES,
    Advance,
    Content,
    Shard,
    Syncing,
    expect_room,
    fill_shards,
    grouped,
    index_of,
    shard_names,
    shard_of,
    write_contents,
)
from transformers_moe_offload.tensor_files.writer import SafetensorsWriter, as_json, write_text

WeightShard = Shard[Sequence[PlannedTensor]]


def write_checkpoint(
    folder: Path, contents: Sequence[Content], done: Advance, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write these tensors, in their order, to the weight files of a checkpoint; finished files stay."""
    groups = grouped(contents, max_shard_bytes)
    shards = [shard_of(name, group) for name, group in zip(_names(len(groups)), groups, strict=True)]
    expect_room(folder, shards, "or write elsewhere")
    fill_shards(folder, shards, write_contents, done, resumes=True)
    write_index(folder, shards)


def write_index(folder: Path, shards: Sequence[Shard[Any]], *, is_wanted: bool = False) -> None:
    """Write the index that names the files' tensors, if there are several or it is wanted."""
    if is_wanted or len(shards) > 1:
        index = index_of(shards)
        index["metadata"]["total_parameters"] = sum(prod(spec.shape) for shard in shards for spec in shard.tensors)
        write_text(folder / SAFE_WEIGHTS_INDEX_NAME, as_json(index))


def _names(count: int) -> list[str]:
    return [SAFE_WEIGHTS_NAME] if count == 1 else shard_names("model", count)


def weight_shards(plan: BuildPlan, max_shard_bytes: int) -> list[WeightShard]:
    """The weight files. Each expert is in one file, its gate before its up, so that it can be mapped in place."""
    groups: list[list[PlannedTensor]] = []
    room = 0
    for _, members in groupby(plan.tensors, key=_unit):
        unit = list(members)
        nbytes = sum(tensor.spec.nbytes for tensor in unit)
        if not groups or nbytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1] += unit
        room -= nbytes
    return [_shard(name, group) for name, group in zip(_names(len(groups)), groups, strict=True)]


def write_weights(
    folder: Path, shards: Sequence[WeightShard], reader: TensorReader, done: Advance, syncing: Syncing
) -> None:
    """Write those weight files that are not there yet, and the index that names them."""
    expect_room(folder, shards, "or write elsewhere")
    with ThreadPoolExecutor(1, thread_name_prefix="moe-offload-build") as thread:

        def fill(writer: SafetensorsWriter, tensors: Sequence[PlannedTensor], done: Advance) -> None:
            found = ((tensor, values) for tensor in tensors for values in reader.values(tensor))
            for tensor, values in _ahead(thread, found):
                writer.write(tensor.spec.name, values)
                done(values.nbytes)

        fill_shards(folder, shards, fill, done, resumes=True, syncing=syncing)
    write_index(folder, shards)


def _unit(tensor: PlannedTensor) -> Any:
    """The key of tensors that stay in one file: an expert's, or one tensor that belongs to no expert."""
    piece = tensor.pieces[0]
    experts = {one.matrix.expert for one in tensor.pieces if isinstance(one, FromBlock)}
    if isinstance(piece, FromBlock) and len(experts) == 1:
        return piece.layer, piece.matrix.expert
    return tensor.spec.name


def _shard(name: str, tensors: Sequence[PlannedTensor]) -> WeightShard:
    # Wide elements first, as safetensors does: so all of them are aligned, in a file that may have no gaps.
    specs = sorted((tensor.spec for tensor in tensors), key=lambda spec: -ITEMSIZE[spec.dtype])
    return Shard(name, tuple(specs), tensors)


def _ahead(
    thread: ThreadPoolExecutor, values: Iterator[tuple[PlannedTensor, Tensor]]
) -> Iterator[tuple[PlannedTensor, Tensor]]:
    """The same values; the next one is fetched while one is used."""
    coming = thread.submit(next, values, None)
    while (found := coming.result()) is not None:
        coming = thread.submit(next, values, None)
        yield found
