"""Write down what a cache is asked for while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers_moe_offload.policies.passes import Passes
from transformers_moe_offload.tracing.trace import RecordedVisit, Trace


class TraceRecorder:
    """Appends every visit to `trace`. Plugs into `ExpertCache.on_visit`; the caller decides when.

    A step is one forward: between `begin_forward` and `end_forward` layers may take any number of turns.
    Forwards that are not announced are recognised by the order of layers. `stall_ms`, if given, returns how long all
    layers have waited for loads so far; then the trace has each visit's share of it.
    """

    def __init__(
        self,
        layer_names: Sequence[str],
        experts_per_layer: Sequence[int],
        *,
        stall_ms: Callable[[], float] | None = None,
    ) -> None:
        self.trace = Trace(tuple(layer_names), tuple(experts_per_layer), stall_ms=None if stall_ms is None else [])
        self._total_stall_ms = stall_ms
        self._stalled_before_ms = 0.0
        self._passes = Passes(len(layer_names) - 1)
        self._is_announced = self._has_begun = False
        self._num_tokens = 0

    def begin_forward(self, num_tokens: int = 0) -> None:
        """The visits that come next are one step, of so many tokens; 0 where that is not known."""
        self._is_announced, self._has_begun, self._num_tokens = True, False, num_tokens

    def end_forward(self) -> None:
        """The forward is over."""
        self._is_announced, self._num_tokens = False, 0

    def record(self, layer: int, wanted: Sequence[int]) -> None:
        """A layer has opened a visit."""
        trace = self.trace
        self.finish_visit()
        is_new_by_order = self._passes.begin(layer)
        if not trace.step_tokens or (not self._has_begun if self._is_announced else is_new_by_order):
            trace.step_tokens.append(self._num_tokens)
        self._has_begun = True
        trace.visits.append(RecordedVisit(layer, tuple(wanted), len(trace.step_tokens) - 1))
        if self._total_stall_ms is not None and trace.stall_ms is not None:
            trace.stall_ms.append(0.0)
            self._stalled_before_ms = self._total_stall_ms()

    def finish_visit(self) -> None:
        """The visit recorded last is over: note how long it waited. The next visit does the same."""
        if self._total_stall_ms is not None and self.trace.stall_ms:
            # A reset of the statistics meanwhile sets the clock back.
            self.trace.stall_ms[-1] = max(0.0, self._total_stall_ms() - self._stalled_before_ms)
