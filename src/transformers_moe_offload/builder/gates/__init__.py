"""How the routers of a mixture get their weights."""

from transformers_moe_offload.builder.gates.extend import add_expert_gate, drop_expert_gate
from transformers_moe_offload.builder.gates.fitted import GateReport, Gates, LayerReport
from transformers_moe_offload.builder.gates.program import program_gates, program_several
from transformers_moe_offload.builder.gates.statistics import STATISTICS_NAME, RidgeStatistics

__all__ = [
    "STATISTICS_NAME",
    "GateReport",
    "Gates",
    "LayerReport",
    "RidgeStatistics",
    "add_expert_gate",
    "drop_expert_gate",
    "program_gates",
    "program_several",
]
