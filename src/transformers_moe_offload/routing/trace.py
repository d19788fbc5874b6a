"""`RoutingTrace`: what routers decided for every token of some forwards.

Read part by part, so that a trace larger than memory can be worked with. Statistics are in `statistics.py`, tables in
`export.py`; here is what there is, and its conversion to the trace of a cache.
"""

# N tokens at one router, M tokens, K experts per token, E experts, H hidden

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from transformers_moe_offload.compute.token_grouping import group_by_expert
from transformers_moe_offload.disk_io.file_identity import FileIdentity
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing import measures
from transformers_moe_offload.routing.trace_file import (
    Part,
    RouterFacts,
    TraceIndex,
    file_of,
    new_folder,
    write_part,
)
from transformers_moe_offload.routing.trace_parts import read_parts
from transformers_moe_offload.tracing import RecordedVisit, Trace, TraceError, hottest_experts

if TYPE_CHECKING:
    import pandas
    import pyarrow

    from transformers_moe_offload.routing.statistics import RouterStatistics


class Rows(NamedTuple):
    """What one router did with the tokens of one part."""

    experts: NDArray[np.int16]
    """(N, K), -1 fills up."""
    weights: NDArray[np.float32]
    """(N, K)."""
    scores: NDArray[Any] | None
    """(N, E), None where they were not recorded."""
    hidden: NDArray[np.float32] | None
    """(N, H), None where it was not recorded."""
    token_ids: NDArray[np.int32]
    """(N,), -1 where the rows are no tokens of text; the same holds for what follows."""
    sequence: NDArray[np.int32]
    position: NDArray[np.int32]
    domain: NDArray[np.int16]
    is_padding: NDArray[np.bool_]
    turn: NDArray[np.int16]
    """(N,): how often the router had these tokens before in the same forward: 0, and more where layers run several
    times in one."""


