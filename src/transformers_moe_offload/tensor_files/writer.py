"""Write a safetensors file piece by piece: tensors are never in memory together, and it appears whole or not at all.

The data begin at a multiple of `PAGE_BYTES`, so that tensors that are page-aligned among them are so in the file; the
spaces that this adds at the end of the header are part of the format. Tensors lie in the order of their declaration.
The same input gives the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO
from zlib import crc32

import torch
from torch import Tensor

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import ITEMSIZE, FieldSpec
from transformers_moe_offload.system.host_memory import PAGE_BYTES, host_bytes
from transformers_moe_offload.tensor_files.checksum import METADATA_KEY, as_metadata
from transformers_moe_offload.tensor_files.index import DTYPES

PARTIAL = ".partial"
"""Suffix of the name of a file that is being written."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}


class SafetensorsWriter:
    """One file being written, in a `with` block: complete at its end, gone if an exception leaves it.

    Tensors may be written in any order and each of them in pieces, first to last. A full disk or another failure of
    the system is a `CheckpointError`.
    """

    def __init__(
        self, path: Path, tensors: Sequence[FieldSpec], metadata: Mapping[str, str] | None = None, *, syncs: bool = True
    ) -> None:
        """Declare the tensors by name, shape and dtype, and further metadata for the header.

        Each tensor must come out aligned to its elements. Without `syncs` the caller brings the file to disk.
        """
        self.path = path
        self._syncs = syncs
        self._metadata = metadata or {}
        self._partial = path.with_name(path.name + PARTIAL)
        self._tensors = {tensor.name: tensor for tensor in tensors}
        assert len(self._tensors) == len(tensors), "two tensors of one name"
        data_start = _data_start(tensors, self._metadata)
        self._starts = {tensor.name: data_start + start for tensor, start in _starts(tensors).items()}
        self._written = dict.fromkeys(self._tensors, 0)
        self._checksums = dict.fromkeys(self._tensors, 0)
        # CRC-32 runs beside writes: it takes as long as copying into the page cache, and neither holds the GIL.
        self._summing = ThreadPoolExecutor(1, thread_name_prefix="moe-offload-checksum")
        self.nbytes = file_bytes(tensors, self._metadata)
        """Size of the complete file."""

    def __enter__(self) -> SafetensorsWriter:
        with self._failures_explained():
            self._partial.unlink(missing_ok=True)  # its room is free again
            free = shutil.disk_usage(self.path.parent).free
            if free < self.nbytes:
                raise CheckpointError(
                    f"{self.path} takes {self.nbytes:,} bytes, but {free:,} are free; free some, or write elsewhere"
                )
            self._stream = new_file(self._partial)
            _reserve(self._stream.fileno(), self.nbytes)
        return self

    def write(self, name: str, values: Tensor) -> None:
        """Write the next elements of a tensor, of its dtype and on any device."""
        raw = host_bytes(values.detach().cpu().contiguous().view(-1).view(torch.uint8))
        start = self._starts[name] + self._written[name]
        summed = self._summing.submit(crc32, raw, self._checksums[name])
        with self._failures_explained():
            self._stream.seek(start)
            self._stream.write(raw)
        self._written[name] += len(raw)
        self._checksums[name] = summed.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        self._summing.shutdown()
        with self._failures_explained():
            for name, tensor in self._tensors.items():
                assert self._written[name] == tensor.nbytes, f"{name}: {self._written[name]} of {tensor.nbytes} bytes"
            header = _header(list(self._tensors.values()), self._metadata, self._checksums.values())
            self._stream.seek(0)
            self._stream.write(struct.pack("<Q", len(header)) + header)
            self._stream.flush()
            if self._syncs:
                os.fsync(self._stream.fileno())
            self._stream.close()
            self._partial.replace(self.path)
            if self._syncs:
                sync_folder(self.path.parent)

    @contextmanager
    def _failures_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._discard()
            raise _cannot_write(self.path, self.nbytes, error) from error
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        self._summing.shutdown()
        stream = getattr(self, "_stream", None)
        if stream is not None:
            with suppress(OSError):  # what could not be flushed is not wanted any more
                stream.close()
        self._partial.unlink(missing_ok=True)


def file_bytes(tensors: Sequence[FieldSpec], metadata: Mapping[str, str] | None = None) -> int:
    """Size of the file that holds these tensors."""
    return _data_start(tensors, metadata or {}) + sum(tensor.nbytes for tensor in tensors)


def as_json(content: Any) -> str:
    """JSON as `save_pretrained` writes it."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all, also after a power failure."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """The same for what is not text."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with new_file(partial) as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _cannot_write(path, len(content), error) from error


def new_file(path: Path) -> BinaryIO:
    """An empty file, to be written to, in place of what had this name; a link that had it is not written through.

    Names of temporary files can be guessed, and folders shared.
    """
    path.unlink(missing_ok=True)
    return path.open("xb")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last; Windows has no such thing."""
    if os.name == "posix":
        sync(folder, os.O_RDONLY)


def sync(path: Path, flags: int) -> None:
    """Bring a file or folder to disk, opened with these flags."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _data_start(tensors: Sequence[FieldSpec], metadata: Mapping[str, str]) -> int:
    """Where in the file the data begin, whatever their checksums are."""
    return 8 + len(_header(tensors, metadata, [0] * len(tensors)))


def _header(tensors: Sequence[FieldSpec], metadata: Mapping[str, str], checksums: Iterable[int]) -> bytes:
    """The JSON header, padded with spaces up to where the data begin."""
    entries: dict[str, object] = {
        "__metadata__": {"format": "pt", **metadata, METADATA_KEY: as_metadata(checksums)},
    }
    for tensor, start in _starts(tensors).items():
        offsets = [start, start + tensor.nbytes]
        entries[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-(8 + len(text)) % PAGE_BYTES)


def _starts(tensors: Sequence[FieldSpec]) -> dict[FieldSpec, int]:
    """Where in the data, which begin at a page, each tensor begins."""
    starts = dict(zip(tensors, accumulate((tensor.nbytes for tensor in tensors), initial=0), strict=False))
    for tensor, start in starts.items():
        assert start % ITEMSIZE[tensor.dtype] == 0, f"{tensor.name} is not aligned: declare wider dtypes first"
    return starts


def _reserve(descriptor: int, nbytes: int) -> None:
    """Have the system set the room aside, where it can, so that the disk does not turn out to be full hours later."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # errors of filesystems without support for it
                raise


def _cannot_write(path: Path, nbytes: int, error: OSError) -> CheckpointError:
    sizes = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with suppress(OSError):
            free = shutil.disk_usage(path.parent).free
            sizes = f"; it takes {nbytes:,} bytes, and {free:,} are free"
    return CheckpointError(f"cannot write {path}: {error.strerror}{sizes}")
