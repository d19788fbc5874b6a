"""Read stored tensors into memory of their own, or map them for a single pass over them, without a copy."""

from __future__ import annotations

import torch
from torch import Tensor

from transformers_moe_offload.disk_io.mapped_file import MappedFile
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.expert import ITEMSIZE
from transformers_moe_offload.system.host_memory import host_bytes
from transformers_moe_offload.tensor_files.index import StoredTensor


def read_stored(piece: StoredTensor) -> Tensor:
    """One stored tensor, in memory of its own."""
    raw = torch.empty(piece.nbytes, dtype=torch.uint8)
    piece.file.read_into(host_bytes(raw), piece.offset)
    return raw.view(torch_dtype(piece.dtype)).view(piece.shape)


class MappedTensors:
    """Tensors that are mapped together from the page cache, until `let_go`.

    For tensors that neither outlive the pass nor are changed.
    """

    def __init__(self) -> None:
        self._mapped: list[tuple[MappedFile, int, int]] = []

    def tensor(self, stored: StoredTensor) -> Tensor:
        """A tensor, read-only by agreement; one that is not aligned to its elements is copied.

        Raises `CheckpointError` if the file is not what it was when its header was read.
        """
        if stored.offset % ITEMSIZE[stored.dtype] or not stored.nbytes:
            return read_stored(stored)
        found, stop = stored.file.mapped(), stored.offset + stored.nbytes
        found.bring_in(stored.offset, stop)
        self._mapped.append((found, stored.offset, stop))
        return found.bytes[stored.offset : stop].view(torch_dtype(stored.dtype)).view(stored.shape)

    def let_go(self) -> None:
        """Unmap their pages, which count as this process's memory as long as they are mapped."""
        for found, start, stop in self._mapped:
            found.let_go(start, stop)
        self._mapped.clear()
