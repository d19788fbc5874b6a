"""The weight files of a checkpoint on the Hub: their names and the tensors in them, before any file is downloaded.

A header is a few kilobytes at the beginning of a file, and the Hub serves byte ranges. So a build can be planned within
seconds, and only files with needed tensors are downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, SafetensorsParsingError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.tensor_files.index import DTYPES, read_header
from transformers_moe_offload.tensor_files.weight_map import WeightMap

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CONNECTION_FAILED: Any = HfHubHTTPError.__bases__[0]
"""What the HTTP client of huggingface_hub raises; which client that is depends on the version."""
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
            return tuple(FieldSpec(one.name, one.shape, one.dtype) for one in read_header(path))
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
        except (_CONNECTION_FAILED, SafetensorsParsingError) as error:
            raise CheckpointError(
                f"cannot read the header of {name} of {self.repo}: {' '.join(str(error).split())}"
            ) from error
        odd = sorted({one.dtype for one in header.tensors.values()} - DTYPES.keys())
        if odd:
            raise CheckpointError(f"{self.repo} has tensors of dtype {odd[0]} in {name}, which is not supported")
        return tuple(FieldSpec(key, tuple(one.shape), DTYPES[one.dtype]) for key, one in header.tensors.items())

    def _missing(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"the header of {name} of {self.repo} is on the Hub only, and local_files_only (or HF_HUB_OFFLINE) "
            f"forbids to fetch it; leave that out once"
        )


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
