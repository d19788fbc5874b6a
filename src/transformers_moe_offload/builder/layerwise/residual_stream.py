"""The residual stream of many tokens between two decoder layers: in RAM while it is small, else in a temporary file."""

# B windows, T tokens in each, H hidden

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.system.host_memory import host_bytes

RAM_BYTES = 256 * 2**20
"""Most that is kept in RAM: 16,384 tokens of 4,096 float32 each. A build promises to stay below 1 GB."""


class ResidualStream:
    """Hidden states by batch, in a `with` block; each may be replaced by one of the same shape."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, ram_bytes: int = RAM_BYTES) -> None:
        """`shapes` are the batches' (B, T, H)."""
        self._shapes, self._dtype = list(shapes), dtype
        sizes = [batch * length * hidden * dtype.itemsize for batch, length, hidden in shapes]
        self._starts = [0, *accumulate(sizes)]
        self._kept: list[Tensor | None] | None = [None] * len(sizes) if self.nbytes <= ram_bytes else None
        self._file: IO[bytes] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all batches."""
        return self._starts[-1]

    def __enter__(self) -> ResidualStream:
        if self._kept is None:
            self._file = tempfile.TemporaryFile(prefix="moe-offload-", buffering=0)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._file.fileno(), 0, self.nbytes)
            except OSError as error:
                self._file.close()
                raise CheckpointError(
                    f"hidden states of the calibration text take {self.nbytes:,} bytes in {tempfile.gettempdir()}: "
                    f"{error.strerror}; free some, set TMPDIR to a folder on another disk, or use less text"
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def __getitem__(self, batch: int) -> Tensor:
        """(B, T, H) on the CPU."""
        if self._kept is not None:
            kept = self._kept[batch]
            assert kept is not None, f"batch {batch} has not been put in"
            return kept
        raw = torch.empty(self._starts[batch + 1] - self._starts[batch], dtype=torch.uint8)
        assert self._file is not None
        self._file.seek(self._starts[batch])
        left = host_bytes(raw)
        while left and (count := self._file.readinto(left)):  # type: ignore[attr-defined]
            left = left[count:]
        return raw.view(self._dtype).view(self._shapes[batch])

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        """`hidden` (B, T, H), on any device."""
        assert tuple(hidden.shape) == self._shapes[batch], f"{tuple(hidden.shape)} for {self._shapes[batch]}"
        values = hidden.to("cpu", self._dtype)  # sync: device -> host
        if self._kept is not None:
            self._kept[batch] = values
            return
        assert self._file is not None
        self._file.seek(self._starts[batch])
        left = host_bytes(values.contiguous().view(-1).view(torch.uint8))
        while left:
            left = left[self._file.write(left) :]
