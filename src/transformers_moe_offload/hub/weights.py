"""The weight files of a checkpoint: their names and the tensors in them, before any file is downloaded.

A header is a few kilobytes at the beginning of a file, and the Hub serves byte ranges. So a build can be planned within
seconds, and only files with needed tensors are downloaded. A model that no other method has quantized needs no header
from the Hub: its config gives sizes and dtypes, which its index and the files that are here confirm (`what_is_stored`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled, SafetensorsParsingError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from transformers_moe_offload.disk_io.file import File
from transformers_moe_offload.disk_io.opened_file import FileIdentity
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.hub.fetch import CONNECTION_FAILED, fetch
from transformers_moe_offload.tensor_files.index import DTYPES, StoredTensor, WeightMap, read_header, read_index
from transformers_moe_offload.untrusted import one_line

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NOWHERE = FileIdentity(nbytes=0, device=0, inode=0, modified_ns=None)
"""Identity of files on the Hub, which are not opened."""
_AT_ONCE = 8
"""Headers requested concurrently; huggingface_hub downloads as many files at a time."""


@dataclass(frozen=True)
class HubWeights:
    """The weight files of one commit."""

    repo: str
    folder: Path
    """Where the files of this commit are on this machine once they are downloaded."""
    options: Mapping[str, Any]
    """`token` and `local_files_only`."""
    headers: Mapping[str, tuple[FieldSpec, ...]] = field(default_factory=dict)
    """File name -> the tensors in it."""

    @classmethod
    def look_up(cls, repo: str, folder: Path, options: Mapping[str, Any], *, file: str | None = None) -> HubWeights:
        """Find a repository's weight files and read their headers.

        `folder` holds the commit's small files; `file` is the weight file, or the index, if the config names one.
        Raises `CheckpointError` if there are no safetensors files, or an index names files outside the folder.
        """
        wanted = {name: options.get(name) for name in ("token", "local_files_only")}
        found = cls(repo, folder, wanted)
        index = folder / Path(file or SAFE_WEIGHTS_INDEX_NAME).name  # a config must not lead out of it
        if index.suffix == ".json":
            names = shards_of(index) if index.is_file() else [SAFE_WEIGHTS_NAME]
        else:
            names = [index.name]
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="moe-offload-hub") as several:
            headers = dict(zip(names, several.map(found._header, names), strict=True))
        return cls(repo, folder, wanted, headers)

    def download(self, files: Iterable[str]) -> list[Path]:
        """Download the files that are not on this machine yet; returns the paths of all."""
        return [Path(hf_hub_download(self.repo, name, revision=self.folder.name, **self.options)) for name in files]

    def _header(self, name: str) -> tuple[FieldSpec, ...]:
        path = self.folder / name
        if path.is_file():
            return tuple(_spec(one) for one in read_header(path))
        if self.options["local_files_only"]:
            raise self._missing(name)
        api = HfApi(token=self.options["token"])
        try:
            header = api.parse_safetensors_file_metadata(self.repo, name, revision=self.folder.name)
        except OfflineModeIsEnabled as error:
            raise self._missing(name) from error
        except EntryNotFoundError as error:
            there = api.list_repo_files(self.repo, revision=self.folder.name)
            raise without_safetensors(self.repo, there) from error
        except (CONNECTION_FAILED, SafetensorsParsingError) as error:
            raise CheckpointError(
                f"cannot read the header of {name} of {self.repo}: {one_line(error, 1000)}"
            ) from error
        return tuple(_spec(one) for one in _tensors_of(self.repo, name, header))

    def _missing(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"the header of {name} of {self.repo} is on the Hub only, and local_files_only (or HF_HUB_OFFLINE) "
            f"forbids to fetch it; leave that out once"
        )


@dataclass(frozen=True)
class Stored:
    """What a checkpoint states about its weights; None where neither its index nor a header is on this machine."""

    nbytes: int | None
    """Bytes of all tensors."""
    dtype: torch.dtype | None
    """Dtype of the first floating-point tensor that is not quantized; Transformers loads a model in it if its config
    names none."""


def what_is_stored(name: str, options: Mapping[str, Any]) -> Stored:
    """The facts about a checkpoint, from its index, and the headers of weight files that are on this machine.

    `options` are `revision`, `token` and `local_files_only`.
    """
    index = _find(name, SAFE_WEIGHTS_INDEX_NAME, options)
    if index is None:
        header = _header_here(name, SAFE_WEIGHTS_NAME, options)
        return Stored(sum(tensor.nbytes for tensor in header) or None, _first_float(header))
    found = WeightMap.read(index)
    if not found.files:
        raise CheckpointError(f"{index} is not a checkpoint index: its weight_map names no tensor")
    return Stored(found.total_bytes or None, _first_float(_header_here(name, min(found.files.values()), options)))


def stored_tensors(name: str, config: Any, options: Mapping[str, Any]) -> Mapping[str, StoredTensor]:
    """All tensors of a checkpoint by name; those on the Hub have shapes and sizes, but cannot be read."""
    if Path(name).is_dir() or options["local_files_only"]:
        return read_index(fetch(name, config, options).weights)
    try:
        found = HfApi(token=options["token"]).get_safetensors_metadata(name, revision=options["revision"])
    except SafetensorsParsingError as error:
        raise CheckpointError(f"the files of {name} have headers that cannot be read: {error}") from error
    return {one.name: one for file, header in found.files_metadata.items() for one in _tensors_of(name, file, header)}


def shards_of(index: Path) -> list[str]:
    """The files that an index names. The index is untrusted: a file outside its folder is an error."""
    return sorted(set(WeightMap.read(index).files.values()))


def without_safetensors(name: str, files: Iterable[str]) -> CheckpointError:
    """The error for a checkpoint without safetensors files; names its pickles, if it has any."""
    pickles = sorted(file for file in files if any(fnmatch(file, pattern) for pattern in _PICKLES))
    if pickles:
        return CheckpointError(
            f"{name} has its weights in {', '.join(pickles[:3])}{', ...' if len(pickles) > 3 else ''}, which can run "
            f"code when they are loaded; only safetensors are supported: load the model where you trust it and call "
            f"save_pretrained"
        )
    return CheckpointError(
        f"cannot read the weights of {name}: it has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}"
    )


def _tensors_of(repo: str, file: str, header: Any) -> list[StoredTensor]:
    """The tensors of a file on the Hub, which cannot be read, from its header as huggingface_hub parses it."""
    odd = sorted({one.dtype for one in header.tensors.values()} - DTYPES.keys())
    if odd:
        raise CheckpointError(f"{repo} has tensors of dtype {odd[0]} in {file}, which is not supported")
    place = File(Path(file), _NOWHERE)
    return [
        StoredTensor(name, place, one.data_offsets[0], DTYPES[one.dtype], tuple(one.shape))
        for name, one in header.tensors.items()
    ]


def _spec(tensor: StoredTensor) -> FieldSpec:
    return FieldSpec(tensor.name, tensor.shape, tensor.dtype)


def _header_here(name: str, file: str, options: Mapping[str, Any]) -> list[StoredTensor]:
    path = _find(name, file, {**options, "local_files_only": True})
    return read_header(path) if path is not None else []


def _find(name: str, file: str, options: Mapping[str, Any]) -> Path | None:
    try:
        path = cached_file(name, file, **options)
    except OSError:  # not there, or not reachable: the plan does without
        return None
    return Path(path) if path is not None else None


def _first_float(header: list[StoredTensor]) -> torch.dtype | None:
    dtypes = (torch_dtype(tensor.dtype) for tensor in header)
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), None)
