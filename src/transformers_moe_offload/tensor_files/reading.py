"""Read stored tensors into memory of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.system.host_memory import host_bytes
from transformers_moe_offload.tensor_files.index import StoredTensor


def read_stored(piece: StoredTensor) -> Tensor:
    """One stored tensor, in memory of its own."""
    raw = torch.empty(piece.nbytes, dtype=torch.uint8)
    piece.file.read_into(host_bytes(raw), piece.offset)
    return raw.view(torch_dtype(piece.dtype)).view(piece.shape)
