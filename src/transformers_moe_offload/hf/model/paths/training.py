"""Our own arithmetic with gradients or adapters."""

# T tokens, H hidden

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from transformers_moe_offload.backward.differentiable_forward import adapted_forward
from transformers_moe_offload.backward.weights import Lender
from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.hf.model.layer_forward import Call, LayerExperts


@dataclass(frozen=True)
class TrainingPath:
    """Computes every call."""

    mlp: ExpertMlp
    experts: LayerExperts
    lend: Callable[[torch.dtype | None], Lender]
    """A lender of the experts to the backward pass, which casts them to a dtype."""

    def serves(self, call: Call) -> bool:
        """Every call."""
        return True

    def forward(self, call: Call) -> Tensor:
        """The experts' contribution to each token, (T, H)."""
        experts, hidden = self.experts, call.inputs[0]
        cast_to = experts.cast_for(hidden)
        out = adapted_forward(
            experts.cache,
            experts.index,
            self.mlp,
            call.module,
            *call.inputs,
            adaptation=call.adaptation,
            lender=self.lend(cast_to),
            codecs=experts.codecs,
            cast_to=cast_to,
            started=None if experts.look_ahead is None else experts.look_ahead(hidden),
        )
        if call.needs_grad:
            experts.cache.give_back()  # training is short of memory, and its steps are long compared with mapping again
        return out
