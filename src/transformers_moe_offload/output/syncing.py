"""Sync written files to disk on a thread while other work goes on; all are on disk when the block ends.

Without it, writing waits for the disk, and then the disk idles while files are checked. Until the block ends, a power
failure may leave a file with its name but not its bytes, so this is for folders that are not in use yet and whose
checksums tell unfinished files from finished ones (`shards.is_finished`).
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.tensor_files.writer import sync_folder


class Syncing:
    """A context manager: when it exits, all files passed to `file` are on disk."""

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
    try:
        descriptor = os.open(path, os.O_RDWR)  # Windows only syncs files that are open for writing
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot bring {path} to disk: {error.strerror}") from error
