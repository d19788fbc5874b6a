"""Traces: the experts that a model asked its cache for, recorded, and replayed with other policies and sizes."""

from transformers_moe_offload.tracing.recorder import TraceRecorder
from transformers_moe_offload.tracing.replay import Replay, replay
from transformers_moe_offload.tracing.trace import CountsTokens, RecordedVisit, Trace, hottest_experts
from transformers_moe_offload.tracing.trace_file import TraceError

__all__ = [
    "CountsTokens",
    "RecordedVisit",
    "Replay",
    "Trace",
    "TraceError",
    "TraceRecorder",
    "hottest_experts",
    "replay",
]
