"""A model in one format with one strength: what it asks for on some texts, what its steps cost, what it says."""

# S tokens of a text, N = S - 1 steps, V tokens of the vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.hf.model.handle import runtime_of
from transformers_moe_offload.routing.meter.steps import Steps
from transformers_moe_offload.system.free_memory import available_bytes
from transformers_moe_offload.tuning.calibration import at_rest, timed
from transformers_moe_offload.tuning.costs import Costs, fitted
from transformers_moe_offload.tuning.reading import Recording, read, record, short_of_ram

FEWER = 0.5
"""Share of the slots with which layers are timed once more: then more of them have several experts to load."""


@dataclass(frozen=True)
class Variant:
    """What predictions of a model need."""

    recording: Recording
    costs: Costs
    steps: list[Steps]
    """Of each text."""
    predictions: list[Tensor]
    """Log-probabilities of each text, (N, V)."""


def studied(
    model: Any,
    texts: Sequence[Tensor],
    references: Sequence[Tensor] | None = None,
) -> Variant:
    """Read texts (S,) with a model: for what its layers ask for, and with a clock at every layer.

    `references` are the log-probabilities that its own are compared with. Layers are timed on every other text only:
    predictions for the texts between them are put to the test. A model whose routers follow its cache is read with the
    budget that it has; any other one with fewer slots as well, and with all experts resident, if there is room.
    """
    runtime, before = runtime_of(model), short_of_ram(model)
    steps, predictions = zip(*read(model, texts, before, references), strict=True)
    recording = record(model, texts)
    some = texts[::2]
    first = timed(model, some, before)
    layers = list(first.layers)
    if runtime.stats().follows_cache is None:
        budget, plan = runtime.config.cache_budget, runtime.plan
        budgets = [max(plan.smallest_budget, int(FEWER * plan.cache_bytes))]
        room = available_bytes(torch.device("cpu")) + plan.cache_bytes
        if plan.num_slots < plan.num_experts and plan.expert_bytes < room:
            budgets.append(plan.expert_bytes)
        for other in budgets:
            runtime.resize(other)
            layers += timed(model, some, before).layers
        runtime.resize(budget)
    if not any(one.wanted and not one.loads for one in layers):
        layers += at_rest(recording)
    return Variant(recording, fitted(first.step_s, layers), list(steps), list(predictions))
