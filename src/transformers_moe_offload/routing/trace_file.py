"""The files of a routing trace: a folder with `trace.json`, which says what there is, and parts in safetensors.

Each part is complete in itself, and listed only once it is on disk: whatever ends a recording, what was written by then
can be read. No part is larger than the recorder's buffer, so neither writing nor reading needs more memory than that.
"""

# V router calls, N tokens at one router, M tokens, K experts per token, E experts, H hidden

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from transformers_moe_offload.memory.file_identity import FileIdentity
from transformers_moe_offload.tracing import TraceError

FORMAT = 1
"""Version of the folder; a reader refuses those it does not know."""

INDEX = "trace.json"

Part = dict[str, NDArray[Any]]
"""Arrays of a part, by name:

    calls          (V, 5) int64   router, first of its rows in this part, number of rows, step, first of its tokens in
                                  this part or -1 where the rows are no tokens of text; in the order of the calls
    token_ids      (M,) int32     -1 where it is not known
    sequence       (M,) int32     which text, over the whole trace
    position       (M,) int32     where in its text
    is_padding     (M,) uint8
    domain         (M,) int16     index into the domains, -1 without one
    experts.R      (N, K) int16   -1 fills up
    weights.R      (N, K) float32
    scores.R       (N, E) float16 or float32, if they were recorded
    hidden.R       (N, H) float32, if it was recorded
"""

_COMMON = {"calls": "i", "token_ids": "i", "sequence": "i", "position": "i", "is_padding": "u", "domain": "i"}
_OF_ROUTER = {"experts": "i", "weights": "f"}


@dataclass(frozen=True)
class RouterFacts:
    """What a trace knows of one router."""

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
    """What `trace.json` says."""

    model: str
    routers: list[RouterFacts] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    num_steps: int = 0
    num_tokens: int = 0

    def write(self, folder: Path) -> None:
        """Replace `trace.json`, wholly or not at all."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        _write(folder / INDEX, lambda path: path.write_text(text + "\n", encoding="utf-8"))

    @classmethod
    def read(cls, folder: Path) -> TraceIndex:
        """Read `trace.json`; raises `TraceError` for anything else."""
        path = folder / INDEX
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TraceError(f"cannot read the routing trace {folder}: {error}") from error
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            _refuse(folder, f"{INDEX} is not of format {FORMAT}; record it again")
        try:
            routers = [_facts(one) for one in found.pop("routers")]
            index = cls(routers=routers, **found)
        except (TypeError, KeyError, AttributeError) as error:
            raise TraceError(f"{folder} is not a routing trace: {INDEX} does not say what it must: {error}") from error
        for name in ("parts", "domains"):
            texts = getattr(index, name)
            if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
                _refuse(folder, f"{INDEX} does not say what it must: {name}={texts!r}")
        for name in ("num_steps", "num_tokens"):
            if not isinstance(getattr(index, name), int):
                _refuse(folder, f"{INDEX} does not say what it must: {name}={getattr(index, name)!r}")
        if any(Path(name).name != name for name in index.parts):
            _refuse(folder, "a part lies outside the folder")
        return index


def _facts(found: dict[str, Any]) -> RouterFacts:
    lists = {name: tuple(found[name]) for name in ("layers", "experts_paths")}
    return RouterFacts(**found | lists)


def new_folder(folder: str | os.PathLike[str]) -> Path:
    """A folder for a new trace; one that has a trace already is refused."""
    path = Path(folder).absolute()  # a recording goes on whatever the working directory becomes
    if (path / INDEX).exists():
        raise TraceError(f"{path} has a routing trace already; record into another folder, or remove it first")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TraceError(f"cannot make the folder {path}: {error}") from error
    return path


def write_part(folder: Path, number: int, part: Part) -> str:
    """Write a part -> its name."""
    name = f"part-{number:05}.safetensors"
    _write(folder / name, lambda path: save_file({key: np.ascontiguousarray(one) for key, one in part.items()}, path))
    return name


def file_of(folder: Path, name: str) -> FileIdentity:
    """By what the file of a part is known again, which is read later."""
    try:
        with (folder / name).open("rb") as stream:
            return FileIdentity.of(stream.fileno())
    except OSError as error:
        raise TraceError(f"cannot read {folder / name}: {error}") from error


def read_part(folder: Path, name: str, index: TraceIndex) -> Part:
    """Read a part and check it against the index."""
    try:
        part: Part = load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise TraceError(f"cannot read {folder / name}: {error}") from error
    _check(folder / name, part, index)
    return part


def _check(path: Path, part: Mapping[str, NDArray[Any]], index: TraceIndex) -> None:
    routers = range(len(index.routers))
    expected = _COMMON | {f"{name}.{router}": kind for router in routers for name, kind in _OF_ROUTER.items()}
    for name, kind in expected.items():
        if name not in part or part[name].dtype.kind != kind:
            _refuse(path, f"its {name} is {part[name].dtype if name in part else 'missing'}")
    if part["calls"].ndim != 2 or part["calls"].shape[1] != 5:
        _refuse(path, f"its calls are {part['calls'].shape}, not (V, 5)")
    num_tokens = len(part["token_ids"])
    for name in _COMMON:
        if name != "calls" and part[name].shape != (num_tokens,):
            _refuse(path, f"it has {num_tokens} tokens, but {name} is {part[name].shape}")
    calls = part["calls"]
    if len(calls) and not (calls[:, 0].min() >= 0 and calls[:, 0].max() < len(index.routers)):
        _refuse(path, f"a call is of router {calls[:, 0].max()}, and there are {len(index.routers)}")
    for router, facts in enumerate(index.routers):
        own = calls[calls[:, 0] == router]
        num_rows, experts = int(own[:, 2].sum()), part[f"experts.{router}"]
        if any(len(part[f"{name}.{router}"]) != num_rows for name in _OF_ROUTER):
            _refuse(path, f"router {router} was called with {num_rows} rows, but has {len(experts)} choices")
        if experts.size and not -1 <= experts.min() <= experts.max() < facts.num_experts:
            _refuse(path, f"router {router} chose expert {experts.max()} of {facts.num_experts}")
        of_text = own[own[:, 4] >= 0]
        if len(of_text) and (of_text[:, 2] + of_text[:, 4]).max() > num_tokens:
            _refuse(path, f"router {router} routed more tokens than the {num_tokens} that there are")


def _write(path: Path, write: Any) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            write(unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise TraceError(f"cannot write {path}: {error}") from error


def _refuse(path: Path, reason: str) -> NoReturn:
    raise TraceError(f"{path} is not a routing trace: {reason}")
