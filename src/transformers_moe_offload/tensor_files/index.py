"""Where each tensor of a checkpoint lies: file, offset, dtype, shape. Reads headers and index files only.

Format of a file: https://github.com/huggingface/safetensors#format (8 bytes of little-endian header length, a JSON
header, data).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, prod
from pathlib import Path
from typing import Any, TypeGuard

from transformers_moe_offload.disk_io.file import File
from transformers_moe_offload.disk_io.opened_file import FileIdentity
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ITEMSIZE
from transformers_moe_offload.untrusted import json_object, one_line, parse_json, quoted

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
"""torch's names of dtypes, by their names in a header."""

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_MAX_DIMENSIONS = 64  # of torch's tensors


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint file."""

    name: str
    file: File
    offset: int
    """First byte in the file."""
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * ITEMSIZE[self.dtype]

    def row(self, index: int, num_rows: int) -> StoredTensor:
        """Part `index` of `num_rows` equal parts along the first dimension; it lies in one piece."""
        part = self.shape[0] // num_rows
        shape = (part, *self.shape[1:])
        nbytes = prod(shape) * ITEMSIZE[self.dtype]
        return StoredTensor(self.name, self.file, self.offset + index * nbytes, self.dtype, shape)


def read_index(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """All tensors of these files by name, or `CheckpointError` for the first file that is not as it should be."""
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for tensor in read_header(path):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"tensor {one_line(tensor.name)} is stored twice, in {tensors[tensor.name].file.path} and in {path}"
                )
            tensors[tensor.name] = tensor
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of one file."""
    metadata = _read_json(path)[0].get("__metadata__")
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one file, with every range checked against the size of the file."""
    header, data_start, identity = _read_json(path)
    file = File(path, identity)
    tensors = [_checked(name, entry, file, data_start) for name, entry in header.items() if name != "__metadata__"]
    by_place = sorted((tensor for tensor in tensors if tensor.nbytes), key=lambda tensor: tensor.offset)
    for before, after in pairwise(by_place):
        if before.offset + before.nbytes > after.offset:
            raise CheckpointError(
                f"{path} has tensor {one_line(after.name)} begin at byte {after.offset:,}, but tensor "
                f"{one_line(before.name)} ends "
                f"at byte {before.offset + before.nbytes:,}: download it again"
            )
    return tensors


def _read_json(path: Path) -> tuple[dict[str, Any], int, FileIdentity]:
    """A file's header, the byte at which its data begin, and its identity."""
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{one_line(path)} is not a safetensors file; experts are read in place from safetensors only, "
            f"so convert the checkpoint first (load it without offloading and call save_pretrained)"
        )
    try:
        with path.open("rb") as stream:
            identity = FileIdentity.of(stream.fileno())
            nbytes = identity.nbytes
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            if header_bytes > min(_MAX_HEADER_BYTES, nbytes - 8):
                raise CheckpointError(
                    f"{path} has {nbytes:,} bytes, fewer than its header of {header_bytes:,} bytes; "
                    f"the file is truncated or not a safetensors file: download it again"
                )
            content = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"cannot read {one_line(path)}: {error.strerror}") from error
    except (struct.error, ValueError) as error:
        raise CheckpointError(f"{one_line(path)} has no readable safetensors header: download it again") from error
    try:
        header = parse_json(content, "it")
    except CheckpointError as error:
        raise CheckpointError(f"{path} has no readable safetensors header ({error}): download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a safetensors header that is not a JSON object: download it again")
    return header, 8 + header_bytes, identity


