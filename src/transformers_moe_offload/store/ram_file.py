"""A file without a name that lives in RAM: the store of experts that were quantized while the model was loaded.

Being a file, it is read, mapped and copied from like any checkpoint.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.disk_io.file import File
from transformers_moe_offload.disk_io.opened_file import FileIdentity
from transformers_moe_offload.errors import MoeOffloadError


class NotPicklableError(MoeOffloadError, TypeError):
    """An object that exists only in this process; also a `TypeError`, as `pickle` and `copy` raise it."""


class RamFile(File):
    """`nbytes` of RAM, freed with the last reference to it.

    Where the system has no anonymous memory files (Linux has), it is a temporary file, which the page cache holds as
    long as there is room.
    """

    def __init__(self, name: str, nbytes: int) -> None:
        """`name` is what tools that list open files show."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create(name)
            path = Path(f"/proc/self/fd/{fd}")
            weakref.finalize(self, os.close, fd)
        else:
            fd, temporary = tempfile.mkstemp(prefix="moe-offload-")
            path = Path(temporary)
            weakref.finalize(self, _remove, fd, path, os.getpid())
        os.truncate(fd, nbytes)
        self._fd = fd
        self._seeking = threading.Lock()
        super().__init__(path, FileIdentity.of(fd).whenever_written())

    def write(self, content: memoryview, offset: int) -> None:
        """Put bytes into their place. Safe from several threads for places that do not overlap."""
        while content:
            written = self._write_once(content, offset)
            content, offset = content[written:], offset + written

    def shared(self) -> Tensor:
        """All of it, uint8 (nbytes,), from the beginning of a page: no copy, and valid as long as the tensor lives."""
        return torch.frombuffer(mmap.mmap(self._fd, self.nbytes), dtype=torch.uint8)

    def _write_once(self, content: memoryview, offset: int) -> int:
        """Returns how many bytes were written."""
        if hasattr(os, "pwrite"):
            return os.pwrite(self._fd, content, offset)
        with self._seeking:  # Windows has no positioned write
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.write(self._fd, content)

    def __reduce__(self) -> Any:
        raise NotPicklableError(
            "experts that were quantized while the model was loaded are in this process's RAM and cannot be pickled; "
            "save the model with save_pretrained and load it where it is needed"
        )


def _remove(fd: int, path: Path, owner: int) -> None:
    """Close and remove a temporary file; only `owner` removes it, because a forked child may end earlier."""
    os.close(fd)
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
