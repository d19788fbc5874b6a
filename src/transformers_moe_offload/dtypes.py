"""Names of dtypes: torch's, as texts, in specs and files."""

from __future__ import annotations

import torch


def torch_dtype(name: str) -> torch.dtype:
    """The dtype torch calls by this name, e.g. `bfloat16`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")
