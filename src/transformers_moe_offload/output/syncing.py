"""Files that were written go to disk while other work is done, and are all there before that work counts as done.

Without it, whoever writes large files waits for the disk, and then the disk for whoever checks them. Until the block
ends a power failure may leave a file that has its name and not its bytes, so this is for places that are not in use yet
and where an unfinished file is told from a finished one by its checksums (`shards.is_finished`).
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.tensor_files.writer import sync_folder


class Syncing:
    """A block at whose end all files that were given to it are on disk."""

    def __init__(self) -> None:
        self._started: list[Future[None]] = []

    def __enter__(self) -> Syncing:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="moe-offload-sync")
        return self

    def file(self, path: Path) -> None:
        """Begin to bring a file to disk."""
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
        descriptor = os.open(path, os.O_RDWR)  # Windows syncs nothing that was opened to be read
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot bring {path} to disk: {error.strerror}") from error
