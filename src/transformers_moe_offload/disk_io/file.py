"""Read byte ranges of checkpoint files into memory that is already there.

`pread` with the GIL released, from any number of threads: no page faults in the middle of a matmul, no unwanted
readahead, and no shared file position. Files are opened on first use and must be what they were when the checkpoint was
indexed, which is compared whenever one is opened or mapped (`opened_file.py`); a file that vanished, shrank, was
replaced or written to is an error at the read that needs it, and the next read opens its path again. A file stays open
until a read of it fails or too many files are open. While it is open, it is mapped and opened past the page cache
through its descriptor, so its path may be moved or replaced meanwhile.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from transformers_moe_offload.disk_io.direct_reader import DirectReader
from transformers_moe_offload.disk_io.mapped_file import MappedFile
from transformers_moe_offload.disk_io.opened_file import OPEN_FILES, FileIdentity, OpenedFile
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.system.forks import FORKS, Rank
from transformers_moe_offload.system.host_memory import copy_bytes


class File:
    """One file, opened when first read and closed with its last user, or when too many others were opened since."""

    def __init__(self, path: Path, identity: FileIdentity) -> None:
        """`identity` is what the file was when it was indexed."""
        self.path = path.absolute()  # whatever the working directory is when it is opened
        self.nbytes = identity.nbytes
        """Size of the file when it was indexed."""
        self._identity = identity
        self._lock = FORKS.with_lock(threading.Lock(), Rank.SHORT)
        self._opened: OpenedFile | None = None
        self._map: MappedFile | None = None
        self._direct: DirectReader | None = None
        self._refuses_direct = False

    @classmethod
    def now(cls, path: Path) -> File:
        """The file that a path leads to now; raises `OSError` if it cannot be opened."""
        with path.open("rb") as stream:
            return cls(path, FileIdentity.of(stream.fileno()))

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` with the file's bytes from `offset` on, or raise `CheckpointError`."""
        self.scatter_into([target], offset)

    def scatter_into(self, targets: Sequence[memoryview], offset: int, *, past_cache: bool = False) -> None:
        """Fill several targets, one after the other, with the file's bytes from `offset` on, in one read.

        `past_cache` leaves the page cache aside, where the system and the filesystem allow it.
        """
        nbytes, found = sum(map(len, targets)), None
        with self._closed_if_it_fails():
            if past_cache:
                found = self._read_directly(lambda direct: direct.read(offset, nbytes), offset, nbytes)
            if found is None:
                self._fill(self._open(), list(targets), offset)
                return
            for target in targets:
                copy_bytes(target, found[: len(target)])
                found = found[len(target) :]

    def scatter_cached_into(self, targets: Sequence[memoryview], offset: int) -> bool:
        """The same from the page cache, without waiting for the disk; returns whether all bytes were there.

        Always False where the system has no such read. Errors give False, too; a read that waits raises them.
        """
        try:
            return self._open().read_cached(targets, offset) == sum(map(len, targets))
        except (OSError, CheckpointError):
            return False

    def announce(self, offset: int, nbytes: int) -> bool:
        """Have the system fetch bytes into the page cache, without waiting; returns whether it can be asked to.

        Errors give False; the read that follows raises them.
        """
        try:
            return self._open().announce(offset, nbytes)
        except (OSError, CheckpointError):
            return False

    def read_pages_into(self, target: memoryview, offset: int, needed: int) -> None:
        """Fill memory that begins at a page with whole pages of the file, past the page cache where that can be done.

        The last page of a file may be partial: `needed` bytes have to be there.
        """
        with self._closed_if_it_fails():
            if self._read_directly(lambda direct: target[: direct.read_into(target, offset)], offset, needed) is None:
                self._fill(self._open(), [target[:needed]], offset)

    def directly(self) -> DirectReader | None:
        """The file, opened past the page cache; None where that is refused, as far as is known."""
        with self._closed_if_it_fails():
            return self._opened_directly()

    def mapped(self) -> MappedFile:
        """The whole file, mapped; mapped anew if the file has changed since."""
        with self._closed_if_it_fails():
            opened = self._open()
            with self._lock:
                found = self._map
                is_new = found is None or not found.is_unchanged(time.monotonic())
                if found is None or is_new:
                    self._map = None
                    found = self._map = MappedFile(opened)
        if is_new:
            OPEN_FILES.add(self)
        return found

    @contextmanager
    def _closed_if_it_fails(self) -> Iterator[None]:
        """Raise failures as `CheckpointError`, and close the file, so that the next read opens its path again."""
        try:
            yield
        except OSError as error:
            self.close()
            raise CheckpointError(
                f"cannot read {self.path}: {error.strerror}; put the file back and try again"
            ) from error
        except CheckpointError:
            self.close()
            raise

    def _fill(self, opened: OpenedFile, targets: list[memoryview], offset: int) -> None:
        end = offset + sum(len(target) for target in targets)
        while offset < end:
            count = opened.read_into(targets, offset)
            if count == 0:
                raise self._too_short(opened.size(), end)
            offset += count
            targets = _without_first(targets, count)

    def _opened_directly(self) -> DirectReader | None:
        opened = self._open()
        with self._lock:
            if self._refuses_direct:
                return None
            if self._direct is not None:
                return self._direct
            try:
                direct = DirectReader(opened.place)
            except FileNotFoundError:
                raise
            except OSError:
                self._refuses_direct = True
                return None
            self._identity.expect(direct.descriptor, self.path)
            self._direct = direct
        OPEN_FILES.add(self)
        return direct

    def _too_short(self, found: int, end: int) -> CheckpointError:
        return CheckpointError(
            f"{self.path} ends at byte {found:,}, but an expert's weights reach to byte {end:,}; "
            f"put the file back and try again"
        )

    def _read_directly(self, read: Callable[[DirectReader], memoryview], offset: int, needed: int) -> memoryview | None:
        """What a read past the page cache returns, `needed` bytes from `offset` on or more; None if it is refused."""
        direct = self._opened_directly()
        try:
            found = None if direct is None else read(direct)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._refuses_direct = True
            return None
        if direct is not None and found is not None and len(found) < needed:
            raise self._too_short(direct.size(), offset + needed)
        return found

    def close(self) -> None:
        """Forget the open file; reads that use it finish first, the next read opens it again."""
        with self._lock:
            self._opened = None
            self._map = None
            self._direct = None

    def _open(self) -> OpenedFile:
        with self._lock:
            opened = self._opened
            if opened is not None:
                opened.expect_unchanged()
                return opened
            opened = self._opened = OpenedFile(self.path, self._identity)
        OPEN_FILES.add(self)
        return opened

    def __deepcopy__(self, memo: dict[int, object]) -> File:
        return self  # read-only and thread-safe, so copies of a model share it

    def __reduce__(self) -> tuple[type[File], tuple[Path, FileIdentity]]:
        return File, (self.path, self._identity)


def _without_first(targets: list[memoryview], count: int) -> list[memoryview]:
    """The targets that are left to fill once the first `count` bytes are there."""
    while targets and count >= len(targets[0]):
        count -= len(targets[0])
        targets = targets[1:]
    return [targets[0][count:], *targets[1:]] if targets else []


class FileRange(NamedTuple):
    """Stored bytes that lie in one piece."""

    file: File
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.stop - self.start


def joined(ranges: Iterable[FileRange]) -> list[FileRange]:
    """The same bytes, with neighbours in a file made one: a checkpoint has an expert's matrices side by side."""
    found: list[FileRange] = []
    for file_range in sorted(ranges, key=lambda file_range: (file_range.file.path, file_range.start)):
        if found and found[-1].file is file_range.file and found[-1].stop == file_range.start:
            found[-1] = found[-1]._replace(stop=file_range.stop)
        else:
            found.append(file_range)
    return found
