"""The files of a routing trace: a folder with `trace.json`, which says what there is, and parts in safetensors.

Each part is complete in itself, and listed only once it is on disk: if a recording is broken off, the parts written
until then can be read. No part is larger than the recorder's buffer, so writing and reading need no more memory than
that.

The index is read and checked here, parts in `trace_parts.py`. A folder is untrusted input: every number that allocates,
indexes or counts is compared with the content of the files as soon as they are read.
"""

# V router calls, N tokens at one router, M tokens, K experts per token, E experts, H hidden

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from transformers_moe_offload.disk_io.opened_file import FileIdentity
from transformers_moe_offload.tracing.trace_file import TraceError, expect_table, reading_trace, refuse, whole_file
from transformers_moe_offload.untrusted import quoted

FORMAT = 1
"""Version of the folder; a reader refuses those it does not know."""

INDEX = "trace.json"

Part = dict[str, NDArray[Any]]
"""Arrays of a part, by name:

    calls          (V, 5) int64   router, first of its rows in this part, number of rows, step, first of its tokens in
                                  this part or -1 where the rows are not tokens of text; in the order of the calls
    token_ids      (M,) int32     -1 where it is not known
    sequence       (M,) int32     which text, over the whole trace
    position       (M,) int32     where in its text
    is_padding     (M,) uint8
    domain         (M,) int16     index into the domains, -1 without one
    experts.R      (N, K) int16   filled up with -1
    weights.R      (N, K) float32
    scores.R       (N, E) float16 or float32, if they were recorded
    hidden.R       (N, H) float32, if it was recorded
"""

TOKEN_DTYPES = {
    "token_ids": "int32",
    "sequence": "int32",
    "position": "int32",
    "is_padding": "uint8",
    "domain": "int16",
}
"""The arrays of a part that have an entry for each token."""

KIND = "routing trace"
_MAX_INDEX_BYTES = 16 * 2**20
"""Parts have 64 MiB, and the index has a line for each: this is enough for a recording of many terabytes."""
MAX_CHOICES = 2**15
"""Experts of a router, and domains: each is numbered by 16 bits."""
_PART_NAME = re.compile(r"part-[0-9]{5,9}\.safetensors")


@dataclass(frozen=True)
class RouterFacts:
    """Facts about one router of a trace."""

    router: int
    """Which of the model's routers, as `set_routing` counts them."""
    path: str
    num_experts: int
    """Columns of its scores: experts without weights included."""
    num_with_weights: int
    """Experts that have weights."""
    top_k: int | None
    has_affinities: bool
    """Whether scores come from a softmax or sigmoid, not straight from the router's matrix."""
    layers: tuple[int, ...]
    """The sparse layers that follow its choice, as the cache counts them."""
    experts_paths: tuple[str, ...]


