"""A model in one format with one strength: what it asks for on some texts, what it loses, and what its steps cost."""

# S tokens of a text

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.hf.model.handle import runtime_of
from transformers_moe_offload.system.free_memory import available_bytes
from transformers_moe_offload.tuning.calibration import at_rest, timed, watched
from transformers_moe_offload.tuning.costs import Costs, Timing, fitted
from transformers_moe_offload.tuning.reading import Recording, record, short_of_ram


@dataclass(frozen=True)
class Variant:
    """What predictions of a model need."""

    recording: Recording
    costs: Costs


def studied(model: Any, texts: Sequence[Tensor]) -> Variant:
    """Read texts (S,) with a model: for what its layers ask for, and with and without a clock at every layer.

    Layers are timed on every other text only: predictions for the texts between them are put to the test. Where no step
    finds all of a layer's experts resident, layers are timed with all of them resident as well, if there is room for
    that, else again with the inputs that they had just before.
    """
    before = short_of_ram(model)
    recording = record(model, texts, before)
    found = timed(model, texts[::2], before)
    layers = list(found.layers)
    if not any(_is_at_rest(one) for one in layers) and _has_room_for_all(model):
        runtime = runtime_of(model)
        budget = runtime.config.cache_budget
        runtime.resize("100%")
        layers += [one for one in timed(model, texts[:1], before).layers if _is_at_rest(one)]
        runtime.resize(budget)
    if not any(_is_at_rest(one) for one in layers):
        layers += at_rest(recording)
    return Variant(recording, fitted(found.step_s, layers, watched(recording, before)))


def _is_at_rest(timing: Timing) -> bool:
    return timing.wanted > 0 and timing.loads == 0


def _has_room_for_all(model: Any) -> bool:
    plan = runtime_of(model).plan
    return plan.expert_bytes <= available_bytes(torch.device("cpu")) + plan.cache_bytes
