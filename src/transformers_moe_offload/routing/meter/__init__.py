"""The meter: what a strength of cache-aware routing costs, and what it gains, step by step on a text."""

from transformers_moe_offload.routing.meter.figures import Figures, Interval
from transformers_moe_offload.routing.meter.measurement import Tradeoff, tradeoff

__all__ = ["Figures", "Interval", "Tradeoff", "tradeoff"]