@dataclass
class TraceIndex:
    """The content of `trace.json`."""

    model: str
    routers: list[RouterFacts] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    num_steps: int = 0
    num_tokens: int = 0

    def write(self, folder: Path) -> None:
        """Replace `trace.json`, wholly or not at all."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        with whole_file(folder / INDEX, "the file") as path:
            path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> TraceIndex:
        """Read `trace.json`; raises `TraceError` if it is missing or not valid."""
        path = folder / INDEX
        with reading_trace(folder, KIND), path.open("rb") as file:
            text = file.read(_MAX_INDEX_BYTES + 1)
            if len(text) > _MAX_INDEX_BYTES:
                refuse_folder(folder, f"{INDEX} has more than {_MAX_INDEX_BYTES:,} bytes")
            found = json.loads(text)
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            refuse_folder(folder, f"{INDEX} is not of format {FORMAT}; record it again")
        entries = _entries(folder, found, TraceIndex)
        routers = [RouterFacts(**_entries(folder, one, RouterFacts)) for one in entries["routers"]]
        index = cls(**entries | {"routers": routers})
        _check_index(folder, index)
        return index


def is_text(found: Any) -> bool:
    """Whether it is a string that can be encoded; strings of JSON may contain lone surrogates."""
    try:
        return isinstance(found, str) and found.encode() is not None
    except UnicodeEncodeError:
        return False


def _is_count(found: Any) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 2**63


def _are(of_kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda found: isinstance(found, list) and all(map(of_kind, found))


_FITS: dict[str, Callable[[Any], bool]] = {
    "str": is_text,
    "int": _is_count,
    "int | None": lambda found: found is None or _is_count(found),
    "bool": lambda found: isinstance(found, bool),
    "tuple[int, ...]": _are(_is_count),
    "tuple[str, ...]": _are(is_text),
    "list[str]": _are(is_text),
    "list[RouterFacts]": _are(lambda found: isinstance(found, dict)),
}
"""For each type of an entry of `trace.json`, whether a value read from it fits."""


def _entries(folder: Path, found: Mapping[str, Any], kind: type[TraceIndex] | type[RouterFacts]) -> dict[str, Any]:
    """The entries of an object in `trace.json`, all of them and of the right types."""
    types = {one.name: str(one.type) for one in fields(kind)}
    if sorted(found) != sorted(types):
        refuse_folder(folder, f"{INDEX} has the keys {quoted(sorted(found))}, not {', '.join(types)}")
    for name, value in found.items():
        if not _FITS[types[name]](value):
            refuse_folder(folder, f"{INDEX}: {name}={quoted(value)} is not valid")
    return {name: tuple(found[name]) if one.startswith("tuple") else found[name] for name, one in types.items()}


def _check_index(folder: Path, index: TraceIndex) -> None:
    """Refuse numbers and names that contradict one another."""
    for name in index.parts:
        if _PART_NAME.fullmatch(name) is None:
            refuse_folder(folder, f"{quoted(name)} is not the name of a part, such as part-00000.safetensors")
    if len(set(index.parts)) < len(index.parts):
        refuse_folder(folder, "it names a part twice")
    if len(index.domains) > index.num_steps or len(set(index.domains)) < len(index.domains):
        refuse_folder(folder, f"it has {len(index.domains)} domains for {index.num_steps} forwards, or one twice")
    numbers = [facts.router for facts in index.routers]
    if numbers != sorted(set(numbers)) or max(numbers, default=0) >= 2**31:
        refuse_folder(folder, f"its routers are numbered {quoted(numbers)}")
    expect_table(folder, [facts.num_experts for facts in index.routers], "routers")
    for facts in index.routers:
        if not 1 <= facts.num_with_weights <= facts.num_experts <= MAX_CHOICES:
            refuse_folder(
                folder,
                f"router {facts.router} has {facts.num_experts} experts, {facts.num_with_weights} of them with weights",
            )
        if len(facts.layers) != len(facts.experts_paths):
            refuse_folder(
                folder,
                f"router {facts.router} is followed by {len(facts.layers)} layers at {len(facts.experts_paths)} paths",
            )
    for name, many in (("layer", "layers"), ("path of experts", "experts_paths")):
        of_all = [one for facts in index.routers for one in getattr(facts, many)]
        if len(set(of_all)) < len(of_all):
            refuse_folder(folder, f"two routers have one {name}")


def expect_new_folder(folder: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raise `TraceError` where `new_folder` would, without creating anything: a check before the model is loaded."""
    path = Path(folder).absolute()
    if (path / INDEX).exists():
        if not overwrite:
            raise TraceError(
                f"{path} has a routing trace already; name another folder, or replace it with overwrite=True"
            )
        return
    try:
        others = [one.name for one in path.iterdir() if not _PART_NAME.fullmatch(one.name)] if path.exists() else []
    except OSError as error:
        raise TraceError(f"cannot make the folder {path}: {error}") from error
    if others:
        raise TraceError(f"{path} has other files, {quoted(min(others))} among them; name a folder of its own")


def new_folder(folder: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """A folder for a new trace.

    A folder with a trace is refused, or with `overwrite` that trace is removed; a folder with other files is refused.
    """
    expect_new_folder(folder, overwrite=overwrite)
    path = Path(folder).absolute()  # a recording goes on whatever the working directory becomes
    try:
        path.mkdir(parents=True, exist_ok=True)
        if (path / INDEX).exists():
            (path / INDEX).unlink()  # first: without it, parts are no trace
            for part in [part for part in path.iterdir() if _PART_NAME.fullmatch(part.name)]:
                part.unlink()
    except OSError as error:
        raise TraceError(f"cannot make the folder {path}: {error}") from error
    return path


def write_part(folder: Path, number: int, part: Part) -> str:
    """Write a part -> its name."""
    name = f"part-{number:05}.safetensors"
    with whole_file(folder / name, "the file") as path:
        save_file({key: np.ascontiguousarray(one) for key, one in part.items()}, path)
    return name


def file_of(folder: Path, name: str) -> FileIdentity:
    """Identity of a part's file, by which a change is noticed when the part is read."""
    try:
        with (folder / name).open("rb") as stream:
            return FileIdentity.of(stream.fileno())
    except OSError as error:
        raise TraceError(f"cannot read {folder / name}: {error}") from error


def refuse_folder(path: Path, reason: str) -> NoReturn:
    """Raise the error of a folder, or a file in it, whose content contradicts itself."""
    refuse(path, reason, KIND)
