"""Write an edited checkpoint: files without changes are kept, the others are written anew.

The old checkpoint stays complete until the new one is, and then is replaced by it. The caller decides what changes.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from transformers_moe_offload.builder.edit.expert_tensors import SparseCheckpoint, blocks_of, parameters_of
from transformers_moe_offload.builder.gates.statistics import STATISTICS_NAME
from transformers_moe_offload.builder.writing.folder import CARD_NAME, INFO_NAME, MARKS, RECIPE_NAME, without_places
from transformers_moe_offload.builder.writing.weight_files import write_index
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.hub.fetch import companions_in, published
from transformers_moe_offload.output.place import place_for, replacing
from transformers_moe_offload.output.shards import Content, Shard, expect_room, fill_shards, shard_of, write_contents
from transformers_moe_offload.tensor_files.reading import read_stored
from transformers_moe_offload.tensor_files.writer import as_json, write_bytes, write_text
from transformers_moe_offload.untrusted import json_object


@dataclass(frozen=True)
class Written:
    """A tensor of the new checkpoint."""

    spec: FieldSpec
    read: Callable[[], Tensor]
    """Its values; they are cast to its dtype."""
    beside: str
    """A tensor of the old checkpoint; the new one goes into the same file."""


@dataclass(frozen=True)
class Edit:
    """All changes to a checkpoint. Statistics of its gates do not hold any more and are left out."""

    what: str
    """The edit in a sentence, for the card."""
    config: Mapping[str, Any]
    names: Mapping[str, str]
    """Tensors that stay as they are, by their old names -> by their new ones."""
    written: Sequence[Written]
    expert_names: Callable[[list[str]], list[str]]
    """The experts' new names, given the old ones."""


@contextmanager
def carried_out(checkpoint: SparseCheckpoint, edit: Edit, out: Path | None) -> Iterator[Path]:
    """Write the edited checkpoint; the block can add files. Afterwards it is in its folder, or in `out`."""
    shards = _shards(checkpoint, edit)
    kept = {new for old, new in edit.names.items() if old == new}
    changed = [shard for shard in shards if _is_changed(shard, checkpoint, kept)]
    gone = {tensor.file.path.name for tensor in checkpoint.tensors.values()} - {shard.name for shard in shards}
    without = (STATISTICS_NAME, *gone)
    recipe = _recorded(checkpoint.folder, edit.what)
    place_of = (
        replacing(checkpoint.folder, recipe, MARKS, without=without) if out is None else place_for(out, recipe, MARKS)
    )
    with place_of as place:
        expect_room(place, changed, "or write elsewhere")
        fill_shards(place, changed, write_contents, lambda nbytes: None)
        write_index(place, shards, is_wanted=(checkpoint.folder / SAFE_WEIGHTS_INDEX_NAME).is_file())
        _write_notes(checkpoint, edit, shards, place)
        yield place
        if out is not None:
            _copy_rest(checkpoint.folder, place, {shard.name for shard in shards} - {shard.name for shard in changed})
        write_text(place / CONFIG_NAME, as_json(dict(edit.config)))


def _shards(checkpoint: SparseCheckpoint, edit: Edit) -> list[Shard[Any]]:
    """All files of the new checkpoint, under the names of the old ones."""
    written: dict[str, list[Written]] = defaultdict(list)
    for one in edit.written:
        written[one.beside].append(one)
    contents: dict[str, list[Content]] = defaultdict(list)
    for old, tensor in checkpoint.tensors.items():
        if old in edit.names:
            written[old].insert(0, Written(checkpoint.spec(old, edit.names[old]), partial(read_stored, tensor), old))
        contents[tensor.file.path.name] += [Content((one.spec,), partial(_computed, one)) for one in written[old]]
    return [shard_of(name, group) for name, group in sorted(contents.items()) if group]


def _computed(one: Written) -> dict[str, Tensor]:
    return {one.spec.name: one.read().to(torch_dtype(one.spec.dtype))}


def _is_changed(shard: Shard[Any], checkpoint: SparseCheckpoint, kept: set[str]) -> bool:
    """Whether a file has other tensors than before, or other values."""
    before = {name for name, tensor in checkpoint.tensors.items() if tensor.file.path.name == shard.name}
    return before != {spec.name for spec in shard.tensors} or not all(spec.name in kept for spec in shard.tensors)


def _recorded(folder: Path, what: str) -> dict[str, Any]:
    """The recipe with the edits since."""
    path = folder / RECIPE_NAME
    recipe = json_object(path) if path.is_file() else {}
    return {**recipe, "edits": [*recipe.get("edits", ()), without_places(what)]}


def _write_notes(checkpoint: SparseCheckpoint, edit: Edit, shards: Sequence[Shard[Any]], place: Path) -> None:
    """Write the card and the figures of the edited checkpoint."""
    shapes = {spec.name: spec.shape for shard in shards for spec in shard.tensors}
    blocks = blocks_of(edit.config, {spec.name: spec for shard in shards for spec in shard.tensors})
    parameters = parameters_of(shapes, blocks, checkpoint.experts_per_token)
    info = checkpoint.folder / INFO_NAME
    if info.is_file():
        values = json_object(info)
        values["experts"] = edit.expert_names(list(values["experts"]))
        values["bytes"] = sum(spec.nbytes for shard in shards for spec in shard.tensors)
        values["parameters"] = {**parameters.__dict__, "total": parameters.total}
        values["edits"] = [*values.get("edits", ()), edit.what]
        write_text(place / INFO_NAME, json.dumps(values, indent=2) + "\n")
    card = checkpoint.folder / CARD_NAME
    if card.is_file():
        text = card.read_text(encoding="utf-8").rstrip("\n")
        heading = "" if "\n## Edits\n" in text else "\n\n## Edits\n"
        note = f"- {edit.what} Since then it has {parameters.total:,} parameters, {parameters.active:,} of them active."
        write_text(place / CARD_NAME, f"{text}{heading}\n{note}\n")


def _copy_rest(source: Path, place: Path, weights: set[str]) -> None:
    """Copy unchanged files to another folder: weights, and the small files that go along with a model."""
    for name in weights:
        if (source / name).is_file() and not (place / name).exists():
            shutil.copyfile(source / name, place / name)
    for file in companions_in(source):
        write_bytes(place / file.name, published(file))
