"""Write a prebuilt checkpoint, shard by shard, so that it can be killed at any moment and resumed.

Several threads encode experts, which are written in order: at most as many experts as threads are in memory, and one
dense tensor at a time. The written bytes do not depend on the number of threads or on interruptions.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from zlib import crc32

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from transformers_moe_offload.hf.prebuilt.layout import MARKS, Contents, LayerContent, shards_of
from transformers_moe_offload.hf.prebuilt.names import GUARD, INDEX_NAME
from transformers_moe_offload.hub.fetch import published
from transformers_moe_offload.output.place import place_for
from transformers_moe_offload.output.shards import (
    Advance,
    Content,
    Shard,
    expect_room,
    fill_shards,
    index_of,
    write_contents,
)
from transformers_moe_offload.system.host_memory import host_bytes
from transformers_moe_offload.tensor_files.writer import SafetensorsWriter, as_json, write_bytes, write_text

T = TypeVar("T")


@dataclass(frozen=True)
class Prebuilt:
    """The content of a prebuilt checkpoint's folder."""

    layers: Sequence[LayerContent]
    dense: Sequence[Content]
    texts: Mapping[str, str]
    """Small files by name: `config.json`, `README.md`."""
    copies: Sequence[Path] = field(default_factory=tuple)
    """Small files to copy: the tokenizer's."""

    def shards(self) -> list[Shard[Contents]]:
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
    """Write a checkpoint into a folder, or finish the one of an interrupted call with the same recipe.

    `workers` None means one per core. Without `advance` Transformers' progress bar is shown.
    """
    shards = content.shards()
    with place_for(folder, recipe, MARKS, overwrite=overwrite) as place:
        expect_room(place, shards, "write elsewhere, or use fewer bits")
        write_shards(place, shards, resumes=True, workers=workers, advance=advance)
        for source in content.copies:
            write_bytes(place / source.name, published(source))
        for name, text in content.texts.items():
            write_text(place / name, text)
        finish(place, shards)


def write_shards(
    folder: Path,
    shards: Sequence[Shard[Contents]],
    *,
    resumes: bool = False,
    workers: int | None = None,
    advance: Advance | None = None,
) -> None:
    """Write all shards; with `resumes` only those that are missing or damaged."""
    total = sum(shard.nbytes for shard in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing shards", disable=advance is not None) as bar:
        fill = partial(_fill, workers or os.cpu_count() or 1)
        fill_shards(folder, shards, fill, advance or bar.update, resumes=resumes)


def finish(folder: Path, shards: Sequence[Shard[Contents]]) -> None:
    """Write the guard and the index, which make a folder with all shards a complete checkpoint."""
    write_text(folder / GUARD.name, GUARD.read_text(encoding="utf-8"))
    write_text(folder / INDEX_NAME, as_json(index_of(shards)))


def _fill(workers: int, writer: SafetensorsWriter, content: Contents, done: Advance) -> None:
    if isinstance(content, LayerContent):
        _write_layer(writer, content, workers, done)
    else:
        write_contents(writer, content, done)


def _write_layer(writer: SafetensorsWriter, layer: LayerContent, workers: int, done: Advance) -> None:
    def row(expert: int) -> tuple[Tensor, int]:
        record = layer.record(expert)
        row = torch.nn.functional.pad(record, (0, layer.stack(expert).row_bytes - record.numel()))
        return row, crc32(host_bytes(row))

    values = []
    for expert, (record, value) in enumerate(_in_order(row, layer.num_experts, workers)):
        writer.write(layer.stack(expert).tensor.name, record)
        values.append(value)
        done(record.numel())
    writer.write(layer.checksums.name, torch.tensor(values, dtype=torch.int64))
    done(layer.checksums.nbytes)


def _in_order(compute: Callable[[int], T], count: int, workers: int) -> Iterator[T]:
    """Results of `compute` for 0, 1, 2, ... in order, at most `workers` of them at a time."""
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="moe-offload-quantize") as pool:
        for number in range(count):
            if len(pending) == workers:
                yield pending.popleft().result()
            pending.append(pool.submit(compute, number))
        while pending:
            yield pending.popleft().result()
