"""Recognise a file that is opened later than its header was read.

Two fine-tunes of one model have files of equal names and sizes, so neither tells whether a path still leads to the file
whose header was read. A file counts as the same if its inode, its length and its time of modification are the same.

On a filesystem that gives one file several inode numbers (some that run in user space do), opening it again is an
error: nothing there tells a file from its replacement.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from transformers_moe_offload.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class FileIdentity:
    """What a file was when its header was read."""

    nbytes: int
    device: int
    inode: int
    modified_ns: int | None
    """When it was last written to, in nanoseconds since 1970; None where that does not matter."""

    @classmethod
    def of(cls, descriptor: int) -> FileIdentity:
        """The identity of an open file."""
        found = os.fstat(descriptor)
        return cls(nbytes=found.st_size, device=found.st_dev, inode=found.st_ino, modified_ns=found.st_mtime_ns)

    def whenever_written(self) -> FileIdentity:
        """The same for a file that may be written to."""
        return replace(self, modified_ns=None)

    def is_of(self, descriptor: int) -> bool:
        """Whether an open file is the same, and was not written to since."""
        return self._found(descriptor) == self

    def expect(self, descriptor: int, path: Path) -> None:
        """Raise `CheckpointError` if the file that was opened as `path` is another one, or was written to since."""
        found = self._found(descriptor)
        if found == self:
            return
        differences = []
        if found.nbytes != self.nbytes:
            differences.append(f"has {found.nbytes:,} bytes, but had {self.nbytes:,}")
        if found.modified_ns != self.modified_ns:
            differences.append(f"was written at {_time(found.modified_ns)}, but had been at {_time(self.modified_ns)}")
        if (found.device, found.inode) != (self.device, self.inode):
            differences.append(
                f"is inode {found.inode} of device {found.device}, but was inode {self.inode} of device {self.device}"
            )
        raise CheckpointError(
            f"{path} is not what it was when the model was loaded: it {'; it '.join(differences)}. Load the model "
            f"again, or put the original file back"
        )

    def _found(self, descriptor: int) -> FileIdentity:
        found = FileIdentity.of(descriptor)
        return found.whenever_written() if self.modified_ns is None else found


def _time(nanoseconds: int | None) -> str:
    """Down to the nanosecond: the times of files that are written one after the other differ by little."""
    seconds, rest = divmod(nanoseconds or 0, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest:09} UTC"
