"""Which experts each visit of a sparse layer wanted: the input of replays and reports, and its file.

The order of visits and the order of experts within each are kept, because both decide what a cache does. What the
router's scores were is not kept; neither is any text.
"""

# V visits, S steps, L sparse layers, W experts wanted over all visits

from __future__ import annotations

import math
import os
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from transformers_moe_offload.errors import MoeOffloadError
from transformers_moe_offload.memory.safetensors_writer import new_file

FORMAT = 1
_ZIP, _NUMPY = b"PK", b"\x93NUMPY"
"""How archives of arrays, and single arrays, begin."""
"""Version of the file; a reader refuses those it does not know."""

Arrays = Mapping[str, NDArray[np.generic]]


class TraceError(MoeOffloadError):
    """A trace that cannot be read, written or drawn, with the reason."""


class RecordedVisit(NamedTuple):
    """One visit of a sparse layer."""

    layer: int
    wanted: tuple[int, ...]
    """Experts in the order in which the layer asked for them, each once."""
    step: int
    """Which forward pass of the trace, counted from 0."""


@dataclass
class Trace:
    """The visits of some generations, in order."""

    layer_names: tuple[str, ...]
    """Paths of the experts modules in the model."""
    num_experts: tuple[int, ...]
    """Of each layer."""
    experts_per_token: tuple[int, ...] | None = None
    """Of each layer, where the model says so."""
    visits: list[RecordedVisit] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    """Tokens of each step's forward, 0 where nobody told."""
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
        """How often each expert was asked for, by layer."""
        counts = {name: [0] * number for name, number in zip(self.layer_names, self.num_experts, strict=True)}
        for visit in self.visits:
            for expert in visit.wanted:
                counts[self.layer_names[visit.layer]][expert] += 1
        return counts

    def hottest(self, share: float | str) -> dict[str, list[int]]:
        """The experts that were asked for most: a share of all experts, `"10%"` or `0.1`, as numbers by sparse layer.

        For `ExpertFormats(hot_experts=...)`. Experts of all layers are compared with one another; those that were never
        asked for are not hot, however large the share.
        """
        wanted = round(_share(share) * self.total_experts)
        if wanted < 1:
            raise TraceError(f"{share!r} of {self.total_experts} experts is none of them; choose a larger share")
        counts = self.counts()
        asked = [
            (-uses, layer, expert)
            for layer, name in enumerate(self.layer_names)
            for expert, uses in enumerate(counts[name])
            if uses
        ]
        hot: dict[str, list[int]] = {}
        for layer, expert in sorted((layer, expert) for _, layer, expert in sorted(asked)[:wanted]):
            hot.setdefault(str(layer), []).append(expert)
        return hot

    def __str__(self) -> str:
        return (
            f"{len(self.step_tokens):,} steps, {len(self.visits):,} visits of {self.num_layers} sparse layers with "
            f"{self.total_experts:,} experts; {self.num_asked:,} times somebody was wanted"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace; the file is there complete or not at all."""
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            try:
                with new_file(unfinished) as file:
                    np.savez_compressed(file, allow_pickle=False, **_arrays(self))
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)
        except OSError as error:
            raise TraceError(f"cannot write the trace {path}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a trace; a file that is none, or contradicts itself, raises `TraceError`."""
        try:
            with open(path, "rb") as file:
                _expect_archive(path, file.read(len(_NUMPY)))
            loaded = np.load(path, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                _refuse(path, "it holds one array and not an archive of them")
            with loaded:
                arrays = {name: loaded[name] for name in loaded.files}
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise TraceError(
                f"cannot read the trace {path}: it is damaged, or was cut short ({error}); record it again"
            ) from error
        except (OSError, ValueError) as error:
            raise TraceError(f"cannot read the trace {path}: {error}") from error
        _check(path, arrays)
        starts, experts = arrays["starts"].tolist(), arrays["wanted"].tolist()
        visits = [
            RecordedVisit(layer, tuple(experts[start:end]), step)
            for layer, step, start, end in zip(
                arrays["layer"].tolist(), arrays["step"].tolist(), starts[:-1], starts[1:], strict=True
            )
        ]
        _check_visits(path, visits, arrays["num_experts"].tolist(), len(arrays["step_tokens"]))
        return cls(
            layer_names=tuple(arrays["layer_names"].tolist()),
            num_experts=tuple(arrays["num_experts"].tolist()),
            experts_per_token=tuple(arrays["experts_per_token"].tolist()) if "experts_per_token" in arrays else None,
            visits=visits,
            step_tokens=arrays["step_tokens"].tolist(),
            stall_ms=arrays["stall_ms"].tolist() if "stall_ms" in arrays else None,
        )


_REQUIRED = {
    "format": "i",
    "layer_names": "U",
    "num_experts": "i",
    "layer": "i",
    "step": "i",
    "starts": "i",
    "wanted": "i",
    "step_tokens": "i",
}
"""Arrays of the file and the kinds of their elements, as numpy abbreviates them."""

_OPTIONAL = {"experts_per_token": "i", "stall_ms": "f"}


def _arrays(trace: Trace) -> dict[str, NDArray[np.generic]]:
    arrays: dict[str, NDArray[np.generic]] = {
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


def _expect_archive(path: str | os.PathLike[str], start: bytes) -> None:
    """Say what is wrong before NumPy does, which takes anything it does not know for a pickle and offers to run it."""
    if not start.startswith((_ZIP, _NUMPY)):
        raise TraceError(
            f"cannot read the trace {path}: it is not an .npz archive; record one with `moe-offload trace`"
        )


def _check(path: str | os.PathLike[str], arrays: Arrays) -> None:
    """Refuse arrays that are missing, of another kind, or of lengths that do not fit together."""
    missing = sorted(_REQUIRED.keys() - arrays.keys())
    if missing:
        _refuse(path, f"it has no {', '.join(missing)}; record one with `moe-offload trace`")
    for name, array in arrays.items():
        kind = (_REQUIRED | _OPTIONAL).get(name)
        if kind is None:
            _refuse(path, f"it has {name!r}, which no trace has")
        if array.ndim != 1 or array.dtype.kind != kind:
            _refuse(path, f"its {name} is {array.dtype} of shape {array.shape}, not one row of {kind!r}")
    if arrays["format"].tolist() != [FORMAT]:
        _refuse(path, f"its format is {arrays['format'].tolist()}, and this version reads {[FORMAT]}; record it again")
    _check_lengths(path, {name: len(array) for name, array in arrays.items()})
    if "stall_ms" in arrays and not all(0 <= ms < math.inf for ms in arrays["stall_ms"].tolist()):
        _refuse(path, "its stall_ms has entries that are no times")
    starts = arrays["starts"].tolist()
    if starts[0] != 0 or starts[-1] != len(arrays["wanted"]) or starts != sorted(starts):
        _refuse(path, f"its starts do not divide the {len(arrays['wanted'])} experts wanted into visits")


def _check_lengths(path: str | os.PathLike[str], lengths: Mapping[str, int]) -> None:
    layers, visits = lengths["layer_names"], lengths["layer"]
    expected = {"num_experts": layers, "experts_per_token": layers, "step": visits, "stall_ms": visits}
    for name, length in (expected | {"starts": visits + 1}).items():
        if lengths.get(name, length) != length:
            _refuse(path, f"it has {layers} layers and {visits} visits, but {lengths[name]} entries of {name}")


def _check_visits(
    path: str | os.PathLike[str], visits: Sequence[RecordedVisit], num_experts: Sequence[int], num_steps: int
) -> None:
    """Refuse visits of layers, experts or steps that there are not, and steps that go backwards."""
    for layer, count in enumerate(num_experts):
        if count < 1:
            _refuse(path, f"layer {layer} has {count} experts")
    step = 0
    for visit in visits:
        if not 0 <= visit.layer < len(num_experts):
            _refuse(path, f"a visit is of layer {visit.layer}, and there are {len(num_experts)} layers")
        if len(set(visit.wanted)) < len(visit.wanted):
            _refuse(path, f"a visit of layer {visit.layer} wants an expert twice: {visit.wanted}")
        if visit.wanted and not 0 <= min(visit.wanted) <= max(visit.wanted) < num_experts[visit.layer]:
            _refuse(
                path,
                f"a visit of layer {visit.layer} wants experts {min(visit.wanted)} to {max(visit.wanted)}, "
                f"and the layer has {num_experts[visit.layer]}",
            )
        if visit.step < step:
            _refuse(path, f"step {visit.step} comes after step {step}")
        if visit.step >= num_steps:
            _refuse(path, f"a visit is of step {visit.step}, and there are {num_steps} steps")
        step = visit.step


def _share(share: float | str) -> float:
    """A share as people write it, as a number."""
    match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*%", share.strip()) if isinstance(share, str) else None
    number = float(match[1]) / 100 if match else share
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= 1:
        raise TraceError(f"{share!r} is not a share of all experts; write '10%' or 0.1")
    return float(number)


def _refuse(path: str | os.PathLike[str], reason: str) -> NoReturn:
    raise TraceError(f"{path} is not a trace: {reason}")
