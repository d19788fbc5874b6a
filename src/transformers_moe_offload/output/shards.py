"""Weight files, planned from shapes: which tensor goes into which, how large they are, which of them are finished.

Names are the caller's. What fills a file with bytes is the caller's, too, or `write_contents`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ITEMSIZE, FieldSpec
from transformers_moe_offload.output.syncing import Syncing
from transformers_moe_offload.tensor_files.checksum import check_file
from transformers_moe_offload.tensor_files.index import read_metadata
from transformers_moe_offload.tensor_files.writer import SafetensorsWriter, file_bytes

C = TypeVar("C")
Advance = Callable[[int], None]
"""Told of the bytes that are done, as they are."""
MAX_SHARD_BYTES = 5 * 10**9
"""Of a shard, unless one tensor is larger: the size that the Hub recommends."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Content:
    """Tensors that come from one computation, to be written: a weight, or the parts of a quantized one."""

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
    """What the file says beside its tensors."""

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return file_bytes(self.tensors, self.metadata)


def shard_names(stem: str, count: int) -> list[str]:
    """Names of `count` files, as Transformers and the Hub know them."""
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def grouped(contents: Sequence[Content], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[tuple[Content, ...]]:
    """What goes into one file together, in the given order."""
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
    # Wide elements first, as safetensors does: so all of them are aligned, in a file that may have no gaps.
    return Shard(name, tuple(sorted(tensors, key=lambda tensor: -ITEMSIZE[tensor.dtype])), tuple(group))


def index_of(shards: Sequence[Shard[Any]]) -> dict[str, Any]:
    """What the index file says: which shard holds what."""
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
    """Write all shards; with `resumes` only those that are not there, or are not what was written.

    `fill` writes the tensors of one of them and tells what it is given of their bytes; all bytes of all files are told.
    Each is on disk before the next is begun, or, with `syncing`, when that block ends.
    """
    for shard in shards:
        path = folder / shard.name
        if resumes and is_finished(shard, folder):
            done(shard.nbytes)
        else:
            with SafetensorsWriter(path, shard.tensors, shard.metadata, syncs=syncing is None) as writer:
                fill(writer, shard.content, done)
            done(shard.nbytes - sum(tensor.nbytes for tensor in shard.tensors))
        if syncing is not None:  # the finished ones too: whoever wrote them may have been killed before that
            syncing.file(path)


def write_contents(writer: SafetensorsWriter, contents: Sequence[Content], done: Advance) -> None:
    """Compute and write tensors, those of one computation after another's."""
    for content in contents:
        tensors = content.read()
        for spec in content.tensors:
            writer.write(spec.name, tensors[spec.name])
        done(content.nbytes)


def is_finished(shard: Shard[Any], folder: Path) -> bool:
    """Whether a shard is there and is what was written, by the checksums in it; a damaged one is reported."""
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
    """Raise `CheckpointError`, before anything is written, if the disk has no room for what is not there yet."""
    needed = sum(shard.nbytes for shard in shards if not (folder / shard.name).exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"the checkpoint takes {needed:,} more bytes in {folder}, but {free:,} are free; free some, {advice}"
        )
