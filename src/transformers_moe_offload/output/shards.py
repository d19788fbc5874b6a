"""Weight files, planned from shapes: which tensor goes into which file, how large each is, which are finished.

The caller names the tensors and files, and passes the function that fills a file, for instance `write_contents`.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from torch import Tensor

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ITEMSIZE, FieldSpec
from transformers_moe_offload.tensor_files.checksum import check_file
from transformers_moe_offload.tensor_files.index import read_metadata
from transformers_moe_offload.tensor_files.writer import SafetensorsWriter, file_bytes, sync, sync_folder
from transformers_moe_offload.untrusted import reading

C = TypeVar("C")
Advance = Callable[[int], None]
"""Called with the number of bytes just written."""
MAX_SHARD_BYTES = 5 * 10**9
"""Largest shard, unless one tensor is larger: the size that the Hub recommends."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Content:
    """Tensors to write that one computation yields: a weight, or the parts of a quantized one."""

    tensors: tuple[FieldSpec, ...]
    read: Callable[[], Mapping[str, Tensor]]
    """The tensors by name; called once."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Shard(Generic[C]):
    """One file of a checkpoint, and where its tensors come from."""

    name: str
    tensors: tuple[FieldSpec, ...]
    """In the order of the file."""
    content: C
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The file's metadata."""

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return file_bytes(self.tensors, self.metadata)


def shard_names(stem: str, count: int) -> list[str]:
    """Names of `count` files in the form that Transformers and the Hub expect."""
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def grouped(contents: Sequence[Content], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[tuple[Content, ...]]:
    """Split contents into files of at most `max_shard_bytes`, in the given order."""
    groups: list[list[Content]] = []
    room = 0
    for content in contents:
        if not groups or content.nbytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(content)
        room -= content.nbytes
    return [tuple(group) for group in groups]


def shard_of(name: str, group: Sequence[Content]) -> Shard[Any]:
    """The file with these tensors."""
    tensors = [tensor for content in group for tensor in content.tensors]
    # Wide elements first, as safetensors does: all tensors are aligned, although the file may have no gaps.
    return Shard(name, tuple(sorted(tensors, key=lambda tensor: -ITEMSIZE[tensor.dtype])), tuple(group))


def index_of(shards: Sequence[Shard[Any]]) -> dict[str, Any]:
    """The content of the index file: which shard holds which tensor."""
    return {
        "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard.tensors)},
        "weight_map": {tensor.name: shard.name for shard in shards for tensor in shard.tensors},
    }


def fill_shards(
    folder: Path,
    shards: Sequence[Shard[C]],
    fill: Callable[[SafetensorsWriter, C, Advance], None],
    done: Advance,
    *,
    resumes: bool = False,
    syncing: Syncing | None = None,
) -> None:
    """Write all shards; with `resumes` only those that are missing or damaged.

    `fill` writes the tensors of one shard and reports their bytes to the function it is given; `done` adds up to the
    size of all files. Each shard is on disk before the next is begun, or, with `syncing`, when that block ends.
    """
    for shard in shards:
        path = folder / shard.name
        if resumes and is_finished(shard, folder):
            done(shard.nbytes)
        else:
            with SafetensorsWriter(path, shard.tensors, shard.metadata, syncs=syncing is None) as writer:
                fill(writer, shard.content, done)
            done(shard.nbytes - sum(tensor.nbytes for tensor in shard.tensors))
        if syncing is not None:  # finished ones too: an attempt may have been killed before the disk had them
            syncing.file(path)


def write_contents(writer: SafetensorsWriter, contents: Sequence[Content], done: Advance) -> None:
    """Compute and write tensors, one content after another."""
    for content in contents:
        tensors = content.read()
        for spec in content.tensors:
            writer.write(spec.name, tensors[spec.name])
        done(content.nbytes)


def is_finished(shard: Shard[Any], folder: Path) -> bool:
    """Whether a shard exists and matches its checksums, tensors and metadata; a damaged one is logged."""
    path = folder / shard.name
    if not path.exists():
        return False
    try:
        found, metadata = check_file(path), read_metadata(path)
    except CheckpointError as error:
        logger.warning(f"writing {path} again: {error}")
        return False
    tensors = tuple(FieldSpec(tensor.name, tensor.shape, tensor.dtype) for tensor in found)
    return tensors == shard.tensors and shard.metadata.items() <= metadata.items()


def expect_room(folder: Path, shards: Sequence[Shard[Any]], advice: str) -> None:
    """Raise `CheckpointError`, before anything is written, if the disk has no room for the missing shards."""
    needed = sum(shard.nbytes for shard in shards if not (folder / shard.name).exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"the checkpoint takes {needed:,} more bytes in {folder}, but {free:,} are free; free some, {advice}"
        )


class Syncing:
    """Sync written files to disk on a thread while other work goes on; all are on disk when the `with` block ends.

    Without it, writing waits for the disk, and then the disk idles while files are checked. Until the block ends, a
    power failure may leave a file with its name but not its bytes, so this is for folders that are not in use yet and
    whose checksums tell unfinished files from finished ones (`is_finished`).
    """

    def __init__(self) -> None:
        self._started: list[Future[None]] = []

    def __enter__(self) -> Syncing:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="moe-offload-sync")
        return self

    def file(self, path: Path) -> None:
        """Start syncing a file to disk."""
        self._started.append(self._thread.submit(_sync, path))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for one in self._started:
                one.result()


def _sync(path: Path) -> None:
    with reading(f"cannot bring {path} to disk"):
        sync(path, os.O_RDWR)  # Windows only syncs files that are open for writing
        sync_folder(path.parent)
