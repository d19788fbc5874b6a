"""Record what routers decide while a model runs.

This file only collects tensors; `buffer.py` copies them, and a full buffer becomes a part of the trace, on disk or in
memory. `trace.py` evaluates the trace.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch

from transformers_moe_offload.config.budget import Budget
from transformers_moe_offload.config.options import choose
from transformers_moe_offload.errors import ConfigError, MoeOffloadError
from transformers_moe_offload.routing.buffer import CallRecord, RoutingBuffer, StepRecord
from transformers_moe_offload.routing.forward_context import ForwardContext, forward_context_of
from transformers_moe_offload.routing.router_hook import Decision
from transformers_moe_offload.routing.sites import facts_of, find_sites, select, unwrapped
from transformers_moe_offload.routing.switching import Layers, observe, stop_observing
from transformers_moe_offload.routing.trace import RoutingTrace
from transformers_moe_offload.routing.trace_file import (
    MAX_CHOICES,
    Part,
    TraceIndex,
    is_text,
    new_folder,
    write_part,
)
from transformers_moe_offload.routing.trace_parts import num_steps_of
from transformers_moe_offload.tracing.trace_file import TraceError

Scores = Literal["float16", "float32"]


@contextmanager
def record_routing(
    model: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
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

    A process that is forked meanwhile records nothing.

    Args:
        model: plain or offloaded, under a strategy or not.
        path: a new folder, to which the recording is streamed; None keeps it in memory, which then grows.
        overwrite: whether a recording that is in the folder already is replaced; otherwise that is an error.
        layers: numbers or module paths of routers; None means all.
        scores: the precision in which all experts' scores are kept, or None to keep choices and weights only.
        hidden_states: whether to keep the routers' inputs, for `fit_centroids`.
        buffer_size: bytes that are gathered before they are written.
    """
    recorder = RoutingRecorder(model, path, overwrite, layers, scores, hidden_states, buffer_size)
    recorder.start()
    try:
        yield recorder
    finally:
        recorder.stop()


class _Gathered(threading.local):
    """The decisions so far in the forward that runs in a thread; None while nothing is recorded."""

    calls: list[CallRecord] | None = None


class RoutingRecorder:
    """The recorder that `record_routing` yields: set `domain` while it records, and read `trace` afterwards."""

    def __init__(
        self,
        model: Any,
        path: str | os.PathLike[str] | None,
        overwrite: bool,
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
        self._domain: str | None = None
        self._model = model
        self._base = unwrapped(model)
        self._sites = select(find_sites(model), layers)
        self._place = {site.index: place for place, site in enumerate(self._sites)}
        self._index = TraceIndex(type(self._base).__name__, [facts_of(site) for site in self._sites])
        self._folder = None if path is None else new_folder(path, overwrite=overwrite)
        self._scores = None if scores is None else getattr(torch, scores)
        self._keeps_hidden = hidden_states
        self._buffer_bytes = budget.nbytes
        self._buffer = RoutingBuffer(len(self._sites), self._scores)
        self._parts: list[Part] = []
        self._unwritten: Part | None = None
        self._context: ForwardContext | None = None
        self._gathered = _Gathered()
        self._writing = threading.Lock()
        self._process = os.getpid()

    @property
    def domain(self) -> str | None:
        """The domain of the tokens from now on, for `RoutingTrace` to compare domains."""
        return self._domain

    @domain.setter
    def domain(self, domain: str | None) -> None:
        if domain is not None and not is_text(domain):
            raise ConfigError(f"domain={domain!r} is not text that can be written; pass a str, or None for no domain")
        self._domain = domain

    @property
    def trace(self) -> RoutingTrace:
        """The recording; raises `TraceError` before the `with` block has been left."""
        if self._context is not None:
            raise TraceError("the recording is still running; read `trace` after the `with` block has been left")
        return RoutingTrace(self._index, self._folder if self._folder is not None else list(self._parts))

    def start(self) -> None:
        """Begin with the next forward."""
        observe(self._model, self._sites, self._observe)
        self._context = forward_context_of(self._base)
        self._context.listen(self)

    def stop(self) -> None:
        """End, and write what is in the buffer."""
        if self._context is not None:
            self._context.stop_listening(self)
            self._context = None
        stop_observing(self._model, self._observe)
        if self._is_forked:
            return
        with self._writing:
            self._flush()
            if self._folder is not None:
                self._index.write(self._folder)

    # Called by the forward context and the hooks around routers.

    def begin(self, context: ForwardContext) -> None:
        """A forward starts."""
        # None: the forward began before the recording did
        self._gathered.calls = None if context.forward.num_before is None or self._is_forked else []

    def end(self, context: ForwardContext) -> None:
        """A forward has succeeded: its decisions go into the buffer."""
        calls, self._gathered.calls = self._gathered.calls, None
        if not calls:
            return
        with self._writing:
            self._buffer.add(StepRecord(calls, context.forward, self._domain_number()))
            if self._buffer.nbytes >= self._buffer_bytes:
                self._flush()

    @property
    def _is_forked(self) -> bool:
        """Whether this is a forked child of the recording process: the parent writes the folder and may hold a lock."""
        return os.getpid() != self._process

    def _observe(self, router: int, decision: Decision) -> None:
        context, calls = self._context, self._gathered.calls
        if context is None or calls is None:  # another thread was in a forward when the recording began or ended
            return
        place = self._place[router]
        with self._writing:
            self._note_form(place, decision)
        scores = decision.scores if self._scores is not None else None
        weights = decision.weights.clone()  # a block may scale them in place
        hidden = decision.hidden.clone() if self._keeps_hidden else None
        tokens = context.forward.token_ids, context.forward.is_padding, context.forward.is_encoding
        calls.append(CallRecord(place, scores, decision.experts, weights, decision.is_kept, hidden, *tokens))

    def _note_form(self, place: int, decision: Decision) -> None:
        facts = self._index.routers[place]
        if decision.has_affinities != facts.has_affinities or decision.scores.shape[1] != facts.num_experts:
            self._index.routers[place] = replace(
                facts, has_affinities=decision.has_affinities, num_experts=decision.scores.shape[1]
            )

    def _domain_number(self) -> int:
        if self.domain is None:
            return -1
        if self.domain not in self._index.domains:
            if len(self._index.domains) == MAX_CHOICES:
                raise MoeOffloadError(
                    f"domain={self.domain!r} is one too many: a recording has at most {MAX_CHOICES:,} domains"
                )
            self._index.domains.append(self.domain)
        return self._index.domains.index(self.domain)

    def _flush(self) -> None:
        while part := self._unwritten or self._buffer.take():
            self._unwritten = part  # kept for the next flush if this one fails
            if self._folder is None:
                self._parts.append(part)
            else:
                self._index.parts.append(write_part(self._folder, len(self._index.parts), part))
            self._unwritten = None
            self._index.num_steps += num_steps_of(part)
            self._index.num_tokens += len(part["token_ids"])
            if self._folder is not None:
                self._index.write(self._folder)