class RoutingTrace:
    """Routers' decisions, on disk or in memory."""

    def __init__(
        self, index: TraceIndex, source: Path | list[Part], files: Mapping[str, FileIdentity] | None = None
    ) -> None:
        """`files` are what the parts' files were when a recording was loaded."""
        self._index = index
        self._source = source
        self._files = files or {}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingTrace:
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

    @property
    def model(self) -> str:
        """The class of the model."""
        return self._index.model

    @property
    def routers(self) -> Sequence[RouterFacts]:
        """Of each router: path, number of experts and so on."""
        return tuple(self._index.routers)

    @property
    def domains(self) -> Sequence[str]:
        """The domains that tokens were assigned to, in the order of their first token."""
        return tuple(self._index.domains)

    @property
    def num_tokens(self) -> int:
        """Tokens of text, padding included."""
        return self._index.num_tokens

    @property
    def num_steps(self) -> int:
        """Forwards."""
        return self._index.num_steps

    @property
    def has_scores(self) -> bool:
        """Whether the scores of all experts were recorded."""
        return any(f"scores.{router}" in part for part in self.parts() for router in range(len(self.routers)))

    def parts(self) -> Iterator[Part]:
        """The parts, one at a time."""
        if isinstance(self._source, list):
            yield from self._source
            return
        yield from read_parts(self._source, self._index, self._files)

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

    def statistics(self, router: int) -> RouterStatistics:
        """How sure a router is, how it uses its experts, and what follows what."""
        from transformers_moe_offload.routing.statistics import statistics_of

        self._check_router(router)
        return statistics_of(self, router)

    def summary(self) -> list[dict[str, Any]]:
        """The figures of `statistics` for every router, a dictionary each."""
        return [
            {"router": self.routers[router].router, **self.statistics(router).figures()}
            for router in range(len(self.routers))
        ]

    def preferences(self, router: int) -> NDArray[np.float64]:
        """How often each domain chose each expert, 1 being the router's average: (domains, E)."""
        from transformers_moe_offload.routing.statistics import preferences_of

        self._check_router(router)
        return preferences_of(self, router)

    def agreement(self, other: RoutingTrace) -> list[float]:
        """For each router, how much the choices of two runs over the same tokens agree (Jaccard, on average)."""
        from transformers_moe_offload.routing.statistics import agreement_of

        return agreement_of(self, other)

    def token_counts(self) -> dict[str, list[int]]:
        """How many tokens chose each expert, by the path of the experts module; padding is left out.

        So are experts without weights and choices of weight zero. A token counts as often as its forward came to the
        router with it.
        """
        from transformers_moe_offload.routing.statistics import token_counts_of

        return token_counts_of(self)

    def hottest(self, share: float | str) -> dict[str, list[int]]:
        """The experts that most tokens chose: a share of those recorded, as `Trace.hottest`."""
        counts = self.token_counts()
        return hottest_experts({layer: counts[path] for layer, path, _ in self.sparse_layers()}, share)

    def sparse_layers(self) -> list[tuple[int, str, RouterFacts]]:
        """The recorded sparse layers in the order of the model: number, path of the experts module, and its router."""
        return sorted(
            (
                (layer, path, facts)
                for facts in self.routers
                for layer, path in zip(facts.layers, facts.experts_paths, strict=True)
            ),
            key=lambda one: one[0],
        )

    def to_pandas(self) -> pandas.DataFrame:
        """A row for every token and router. Needs the extra `research`."""
        return self.to_arrow().to_pandas()

    def to_arrow(self) -> pyarrow.Table:
        """A row for every token and router. Needs the extra `research`."""
        from transformers_moe_offload.routing.export import to_arrow

        return to_arrow(self)

    def to_cache_trace(self) -> Trace:
        """What these decisions ask of a cache: visits as an offloaded model makes them, for `tracing.replay`.

        The order of experts within a visit is that of our own arithmetic, `compute/token_grouping.py`. Layers that run
        Transformers' own forward ask in ascending order instead, which a replay may show where a visit overflows the
        cache.
        """
        layers = self.sparse_layers()
        place = {layer: number for number, (layer, _, _) in enumerate(layers)}
        trace = Trace(
            tuple(path for _, path, _ in layers),
            tuple(facts.num_with_weights for _, _, facts in layers),
            experts_per_token=tuple(facts.top_k for _, _, facts in layers if facts.top_k is not None) or None,
        )
        if trace.experts_per_token is not None and len(trace.experts_per_token) < len(layers):
            trace.experts_per_token = None
        for part in self.parts():
            for router, first, num_rows, step, _ in part["calls"].tolist():
                facts = self.routers[router]
                chosen = part[f"experts.{router}"][first : first + num_rows].astype(np.int64)
                weights = part[f"weights.{router}"][first : first + num_rows]
                index = torch.from_numpy(np.where(chosen < 0, facts.num_experts, chosen))
                grouping = group_by_expert(index, torch.from_numpy(weights.copy()), facts.num_with_weights)
                if step == len(trace.step_tokens):  # each forward has a call
                    trace.step_tokens.append(0)
                trace.step_tokens[step] = max(trace.step_tokens[step], num_rows)
                trace.visits += [
                    RecordedVisit(place[layer], tuple(grouping.by_last_use), step) for layer in facts.layers
                ]
        return trace

    def __repr__(self) -> str:
        return f"RoutingTrace({self})"

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
    scores, hidden = part.get(f"scores.{router}"), part.get(f"hidden.{router}")
    return Rows(
        part[f"experts.{router}"][kept],
        part[f"weights.{router}"][kept],
        None if scores is None else scores[kept],
        None if hidden is None else hidden[kept],
        of_tokens("token_ids")[kept],
        of_tokens("sequence")[kept],
        of_tokens("position")[kept],
        of_tokens("domain")[kept],
        is_padding[kept],
        turns_of(part, router)[kept],
    )


def tokens_of(part: Part, router: int) -> NDArray[np.int64]:
    """(N,): the index of each row's token in the part, -1 where the rows are no tokens of text."""
    calls = part["calls"]
    own = calls[calls[:, 0] == router]
    # Rows of a call are neighbours, and so are its tokens.
    starts = np.repeat(own[:, 4] - own[:, 1], own[:, 2])
    is_text = np.repeat(own[:, 4] >= 0, own[:, 2])
    return np.where(is_text, starts + np.arange(len(starts)), -1)


def turns_of(part: Part, router: int) -> NDArray[np.int16]:
    """(N,): of each row, how many calls of the router in the same forward had the same tokens before."""
    calls = part["calls"]
    own = calls[calls[:, 0] == router]
    seen: Counter[tuple[int, int]] = Counter()
    turns = np.zeros(len(own), np.int16)
    for number, (step, first_token) in enumerate(own[:, 3:5].tolist()):
        turns[number] = seen[step, first_token]
        seen[step, first_token] += 1
    return np.repeat(turns, own[:, 2])
