"""Sizes and dtypes in a checkpoint, without downloading its weights.

Reads `model.safetensors.index.json`, and the headers of weight files that are on this machine already. Headers are
requested from the Hub only if another method has quantized the weights, because the config does not tell their size
then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import SafetensorsParsingError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from transformers_moe_offload.cli.options import Origin
from transformers_moe_offload.disk_io.file import File
from transformers_moe_offload.disk_io.file_identity import FileIdentity
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hub.fetch import fetch
from transformers_moe_offload.tensor_files.index import DTYPES, StoredTensor, read_header, read_index
from transformers_moe_offload.tensor_files.weight_map import WeightMap
from transformers_moe_offload.untrusted import quoted

_NOWHERE = FileIdentity(nbytes=0, device=0, inode=0, modified_ns=None)
"""Identity of files on the Hub, which are not opened."""


@dataclass(frozen=True)
class Stored:
    """Each fact is None where neither index nor header is available."""

    nbytes: int | None
    """Bytes of all tensors."""
    dtype: torch.dtype | None
    """Dtype of the first floating-point tensor that is not quantized; Transformers loads a model in it if its config
    names none."""


def what_is_stored(name: str, origin: Origin) -> Stored:
    """The facts about a checkpoint in a folder or on the Hub."""
    index_path = _find(name, SAFE_WEIGHTS_INDEX_NAME, origin.for_files())
    if index_path is None:
        header = _header(name, SAFE_WEIGHTS_NAME, origin)
        return Stored(sum(tensor.nbytes for tensor in header) or None, _first_float(header))
    shard, total_bytes = _read_index(index_path)
    return Stored(total_bytes, _first_float(_header(name, shard, origin)))


def stored_tensors(name: str, config: Any, origin: Origin) -> Mapping[str, StoredTensor]:
    """All tensors of a checkpoint by name; those on the Hub have shapes and sizes, but cannot be read."""
    if Path(name).is_dir() or origin.local_files_only:
        return read_index(fetch(name, config, origin.for_files()).weights)
    try:
        found = HfApi(token=origin.token).get_safetensors_metadata(name, revision=origin.revision)
        return {
            tensor: StoredTensor(
                tensor, File(Path(file), _NOWHERE), one.data_offsets[0], DTYPES[one.dtype], tuple(one.shape)
            )
            for file, header in found.files_metadata.items()
            for tensor, one in header.tensors.items()
        }
    except (SafetensorsParsingError, KeyError) as error:
        raise CheckpointError(f"the files of {name} have headers that cannot be read: {error}") from error


def _read_index(index_path: Path) -> tuple[str, int | None]:
    """The name of the first shard, and the total size if the index gives one."""
    index = WeightMap.read(index_path)
    if not index.files:
        raise CheckpointError(f"{index_path} is not a checkpoint index: its weight_map names no tensor")
    shard = min(index.files.values())
    if Path(shard).name != shard:
        raise CheckpointError(f"{index_path} names {quoted(shard)}, which is not a plain file name inside the folder")
    return shard, index.total_bytes or None


def _header(name: str, file: str, origin: Origin) -> list[StoredTensor]:
    path = _find(name, file, {**origin.for_files(), "local_files_only": True})
    return read_header(path) if path is not None else []


def _find(name: str, file: str, options: dict[str, object]) -> Path | None:
    try:
        path = cached_file(name, file, **options)
    except OSError:  # not there, or not reachable: the plan does without
        return None
    return Path(path) if path is not None else None


def _first_float(header: list[StoredTensor]) -> torch.dtype | None:
    dtypes = (torch_dtype(tensor.dtype) for tensor in header)
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), None)
