"""Write down what routers decide while a model runs.

During a forward, tensors are only put aside; when it ends they are copied together, and once the buffer is full it
becomes a part of the trace, on disk or in memory. What that trace can tell is `trace.py`'s business.
"""

# B sequences, S their length, T = B * S tokens, K experts per token, E experts, H hidden

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transformers_moe_offload.config.budget import Budget
from transformers_moe_offload.config.options import choose
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing.passage import Passage, passage_of
from transformers_moe_offload.routing.seam import Decision
from transformers_moe_offload.routing.sites import Site, find_sites, select, unwrapped
from transformers_moe_offload.routing.switching import Layers, observe, stop_observing
from transformers_moe_offload.routing.trace import RoutingTrace
from transformers_moe_offload.routing.trace_file import Part, RouterFacts, TraceIndex, new_folder, write_part

Scores = Literal["float16", "float32"]


@contextmanager
def record_routing(
    model: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    layers: Layers = None,
    scores: Scores | None = "float16",
    hidden_states: bool = False,
    buffer_size: int | str = "64MiB",
) -> Iterator[RoutingRecorder]:
    """Record the routing of a model inside a `with` block.

        with routing.record_routing(model, "trace") as recorder:
            recorder.domain = "code"
            model.generate(**inputs)
        trace = recorder.trace

    Args:
        model: plain or offloaded, under a strategy or not.
        path: a new folder, to which the recording is streamed; None keeps it in memory, which then grows.
        layers: numbers or module paths of routers; None means all.
        scores: the precision in which all experts' scores are kept, or None to keep choices and weights only.
        hidden_states: whether to keep what the routers are given, for `fit_centroids`.
        buffer_size: bytes that are gathered before they are written.
    """
    recorder = RoutingRecorder(model, path, layers, scores, hidden_states, buffer_size)
    recorder.start()
    try:
        yield recorder
    finally:
        recorder.stop()


class _Call(NamedTuple):
    router: int
    scores: Tensor | None
    experts: Tensor
    weights: Tensor
    is_kept: Tensor | None
    hidden: Tensor | None
    token_ids: Tensor | None


class RoutingRecorder:
    """What `record_routing` gives: set `domain` as you go along, and take `trace` in the end."""

    def __init__(
        self,
        model: Any,
        path: str | os.PathLike[str] | None,
        layers: Layers,
        scores: Scores | None,
        hidden_states: bool,
        buffer_size: int | str,
    ) -> None:
        if scores is not None:
            choose("scores", scores, get_args(Scores))
        budget = Budget.parse(buffer_size, "buffer_size")
        if budget.nbytes is None or budget.nbytes < 1:
            raise ConfigError(f"buffer_size={buffer_size!r} is not a number of bytes, like '64MiB'")
        self.domain: str | None = None
        """What the tokens from now on belong to; `RoutingTrace` compares domains by it."""
        self._model = model
        self._base = unwrapped(model)
        self._sites = select(find_sites(model), layers)
        self._place = {site.index: place for place, site in enumerate(self._sites)}
        self._index = TraceIndex(type(self._base).__name__, [_facts(site) for site in self._sites])
        self._folder = None if path is None else new_folder(path)
        self._scores = None if scores is None else getattr(torch, scores)
        self._keeps_hidden = hidden_states
        self._buffer_bytes = budget.nbytes
        self._parts: list[Part] = []
        self._passage: Passage | None = None
        self._num_sequences = 0
        self._new_buffer()
        self._calls: list[_Call] = []
        self._is_first = True
        self._before = 0

    @property
    def trace(self) -> RoutingTrace:
        """What was recorded; complete once the `with` block has been left."""
        return RoutingTrace(self._index, self._folder if self._folder is not None else list(self._parts))

    def start(self) -> None:
        """Begin with the next forward."""
        observe(self._model, self._sites, self._observe)
        self._passage = passage_of(self._base)
        self._passage.listeners.append(self)

    def stop(self) -> None:
        """End, and write what is in the buffer."""
        if self._passage is not None:
            self._passage.listeners.remove(self)
            self._passage = None
        stop_observing(self._model, self._observe)
        self._flush()
        if self._folder is not None:
            self._index.write(self._folder)

    # What a passage and seams call.

    def begin(self, passage: Passage) -> None:
        """A forward starts: does it go on with texts that it has begun?"""
        cache = passage.inputs.get("past_key_values")
        self._before = int(cache.get_seq_length()) if cache is not None else 0
        self._calls = []

    def end(self, passage: Passage) -> None:
        """It is over: copy what was put aside."""
        if self._calls:
            self._settle(passage)
            self._index.num_steps += 1
            if self._nbytes >= self._buffer_bytes:
                self._flush()

    def _observe(self, router: int, decision: Decision) -> None:
        assert self._passage is not None
        place = self._place[router]
        if decision.has_affinities != self._index.routers[place].has_affinities:
            self._index.routers[place] = replace(self._index.routers[place], has_affinities=decision.has_affinities)
        if decision.scores.shape[1] != self._index.routers[place].num_experts:
            self._index.routers[place] = replace(self._index.routers[place], num_experts=decision.scores.shape[1])
        self._calls.append(
            _Call(
                place,
                decision.scores if self._scores is not None else None,
                decision.experts,
                decision.weights.clone(),  # a block may scale them in place
                decision.is_kept,
                decision.hidden if self._keeps_hidden else None,
                self._passage.token_ids,
            )
        )

    def _settle(self, passage: Passage) -> None:
        scores = _together([call.scores for call in self._calls], self._scores)
        experts = _together([call.experts for call in self._calls], torch.int16)
        weights = _together([call.weights for call in self._calls], torch.float32)
        hidden = _together([call.hidden for call in self._calls], torch.float32)
        texts: dict[int, int] = {}
        for number, call in enumerate(self._calls):
            num_rows = len(call.experts)
            first = self._first_token(call, num_rows, passage, texts)
            tokens = (
                np.arange(first, first + num_rows, dtype=np.int32) if first >= 0 else np.full(num_rows, -1, np.int32)
            )
            self._numbers.append((call.router, self._num_rows[call.router], num_rows, self._index.num_steps))
            self._num_rows[call.router] += num_rows
            rows = {"token": tokens, "experts": experts[number], "weights": weights[number]}
            if call.is_kept is not None:
                rows["experts"] = _kept(experts[number], call.is_kept)
            if scores[number] is not None:
                rows["scores"] = scores[number]
            if hidden[number] is not None:
                rows["hidden"] = hidden[number]
            for name, array in rows.items():
                assert array is not None
                self._rows.setdefault(f"{name}.{call.router}", []).append(array)
                self._nbytes += array.nbytes

    def _first_token(self, call: _Call, num_rows: int, passage: Passage, texts: dict[int, int]) -> int:
        """Where the call's tokens are among those of the part; -1 where its rows are no tokens of text."""
        ids = call.token_ids
        if ids is None or ids.numel() != num_rows:
            return -1
        if id(ids) not in texts:
            texts[id(ids)] = self._num_tokens
            self._add_tokens(ids, passage)
        return texts[id(ids)]

    def _add_tokens(self, ids: Tensor, passage: Passage) -> None:
        batch, length = ids.shape
        if self._before == 0:
            self._num_sequences += batch
        mask = passage.inputs.get("attention_mask")
        is_masked = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] >= length
        padding = (mask[:, -length:] == 0).cpu().numpy() if is_masked else np.zeros((batch, length))  # type: ignore[index]
        sequences = np.arange(self._num_sequences - batch, self._num_sequences).clip(min=0)
        self._tokens["token_ids"].append(ids.reshape(-1).cpu().numpy().astype(np.int32))
        self._tokens["sequence"].append(np.repeat(sequences, length).astype(np.int32))
        self._tokens["position"].append(np.tile(np.arange(self._before, self._before + length, dtype=np.int32), batch))
        self._tokens["is_padding"].append(padding.reshape(-1).astype(np.uint8))
        self._tokens["domain"].append(np.full(batch * length, self._domain_number(), np.int16))
        self._num_tokens += batch * length
        self._index.num_tokens += batch * length
        self._nbytes += 15 * batch * length

    def _domain_number(self) -> int:
        if self.domain is None:
            return -1
        if self.domain not in self._index.domains:
            self._index.domains.append(self.domain)
        return self._index.domains.index(self.domain)

    def _new_buffer(self) -> None:
        self._nbytes = 0
        self._num_tokens = 0
        self._numbers: list[tuple[int, int, int, int]] = []
        self._num_rows = [0] * len(self._sites)
        self._rows: dict[str, list[NDArray[Any]]] = {}
        names = ("token_ids", "sequence", "position", "is_padding", "domain")
        self._tokens: dict[str, list[NDArray[Any]]] = {name: [] for name in names}

    def _flush(self) -> None:
        if not self._numbers:
            return
        part = _joined(self._numbers, self._tokens, self._rows, len(self._sites))
        if self._folder is None:
            self._parts.append(part)
        else:
            self._index.parts.append(write_part(self._folder, len(self._index.parts), part))
            self._index.write(self._folder)
        self._new_buffer()


