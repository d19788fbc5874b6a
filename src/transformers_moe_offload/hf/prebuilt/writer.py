"""Write a prebuilt checkpoint, shard by shard, so that it can be killed at any moment and resumed.

Experts are encoded by several threads and written in their order: as many experts are in memory as there are threads,
and one dense tensor at a time. What is written does not depend on the number of threads or on interruptions.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hf.prebuilt.layout import (
    GUARD,
    INDEX_NAME,
    DenseContent,
    LayerContent,
    Shard,
    index_of,
    shards_of,
)
from transformers_moe_offload.hf.prebuilt.resume import is_finished, place_for
from transformers_moe_offload.memory.checksum import checksum
from transformers_moe_offload.memory.record import host_bytes
from transformers_moe_offload.memory.safetensors_writer import SafetensorsWriter, write_bytes, write_text

T = TypeVar("T")
Advance = Callable[[int], None]
"""Told of the bytes that are done, as they are."""


@dataclass(frozen=True)
class Prebuilt:
    """Everything that goes into the folder of a prebuilt checkpoint."""

    layers: Sequence[LayerContent]
    dense: Sequence[DenseContent]
    texts: Mapping[str, str]
    """Small files by name: `config.json`, `README.md`."""
    copies: Sequence[Path] = field(default_factory=tuple)
    """Small files that are copied as they are: the tokenizer's."""

    def shards(self) -> list[Shard]:
        """The weight files."""
        return shards_of(self.layers, self.dense)


def write_prebuilt(
    folder: Path,
    content: Prebuilt,
    recipe: Mapping[str, Any],
    *,
    overwrite: bool = False,
    workers: int | None = None,
    advance: Advance | None = None,
) -> None:
    """Write a checkpoint into a folder, or finish one that an earlier call by the same recipe did not.

    `workers` None means one per core. Without `advance` there is a progress bar as Transformers has them.
    """
    shards = content.shards()
    with place_for(folder, recipe, overwrite=overwrite) as place:
        _expect_room(place, [shard for shard in shards if not (place / shard.name).exists()])
        write_shards(place, shards, resumes=True, workers=workers, advance=advance)
        for source in content.copies:
            write_bytes(place / source.name, source.read_bytes())
        for name, text in content.texts.items():
            write_text(place / name, text)
        finish(place, shards)


def write_shards(
    folder: Path,
    shards: Sequence[Shard],
    *,
    resumes: bool = False,
    workers: int | None = None,
    advance: Advance | None = None,
) -> None:
    """Write all shards; with `resumes` only those that are not there, or are not what was written."""
    total = sum(shard.nbytes for shard in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing shards", disable=advance is not None) as bar:
        done: Advance = advance or bar.update
        for shard in shards:
            if resumes and is_finished(shard, folder):
                done(shard.nbytes)
                continue
            with SafetensorsWriter(folder / shard.name, shard.tensors, shard.metadata) as writer:
                if isinstance(shard.content, LayerContent):
                    _write_layer(writer, shard.content, workers or os.cpu_count() or 1, done)
                else:
                    _write_dense(writer, shard.content, done)
            done(shard.nbytes - sum(tensor.nbytes for tensor in shard.tensors))


def finish(folder: Path, shards: Sequence[Shard]) -> None:
    """Make a folder with all its shards a checkpoint that can be loaded."""
    write_text(folder / GUARD.name, GUARD.read_text(encoding="utf-8"))
    write_text(folder / INDEX_NAME, as_json(index_of(shards)))


def as_json(content: Any) -> str:
    """JSON as Transformers writes it."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _write_layer(writer: SafetensorsWriter, layer: LayerContent, workers: int, done: Advance) -> None:
    def row(expert: int) -> tuple[Tensor, int]:
        record = layer.record(expert)
        row = torch.nn.functional.pad(record, (0, layer.stack(expert).row_bytes - record.numel()))
        return row, checksum(host_bytes(row))

    values = []
    for expert, (record, value) in enumerate(_in_order(row, layer.num_experts, workers)):
        writer.write(layer.stack(expert).tensor.name, record)
        values.append(value)
        done(record.numel())
    writer.write(layer.checksums.name, torch.tensor(values, dtype=torch.int64))
    done(layer.checksums.nbytes)


def _in_order(compute: Callable[[int], T], count: int, workers: int) -> Iterator[T]:
    """`compute` of 0, 1, 2, ..., at most `workers` of them at a time."""
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="moe-offload-quantize") as pool:
        for number in range(count):
            if len(pending) == workers:
                yield pending.popleft().result()
            pending.append(pool.submit(compute, number))
        while pending:
            yield pending.popleft().result()


def _write_dense(writer: SafetensorsWriter, contents: Sequence[DenseContent], done: Advance) -> None:
    for content in contents:
        tensors = content.read()
        for spec in content.tensors:
            writer.write(spec.name, tensors[spec.name])
        done(content.nbytes)


def _expect_room(folder: Path, shards: Sequence[Shard]) -> None:
    needed, free = sum(shard.nbytes for shard in shards), shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"the checkpoint takes {needed:,} more bytes in {folder}, but {free:,} are free; free some, write "
            f"elsewhere, or use fewer bits"
        )
