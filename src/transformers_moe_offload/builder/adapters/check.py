"""Does a mixture of adapters compute with one adapter alone what the dense model with that adapter merged does?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from transformers_moe_offload.builder.adapters.plan import AdapterPlan
from transformers_moe_offload.builder.checks import CheckFailedError
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.models.adapter_moe import AdapterMoeForCausalLM

CHECKED_UP_TO = 256 * 2**20
"""Bytes of a dense model up to which the mixture's logits are compared with it: both are in memory then."""
TOLERANCE = 1e-4
"""Of the largest logit: in float32, rounding gives 1e-6."""
NUM_CHECKED = 8
"""Number of adapters whose logits are compared, spread evenly over all."""


@torch.no_grad()
def check_alone(plan: AdapterPlan, place: Path) -> float | None:
    """Load what was written, and compare some adapters alone with the dense models they make.

    Raises `CheckFailedError`; returns the largest difference, or None where the dense model is too large.
    """
    if sum(spec.nbytes for spec in plan.dense.values()) > CHECKED_UP_TO:
        return None
    model, found = AutoModelForCausalLM.from_pretrained(
        place, output_loading_info=True, local_files_only=True, dtype=torch.float32
    )
    trouble = {name: value for name, value in found.items() if value}
    if trouble:
        raise CheckFailedError(f"reload: Transformers loads the mixture with {trouble}")
    assert isinstance(model, AdapterMoeForCausalLM)
    tokens = torch.arange(min(12, plan.base.config.vocab_size))[None]
    worst = 0.0
    for number in _spread(len(plan.adapters)):
        with model.taking_only(number):
            logits = model(input_ids=tokens, use_cache=False).logits
        expected = _merged_logits(plan, number, tokens)
        difference, allowed = (logits - expected).abs().max().item(), TOLERANCE * expected.abs().max().item()
        if not difference <= allowed:  # also raises for NaN
            raise CheckFailedError(
                f"forced expert: {plan.adapters[number].name} alone does not reproduce "
                f"{plan.base.name} with it merged: logits differ by {difference:.2g}, and rounding explains at most "
                f"{allowed:.2g}"
            )
        worst = max(worst, difference)
    return worst


def _spread(count: int) -> Sequence[int]:
    """Up to `NUM_CHECKED` numbers below a count, spread evenly, the first and the last among them."""
    return sorted({round(step * (count - 1) / max(1, NUM_CHECKED - 1)) for step in range(NUM_CHECKED)})


def _merged_logits(plan: AdapterPlan, number: int, tokens: Tensor) -> Tensor:
    """Logits of the dense model with one adapter merged into it."""
    dense = AutoModelForCausalLM.from_config(plan.base.config, dtype=torch.float32).eval()
    dense.load_state_dict({name: one for name, one in _merged(plan, number)}, strict=False)
    dense.tie_weights()
    logits: Tensor = dense(input_ids=tokens, use_cache=False).logits
    return logits


def _merged(plan: AdapterPlan, number: int) -> Iterator[tuple[str, Tensor]]:
    dense = plan.adapters[number].dense
    stored = {name: torch_dtype(spec.dtype) for name, spec in plan.dense.items()}
    for name in plan.base.tensors:
        # The mixture rounds the base's weights, not the sum with the adapter's; the merged model must round the same.
        delta = dense.read(name).float() - plan.base.read(name).float()
        yield name, plan.base.read(name).to(stored[name]).float() + delta