def _facts(site: Site) -> RouterFacts:
    return RouterFacts(
        site.index,
        site.path,
        site.num_experts,
        site.num_experts,
        site.top_k,
        has_affinities=False,
        layers=site.layers,
        experts_paths=site.experts_paths,
    )


def _together(tensors: list[Tensor | None], dtype: torch.dtype | None) -> list[NDArray[Any] | None]:
    """Tensors as arrays; in one piece where they are alike, which they nearly always are."""
    first = tensors[0]
    if dtype is None or first is None:
        return [None] * len(tensors)
    if all(one is not None and one.shape == first.shape and one.device == first.device for one in tensors):
        return list(torch.stack(tensors).to("cpu", dtype).numpy())  # type: ignore[arg-type]  # sync: device -> host
    return [None if one is None else one.to("cpu", dtype, copy=True).numpy() for one in tensors]


def _kept(experts: NDArray[Any] | None, is_kept: Tensor) -> NDArray[Any]:
    """(N, K) with -1 for entries that only fill up a row."""
    assert experts is not None
    return np.where(is_kept.cpu().numpy(), experts, np.int16(-1))


def _joined(
    numbers: list[tuple[int, int, int, int]],
    tokens: dict[str, list[NDArray[Any]]],
    rows: dict[str, list[NDArray[Any]]],
    num_routers: int,
) -> Part:
    empty = {
        "token": np.empty(0, np.int32),
        "experts": np.empty((0, 1), np.int16),
        "weights": np.empty((0, 1), np.float32),
    }
    part: Part = {f"{name}.{router}": array for router in range(num_routers) for name, array in empty.items()}
    part["calls"] = np.array(numbers, np.int64)
    kinds = {"is_padding": np.uint8, "domain": np.int16}
    part |= {name: np.concatenate([np.empty(0, kinds.get(name, np.int32)), *many]) for name, many in tokens.items()}
    for name, many in rows.items():
        width = max(array.shape[1] for array in many) if many[0].ndim == 2 else 0
        part[name] = np.concatenate([_widened(array, width) if width else array for array in many])
    return part


def _widened(array: NDArray[Any], width: int) -> NDArray[Any]:
    """(N, K) -> (N, width), filled up with what is no expert."""
    if array.shape[1] == width:
        return array
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=-1 if array.dtype.kind == "i" else 0)
