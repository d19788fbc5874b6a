"""Which experts each visit of a sparse layer wanted: the input of replays and reports. `trace_file.py` has its file.

The order of visits and the order of experts within each are kept, because both decide what a cache does. Scores of the
router and texts are not kept.
"""

# V visits, S steps, L sparse layers, W experts wanted over all visits

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from transformers_moe_offload.tracing.trace_file import FORMAT, Array, TraceError, read_arrays, write_arrays


class RecordedVisit(NamedTuple):
    """One visit of a sparse layer."""

    layer: int
    wanted: tuple[int, ...]
    """Experts in the order in which the layer asked for them, each once."""
    step: int
    """Which forward pass of the trace, counted from 0."""


@dataclass(repr=False)
class Trace:
    """The visits of some generations, in order."""

    layer_names: tuple[str, ...]
    """Paths of the experts modules in the model."""
    num_experts: tuple[int, ...]
    """Experts of each layer."""
    experts_per_token: tuple[int, ...] | None = None
    """Experts that a token takes in each layer, if the model says so."""
    visits: list[RecordedVisit] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    """Tokens of each step's forward, 0 where that is not known."""
    stall_ms: list[float] | None = None
    """How long each visit waited for loads, if that was recorded. It belongs to the cache of the recording."""

    @property
    def num_layers(self) -> int:
        """Sparse layers."""
        return len(self.layer_names)

    @property
    def total_experts(self) -> int:
        """Experts of all layers: the slots that would hold everything."""
        return sum(self.num_experts)

    @property
    def num_asked(self) -> int:
        """Experts asked for, over all visits."""
        return sum(len(visit.wanted) for visit in self.visits)

    def requests(self) -> list[tuple[int, tuple[int, ...]]]:
        """Layer and wanted experts of each visit."""
        return [(visit.layer, visit.wanted) for visit in self.visits]

    def counts(self) -> dict[str, list[int]]:
        """How often each expert was asked for, by layer: the counts that a cache is warmed up by.

        An expert counts once a visit, however many tokens chose it; `token_counts` counts tokens.
        """
        return self._count(self.visits)

    def token_counts(self) -> dict[str, list[int]]:
        """How many tokens chose each expert, by layer, in the steps of one token.

        Steps of more tokens are left out: a trace does not say which of them chose an expert. Raises `TraceError` if no
        step has one token; `RoutingTrace.token_counts` counts all tokens.
        """
        single = {step for step, num_tokens in enumerate(self.step_tokens) if num_tokens == 1}
        if not single:
            raise TraceError(
                f"the trace does not tell how many tokens chose an expert: {self._described_steps()}, and only in a "
                f"step of one token is each expert that is wanted that token's choice; record the text with "
                f"`routing.record_routing` (on the command line `moe-offload trace --routing`), or generate one "
                f"sequence token by token"
            )
        return self._count(visit for visit in self.visits if visit.step in single)

    def hottest(self, share: float | str) -> dict[str, list[int]]:
        """The experts that most tokens chose: a share of all experts, `"10%"` or `0.1`, as numbers by sparse layer.

        For `ExpertFormats(hot_experts=...)`. Experts of all layers are compared with one another; those that no token
        chose are not hot, however large the share. Tokens are counted as `token_counts` does.
        """
        return hottest_experts(dict(enumerate(self.token_counts().values())), share)

    def _count(self, visits: Iterable[RecordedVisit]) -> dict[str, list[int]]:
        counts = {name: [0] * number for name, number in zip(self.layer_names, self.num_experts, strict=True)}
        for visit in visits:
            for expert in visit.wanted:
                counts[self.layer_names[visit.layer]][expert] += 1
        return counts

    def _described_steps(self) -> str:
        known = [num_tokens for num_tokens in self.step_tokens if num_tokens]
        if not known:
            return "its steps have an unknown number of tokens" if self.step_tokens else "it has no steps"
        unknown = ", or an unknown number" if len(known) < len(self.step_tokens) else ""
        numbers = f"{min(known):,}" if min(known) == max(known) else f"{min(known):,} to {max(known):,}"
        return f"its steps have {numbers} tokens{unknown}"

    def __repr__(self) -> str:
        return f"Trace({self})"

    def __str__(self) -> str:
        return (
            f"{len(self.step_tokens):,} steps, {len(self.visits):,} visits of {self.num_layers} sparse layers with "
            f"{self.total_experts:,} experts; {self.num_asked:,} expert requests"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace; the file is there complete or not at all."""
        write_arrays(Path(path), _arrays(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a trace; a file that is not a trace, or contradicts itself, raises `TraceError`."""
        rows = {name: array.tolist() for name, array in read_arrays(path).items()}
        starts, experts = rows["starts"], rows["wanted"]
        visits = [
            RecordedVisit(layer, tuple(experts[start:end]), step)
            for layer, step, start, end in zip(rows["layer"], rows["step"], starts[:-1], starts[1:], strict=True)
        ]
        return cls(
            layer_names=tuple(rows["layer_names"]),
            num_experts=tuple(rows["num_experts"]),
            experts_per_token=tuple(rows["experts_per_token"]) if "experts_per_token" in rows else None,
            visits=visits,
            step_tokens=rows["step_tokens"],
            stall_ms=[float(ms) for ms in rows["stall_ms"]] if "stall_ms" in rows else None,
        )


def _arrays(trace: Trace) -> dict[str, Array]:
    arrays: dict[str, Array] = {
        "format": np.array([FORMAT]),
        "layer_names": np.array(trace.layer_names, dtype=np.str_),  # (L,)
        "num_experts": np.array(trace.num_experts, dtype=np.int64),  # (L,)
        "layer": np.array([visit.layer for visit in trace.visits], dtype=np.int32),  # (V,)
        "step": np.array([visit.step for visit in trace.visits], dtype=np.int64),  # (V,)
        "starts": np.cumsum([0, *(len(visit.wanted) for visit in trace.visits)], dtype=np.int64),  # (V + 1,)
        "wanted": np.array([expert for visit in trace.visits for expert in visit.wanted], dtype=np.int32),  # (W,)
        "step_tokens": np.array(trace.step_tokens, dtype=np.int64),  # (S,)
    }
    if trace.experts_per_token is not None:
        arrays["experts_per_token"] = np.array(trace.experts_per_token, dtype=np.int64)  # (L,)
    if trace.stall_ms is not None:
        arrays["stall_ms"] = np.array(trace.stall_ms, dtype=np.float64)  # (V,)
    return arrays


@runtime_checkable
class CountsTokens(Protocol):
    """Knows how many tokens chose each expert."""

    def token_counts(self) -> Mapping[str, Sequence[int]]:
        """How many tokens chose each expert, by the path of the experts module."""


def hottest_experts(counts: Mapping[int, Sequence[int]], share: float | str) -> dict[str, list[int]]:
    """The share of all experts that most tokens chose, for `ExpertFormats(hot_experts=...)`.

    `counts` are by the number of the sparse layer. Experts of all layers are compared with one another; of equal counts
    the lower layer and the lower number come first. Experts that no token chose are not hot, however large the share.
    """
    total_experts = sum(map(len, counts.values()))
    wanted = round(parse_share(share) * total_experts)
    if wanted < 1:
        raise TraceError(f"{share!r} of {total_experts} experts is less than one of them; choose a larger share")
    chosen = [
        (-uses, layer, expert) for layer, of_layer in counts.items() for expert, uses in enumerate(of_layer) if uses
    ]
    if not chosen:
        raise TraceError("no token chose an expert in what was recorded; record a longer text")
    hot: dict[str, list[int]] = {}
    for layer, expert in sorted((layer, expert) for _, layer, expert in sorted(chosen)[:wanted]):
        hot.setdefault(str(layer), []).append(expert)
    return hot


def parse_share(share: float | str) -> float:
    """A share as people write it, `"10%"` or `0.1`, as a number; raises `TraceError` for anything else."""
    match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*%", share.strip()) if isinstance(share, str) else None
    number = float(match[1]) / 100 if match else share
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= 1:
        raise TraceError(f"{share!r} is not a share of all experts; write '10%' or 0.1")
    return float(number)
