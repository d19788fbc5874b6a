"""A dense checkpoint in safetensors files, in a folder or from the Hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from transformers_moe_offload.build.layout import layout_of, on_meta
from transformers_moe_offload.build.sources.base import Ancestor
from transformers_moe_offload.errors import CheckpointError, RecipeError
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.hub.fetch import Fetched, fetch
from transformers_moe_offload.memory.field_source import read_stored
from transformers_moe_offload.memory.safetensors_index import StoredTensor, check_index_file, read_index

_INDEX = "model.safetensors.index.json"
_ROWS = 4096
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class CheckpointSource:
    """A whole model as `save_pretrained` wrote it."""

    def __init__(self, fetched: Fetched, config: PreTrainedConfig, stored: Mapping[str, StoredTensor]) -> None:
        self._fetched = fetched
        self._stored = stored
        self.config = config
        self.tensors = {name: FieldSpec(name, one.shape, one.dtype) for name, one in stored.items()}

    @classmethod
    def open(cls, name: str, options: Mapping[str, Any]) -> CheckpointSource:
        """Read config and headers; what is not on this machine is downloaded first."""
        try:
            config = AutoConfig.from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read the config of {name}: {_one_line(error)}") from error
        if getattr(config, "quantization_config", None):
            raise RecipeError(f"{name} is quantized; experts are made of the model that it was quantized from")
        folder = Path(name)
        if folder.is_dir():
            _expect_inside(folder)
        try:
            fetched = fetch(name, config, options)
        except (OSError, ValueError) as error:
            raise _without_weights(name, error) from error
        stored = read_index(fetched.weights)
        index = fetched.folder / _INDEX
        if len(fetched.weights) > 1 and index.is_file():
            check_index_file(index, stored)
        return cls(fetched, config, as_saved(name, config, stored))

    @property
    def name(self) -> str:
        """Its id on the Hub, or the name of its folder."""
        return self._fetched.name

    @property
    def revision(self) -> str | None:
        """Its commit, if it is from the Hub."""
        return self._fetched.revision

    @property
    def ancestors(self) -> tuple[Ancestor, ...]:
        """Itself."""
        return (Ancestor(self.name, self.revision, self._fetched.weights, self.card),)

    @property
    def companions(self) -> tuple[Path, ...]:
        """Tokenizer, chat template, generation settings, licence."""
        return self._fetched.companions

    @property
    def card(self) -> Path | None:
        """Its model card, if it has one."""
        return self._fetched.card

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored."""
        stored = self._stored[name]
        return read_stored(stored)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of it, and only these are read."""
        return read_rows(self._stored[name], start, stop)


def read_rows(stored: StoredTensor, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of a stored tensor; nothing else is read."""
    row_bytes = stored.nbytes // stored.shape[0]
    rows = replace(stored, offset=stored.offset + start * row_bytes, shape=(stop - start, *stored.shape[1:]))
    return read_stored(rows)


def as_saved(name: str, config: PreTrainedConfig, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors that belong to the class, or `CheckpointError` for what is missing, odd or of another shape."""
    expected = layout_of(config)
    for one in expected.values():
        found = stored.get(one.name)
        if found is None:
            raise CheckpointError(
                f"{name} has no tensor {one.name}; {len(expected)} belong to a {config.model_type}, {len(stored)} are "
                f"there: the checkpoint is incomplete, or its config belongs to other weights"
            )
        if found.shape != one.shape:
            raise CheckpointError(
                f"{name} stores {one.name} as {list(found.shape)}, but its config says {list(one.shape)}: the config "
                f"belongs to other weights"
            )
    model = on_meta(config)
    tied = {name: kept for name, kept in model.all_tied_weights_keys.items() if name in stored}
    harmless = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$"]
    for extra in stored.keys() - expected.keys() - tied.keys():
        if not any(re.search(pattern, extra) for pattern in harmless):
            raise CheckpointError(
                f"{name} has a tensor {extra}, which no {config.model_type} with its config has; its config belongs to "
                f"other weights, or it is a model of another kind"
            )
    for one, kept in tied.items():
        if not _are_equal(stored[one], stored[kept]):
            raise CheckpointError(
                f"{name} stores {one} and {kept} with different values, but its config says that they are one "
                f"(tie_word_embeddings); set that to false in its config.json, or take one of them out"
            )
    return {one: stored[one] for one in expected}


def _are_equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors have the same values; some rows of them are in memory."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    starts = range(0, first.shape[0], _ROWS)
    stops = (min(start + _ROWS, first.shape[0]) for start in starts)
    return all(
        torch.equal(read_rows(first, start, stop), read_rows(second, start, stop))
        for start, stop in zip(starts, stops, strict=True)
    )


def _expect_inside(folder: Path) -> None:
    """File names in an index were written by somebody else: none of them may lead out of the folder."""
    index = folder / _INDEX
    if not index.is_file():
        return
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a checkpoint index: it has no readable weight_map") from error
    root = os.path.abspath(folder)
    for shard in shards:
        if not isinstance(shard, str) or os.path.commonpath([root, os.path.abspath(folder / shard)]) != root:
            raise CheckpointError(f"{index} names {shard!r}; refusing to read outside of {folder}")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder} has no {shard}, which its index names; copy or download it again")


def _without_weights(name: str, error: Exception) -> CheckpointError:
    """Why there are no weights that can be read."""
    folder = Path(name)
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern)) if folder.is_dir() else []
    if pickles or ".bin" in str(error):
        return CheckpointError(
            f"{name} has its weights in {', '.join(pickles) or 'pickle files'}, which run code when they are read; "
            f"only safetensors are, so load the model where you trust it and call save_pretrained"
        )
    return CheckpointError(f"cannot read the weights of {name}: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
