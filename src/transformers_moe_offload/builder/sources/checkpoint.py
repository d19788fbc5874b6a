"""A dense checkpoint in safetensors files, in a folder or on the Hub, where a file is downloaded when it is read."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from transformers_moe_offload.builder.sources.base import Ancestor
from transformers_moe_offload.builder.sources.model_class import on_meta, saved_tensors
from transformers_moe_offload.errors import CheckpointError, RecipeError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.hf.upstream import ignored_on_load_unexpected, tied_weights
from transformers_moe_offload.hub.fetch import Fetched, fetch, fetch_small
from transformers_moe_offload.hub.weights import HubWeights, shards_of, without_safetensors
from transformers_moe_offload.tensor_files.index import StoredTensor, check_index_file, read_index
from transformers_moe_offload.tensor_files.reading import read_stored
from transformers_moe_offload.untrusted import one_line

_INDEX = "model.safetensors.index.json"
_ROWS = 4096


class CheckpointSource:
    """A whole model as `save_pretrained` wrote it."""

    def __init__(
        self,
        fetched: Fetched,
        config: PreTrainedConfig,
        tensors: Mapping[str, FieldSpec],
        stored: Mapping[str, StoredTensor],
    ) -> None:
        self.name, self.companions, self.config = fetched.name, fetched.companions, config
        self.ancestors: tuple[Ancestor, ...] = (
            Ancestor(fetched.name, fetched.revision, fetched.weights, fetched.card),
        )
        self.tensors, self._stored = tensors, stored

    @classmethod
    def open(cls, name: str, options: Mapping[str, Any]) -> CheckpointSource:
        """Read config and headers; weights on the Hub stay there until they are read."""
        try:
            config = AutoConfig.from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read the config of {name}: {one_line(error, 600)}") from error
        if getattr(config, "quantization_config", None):
            raise RecipeError(f"{name} is quantized; experts are made of the model that it was quantized from")
        fetched, specs, stored = _in_folder(name, config) if Path(name).is_dir() else _on_hub(name, config, options)
        return cls(fetched, config, as_saved(name, config, specs, stored), stored)

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored."""
        return read_stored(self._stored[name])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of it, and only these are read."""
        return read_rows(self._stored[name], start, stop)

    def stored(self, name: str) -> StoredTensor:
        """The stored tensor."""
        return self._stored[name]

    def bring(self, names: Iterable[str]) -> None:
        """Download the files that hold these tensors, if they are not here."""
        for name in names:
            self._stored[name]


def read_rows(stored: StoredTensor, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of a stored tensor; nothing else is read."""
    row_bytes = stored.nbytes // stored.shape[0]
    rows = replace(stored, offset=stored.offset + start * row_bytes, shape=(stop - start, *stored.shape[1:]))
    return read_stored(rows)


def as_saved(
    name: str, config: PreTrainedConfig, specs: Mapping[str, FieldSpec], stored: Mapping[str, StoredTensor]
) -> dict[str, FieldSpec]:
    """The tensors of the class; raises `CheckpointError` if some are missing, unknown or of another shape."""
    expected = saved_tensors(config)
    for one in expected.values():
        found = specs.get(one.name)
        if found is None:
            raise CheckpointError(
                f"{name} has no tensor {one.name}; {len(expected)} belong to a {config.model_type}, {len(specs)} are "
                f"there: the checkpoint is incomplete, or its config belongs to other weights"
            )
        if found.shape != one.shape:
            raise CheckpointError(
                f"{name} stores {one.name} as {list(found.shape)}, but its config says {list(one.shape)}: the config "
                f"belongs to other weights"
            )
    model = on_meta(config)
    tied = {name: kept for name, kept in tied_weights(model).items() if name in specs}
    harmless = [*ignored_on_load_unexpected(model), r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$"]
    for extra in specs.keys() - expected.keys() - tied.keys():
        if not any(re.search(pattern, extra) for pattern in harmless):
            raise CheckpointError(
                f"{name} has a tensor {extra}, which a {config.model_type} with this config does not have; its config "
                f"belongs to other weights, or it is a model of another kind"
            )
    for alias, kept in tied.items():
        if not _are_equal(stored[alias], stored[kept]):
            raise CheckpointError(
                f"{name} stores {alias} and {kept} with different values, but its config says that they are one "
                f"(tie_word_embeddings); set that to false in its config.json, or take one of them out"
            )
    return {one: specs[one] for one in expected}


def _are_equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors have the same values; only some rows of them are in memory."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    chunks = [(start, min(start + _ROWS, first.shape[0])) for start in range(0, first.shape[0], _ROWS)]
    return all(torch.equal(read_rows(first, *chunk), read_rows(second, *chunk)) for chunk in chunks)


def specs_of(stored: Mapping[str, StoredTensor]) -> dict[str, FieldSpec]:
    """Names, shapes and dtypes of stored tensors."""
    return {name: FieldSpec(name, one.shape, one.dtype) for name, one in stored.items()}


_Opened = tuple[Fetched, Mapping[str, FieldSpec], Mapping[str, StoredTensor]]


def _in_folder(name: str, config: PreTrainedConfig) -> _Opened:
    folder = Path(name)
    index = folder / _INDEX
    for shard in shards_of(index) if index.is_file() else ():
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder} has no {shard}, which its index names; copy or download it again")
    try:
        fetched = fetch(name, config, {})
    except (OSError, ValueError) as error:
        raise without_safetensors(name, (file.name for file in folder.iterdir())) from error
    stored = read_index(fetched.weights)
    if len(fetched.weights) > 1 and index.is_file():
        check_index_file(index, stored)
    return fetched, specs_of(stored), stored


def _on_hub(name: str, config: PreTrainedConfig, options: Mapping[str, Any]) -> _Opened:
    try:
        fetched = fetch_small(name, options)
        weights = HubWeights.look_up(name, fetched.folder, options, file=getattr(config, "transformers_weights", None))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the weights of {name}: {one_line(error, 600)}") from error
    stored = HubTensors(weights)
    return fetched, stored.specs, stored


class HubTensors(Mapping[str, StoredTensor]):
    """By name, each stored tensor of a checkpoint on the Hub; a lookup downloads its file."""

    def __init__(self, weights: HubWeights) -> None:
        self._weights = weights
        self._file_of: dict[str, str] = {}
        self.specs: dict[str, FieldSpec] = {}
        """By name, each tensor's shape and dtype, as headers have them; nothing is downloaded."""
        for file, specs in weights.headers.items():
            for spec in specs:
                if spec.name in self.specs:
                    raise CheckpointError(
                        f"tensor {spec.name} of {weights.repo} is stored twice, in {self._file_of[spec.name]} and in "
                        f"{file}"
                    )
                self.specs[spec.name], self._file_of[spec.name] = spec, file
        self._here: dict[str, StoredTensor] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> StoredTensor:
        with self._lock:
            if name not in self._here:
                self._bring(self._file_of[name])
            return self._here[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def _bring(self, file: str) -> None:
        try:
            paths = self._weights.download([file])
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot download {file} of {self._weights.repo}: {one_line(error, 600)}") from error
        self._here |= read_index(paths)
