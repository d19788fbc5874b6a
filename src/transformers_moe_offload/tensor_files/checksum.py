"""Notice when stored bytes are not what was written (CRC-32 of every tensor in a file), and tell files apart.

A checksum finds bytes that a disk or a download damaged; it does not protect against deliberate changes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zlib import crc32

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.tensor_files.index import StoredTensor, read_header, read_metadata
from transformers_moe_offload.untrusted import reading

METADATA_KEY = "crc32"
"""Where a safetensors header keeps the checksums of its tensors: in the order of their data, eight hex digits each."""

_CHUNK_BYTES = 8 * 2**20  # reads of this size run at the disk's full speed
_SAMPLES = 16
_SAMPLE_BYTES = 2**16  # 1 MiB of each file tells two fine-tunes of one model apart, and is read in no time


def as_metadata(checksums: Iterable[int]) -> str:
    """Checksums as the header of a file keeps them; the length does not depend on their values."""
    return " ".join(f"{value:08x}" for value in checksums)


def check_file(path: Path) -> list[StoredTensor]:
    """The tensors of a file, after all of it was read and compared with the checksums in its header.

    Raises `CheckpointError` for the first tensor that is not what was written.
    """
    expected = checksums_of(path)
    if expected is None:
        raise CheckpointError(f"{path} holds no checksums; it was not written by moe-offload")
    tensors = _by_place(path)
    for tensor in tensors:
        check_tensor(tensor, expected[tensor.name])
    return tensors


def checksums_of(path: Path) -> dict[str, str] | None:
    """The checksums in a file's header, by tensor; None where it has none."""
    text = read_metadata(path).get(METADATA_KEY)
    if text is None:
        return None
    tensors, expected = _by_place(path), text.split()
    if len(expected) != len(tensors):
        raise CheckpointError(
            f"{path} holds {len(tensors)} tensors and checksums for {len(expected)}; it was not written by moe-offload"
        )
    return {tensor.name: value for tensor, value in zip(tensors, expected, strict=True)}


def _by_place(path: Path) -> list[StoredTensor]:
    return sorted(read_header(path), key=lambda tensor: tensor.offset)


def check_tensor(tensor: StoredTensor, expected: str) -> None:
    """Read a tensor and compare it with its checksum; raises `CheckpointError` if it is not what was written."""
    found, left = 0, tensor.nbytes
    with reading(f"cannot read {tensor.file.path}"), tensor.file.path.open("rb") as stream:
        stream.seek(tensor.offset)
        while left:
            chunk = stream.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise CheckpointError(f"{tensor.file.path} became shorter while it was read")
            found, left = crc32(chunk, found), left - len(chunk)
    if f"{found:08x}" != expected:
        raise CheckpointError(
            f"{tensor.file.path} holds tensor {tensor.name} with checksum {found:08x}, but it was written with "
            f"{expected}; the file is damaged: download or write it again"
        )


def fingerprint(path: Path) -> dict[str, Any]:
    """A file's size, and a hash of its header and of parts of its data: two fine-tunes of one model have equal names
    and sizes."""
    nbytes, digest = path.stat().st_size, hashlib.sha256()
    with reading(f"cannot read {path}"), path.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        digest.update(stream.read(header_bytes))
        data_start = stream.tell()
        for number in range(_SAMPLES):
            stream.seek(data_start + (nbytes - data_start) * number // _SAMPLES)
            digest.update(stream.read(_SAMPLE_BYTES))
    return {"bytes": nbytes, "sample": digest.hexdigest()[:32]}
