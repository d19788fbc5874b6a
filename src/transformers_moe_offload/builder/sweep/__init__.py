"""Which gate is best: several of them scored on held-out text."""

from transformers_moe_offload.builder.sweep.scoring import Score, score
from transformers_moe_offload.builder.sweep.sweep import SweepReport, SweepRow, sweep_gates

__all__ = ["Score", "SweepReport", "SweepRow", "score", "sweep_gates"]