def check_index_file(index_path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Compare a `*.safetensors.index.json` with what the shards really hold."""
    for name, shard in WeightMap.read(index_path).files.items():
        stored = tensors.get(name)
        if stored is None or stored.file.path != (index_path.parent / shard).absolute():
            raise CheckpointError(
                f"{index_path} places {one_line(name)} in {one_line(shard)}, but that file does not hold it; "
                f"the shard is incomplete or belongs to another checkpoint: download it again"
            )


def _checked(name: str, entry: Any, file: File, data_start: int) -> StoredTensor:
    """One header entry as a `StoredTensor`, its range inside the file and as long as its shape says."""
    described: dict[str, Any] = entry if isinstance(entry, dict) else {}
    offsets, shape, dtype = described.get("data_offsets"), described.get("shape"), described.get("dtype")
    if not (_is_sizes(offsets) and _is_sizes(shape) and len(offsets) == 2):
        raise CheckpointError(f"{file.path} has an entry for tensor {one_line(name)} that is not valid")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{file.path} stores tensor {one_line(name)} as {quoted(dtype)}, which is not one of {sorted(DTYPES)}"
        )
    start, end = offsets
    tensor = StoredTensor(name, file, data_start + start, DTYPES[dtype], tuple(shape))
    if end - start != tensor.nbytes:
        raise CheckpointError(
            f"{file.path} gives tensor {one_line(name)} {end - start:,} bytes, but {dtype} {quoted(shape)} takes "
            f"{f'{tensor.nbytes:,}' if tensor.nbytes < 2**63 else 'more than any file has'}"
        )
    if data_start + end > file.nbytes:
        raise CheckpointError(
            f"{file.path} has {file.nbytes:,} bytes, but tensor {one_line(name)} reaches to byte {data_start + end:,}; "
            f"the file is truncated: download it again"
        )
    return tensor


def _is_sizes(numbers: Any) -> TypeGuard[list[int]]:
    """Whether these are whole numbers that sizes or offsets can be."""
    return (
        isinstance(numbers, list)
        and len(numbers) <= _MAX_DIMENSIONS
        and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    )


@dataclass(frozen=True)
class WeightMap:
    """What a `*.safetensors.index.json` says. The files that it names are not looked at.

    Format: `PreTrainedModel.save_pretrained` of Transformers: an object `weight_map`, tensor -> file, and an object
    `metadata` with `total_size`.
    """

    files: Mapping[str, str]
    """By tensor, the file it is in, inside the index's folder."""
    total_bytes: int | None
    """Of all tensors, if the index says so."""

    @classmethod
    def read(cls, path: Path, *, needs_metadata: bool = False) -> WeightMap:
        """Read an index; raises `CheckpointError` if the file is not one, or names files outside of its folder.

        With `needs_metadata` also if it has no metadata: Transformers does not read such an index.
        """
        try:
            index = json_object(path)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError):
                raise
            raise CheckpointError(f"{error}; it is not a checkpoint index: download it again") from error
        files = index.get("weight_map")
        if not isinstance(files, dict):
            raise CheckpointError(
                f"{path} is not a checkpoint index: its weight_map is {quoted(files)}, not an object; download it again"
            )
        for name, file in files.items():
            if not _is_inside(file):
                raise CheckpointError(
                    f"{path} places {one_line(name)} in {quoted(file)}, which is not a file inside its folder; "
                    f"refusing to read outside of {path.parent}"
                )
        metadata = index.get("metadata", None if needs_metadata else {})
        if not isinstance(metadata, dict):
            raise CheckpointError(
                f"{path} has {quoted(metadata)} for metadata, which is not an object; download it again, or write "
                f'"metadata": {{}}'
            )
        return cls(files, _total_bytes(path, metadata))


def _is_inside(file: Any) -> bool:
    """Whether this is the name of a file in a folder or below it."""
    if not isinstance(file, str) or not file or "\0" in file or len(file) > 4096:
        return False
    try:
        os.fsencode(file)
    except UnicodeEncodeError:
        return False
    path = Path(file)
    return path.name != "" and not path.is_absolute() and ".." not in path.parts


def _total_bytes(path: Path, metadata: Mapping[str, Any]) -> int | None:
    total = metadata.get("total_size")
    if total is None:
        return None
    if isinstance(total, bool) or not isinstance(total, int | float) or not 0 <= total < 2**63 or not isfinite(total):
        raise CheckpointError(f"{path} has {quoted(total)} for total_size, which is not a number of bytes")
    return int(total)
