"""Routers' decisions for every token of some forwards, read part by part.

So a recording may be larger than memory. Statistics are in `statistics.py`, tables in `trace.py`.
"""

# N tokens at one router, M tokens, K experts per token, E experts, H hidden

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from transformers_moe_offload.disk_io.opened_file import FileIdentity
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing import measures
from transformers_moe_offload.routing.trace_file import Part, RouterFacts, TraceIndex, file_of, new_folder, write_part
from transformers_moe_offload.routing.trace_parts import read_parts
from transformers_moe_offload.tracing import TraceError


class Rows(NamedTuple):
    """What one router did with the tokens of one part."""

    experts: NDArray[np.int16]
    """(N, K), filled up with -1."""
    weights: NDArray[np.float32]
    """(N, K)."""
    scores: NDArray[Any] | None
    """(N, E), None where they were not recorded."""
    hidden: NDArray[np.float32] | None
    """(N, H), None where it was not recorded."""
    token_ids: NDArray[np.int32]
    """(N,), -1 where the rows are not tokens of text, as in `sequence`, `position` and `domain`."""
    sequence: NDArray[np.int32]
    position: NDArray[np.int32]
    domain: NDArray[np.int16]
    is_padding: NDArray[np.bool_]
    turn: NDArray[np.int16]
    """(N,): how many earlier calls of the router in the same forward had these tokens: above 0 only where layers run
    several times in a forward."""

    def at(self, places: Any) -> Rows:
        """What it did with some of these tokens."""
        columns: list[Any] = [None if column is None else column[places] for column in self]
        return Rows(*columns)


class RecordedRouting:
    """Routers' decisions, on disk or in memory."""

    def __init__(
        self, index: TraceIndex, source: Path | list[Part], files: Mapping[str, FileIdentity] | None = None
    ) -> None:
        """`files` are the identities of the parts' files when a recording was loaded."""
        self._index = index
        self._source = source
        self._files = files or {}
        self.model = index.model
        """The class of the model."""
        self.routers: Sequence[RouterFacts] = tuple(index.routers)
        """Facts about each router: path, number of experts and so on."""
        self.domains: Sequence[str] = tuple(index.domains)
        """The domains that tokens were assigned to, in the order of their first token."""
        self.num_tokens, self.num_steps = index.num_tokens, index.num_steps
        """Tokens of text, padding included, and forwards."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Open the folder of a recording; its parts are read when they are needed."""
        folder = Path(path).absolute()  # whatever the working directory is when parts are read
        index = TraceIndex.read(folder)
        return cls(index, folder, {name: file_of(folder, name) for name in index.parts})

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write all of it into a new folder; with `overwrite`, in place of another trace that is there."""
        if overwrite and isinstance(self._source, Path) and self._source.resolve() == Path(path).resolve():
            raise TraceError(f"{path} is where this trace is read from; save it into another folder")
        folder = new_folder(path, overwrite=overwrite)
        names = [write_part(folder, number, part) for number, part in enumerate(self.parts())]
        TraceIndex(**{**vars(self._index), "parts": names}).write(folder)

    def parts(self) -> Iterator[Part]:
        """The parts, one at a time."""
        source = self._source
        yield from source if isinstance(source, list) else read_parts(source, self._index, self._files)

    def rows(self, router: int, *, padding: bool = False) -> Iterator[Rows]:
        """What a router did, part by part; rows of padding are left out unless `padding`."""
        self._check_router(router)
        for part in self.parts():
            yield rows_of(part, router, padding=padding)

    def probabilities(self, rows: Rows, router: int) -> measures.Floats:
        """The router's probabilities for some rows: (N, E)."""
        if rows.scores is None:
            raise TraceError("the trace has no scores; record it without scores=None")
        return measures.probabilities(rows.scores, has_affinities=self.routers[router].has_affinities)

    def sparse_layers(self) -> list[tuple[int, str, RouterFacts]]:
        """The recorded sparse layers in the order of the model: number, path of the experts module, and its router."""
        layers = ((facts, zip(facts.layers, facts.experts_paths, strict=True)) for facts in self.routers)
        return sorted((layer, path, facts) for facts, own in layers for layer, path in own)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def __str__(self) -> str:
        return (
            f"{self.model}: {self.num_tokens:,} tokens in {self.num_steps:,} forwards, {len(self.routers)} routers"
            + (f", domains {', '.join(self.domains)}" if self.domains else "")
        )

    def _check_router(self, router: int) -> None:
        if not 0 <= router < len(self.routers):
            raise ConfigError(f"router {router} is not in the trace, which has routers 0 to {len(self.routers) - 1}")


def rows_of(part: Part, router: int, *, padding: bool = False) -> Rows:
    """What a router did with the tokens of one part."""
    token = tokens_of(part, router)
    is_text = token >= 0
    place = np.where(is_text, token, 0)

    def of_tokens(name: str) -> NDArray[Any]:
        column = part[name]
        return np.where(is_text, column[place] if len(column) else 0, np.array(-1).astype(column.dtype))

    is_padding = is_text & (of_tokens("is_padding") == 1)
    kept = slice(None) if padding or not is_padding.any() else ~is_padding
    of_router = (part.get(f"{name}.{router}") for name in ("experts", "weights", "scores", "hidden"))
    of_token = (of_tokens(name) for name in ("token_ids", "sequence", "position", "domain"))
    columns: list[Any] = [*of_router, *of_token, is_padding, turns_of(part, router)]
    return Rows(*columns).at(kept)


def tokens_of(part: Part, router: int) -> NDArray[np.int64]:
    """(N,): the index of each row's token in the part, -1 where the rows are not tokens of text."""
    calls = part["calls"]
    own = calls[calls[:, 0] == router]
    # The rows of a call are contiguous, and so are its tokens.
    starts = np.repeat(own[:, 4] - own[:, 1], own[:, 2])
    is_text = np.repeat(own[:, 4] >= 0, own[:, 2])
    return np.where(is_text, starts + np.arange(len(starts)), -1)


def turns_of(part: Part, router: int) -> NDArray[np.int16]:
    """(N,): for each row, how many earlier calls of the router in the same forward had the same tokens."""
    calls = part["calls"]
    own = calls[calls[:, 0] == router]
    seen: Counter[tuple[int, int]] = Counter()
    turns = np.zeros(len(own), np.int16)
    for number, (step, first_token) in enumerate(own[:, 3:5].tolist()):
        turns[number] = seen[step, first_token]
        seen[step, first_token] += 1
    return np.repeat(turns, own[:, 2])
