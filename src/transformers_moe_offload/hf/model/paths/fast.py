"""Our own arithmetic, expert by expert as experts become available: inference without adapters."""

# T tokens, H hidden

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from transformers_moe_offload.compute.deltas import NOTHING
from transformers_moe_offload.compute.forward import HostHelp, sparse_forward
from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.hf.model.layer_forward import Call, LayerExperts


@dataclass(frozen=True)
class FastPath:
    """Computes what neither adapts experts nor needs gradients."""

    mlp: ExpertMlp
    experts: LayerExperts
    host: HostHelp | None
    """The host's part in a GPU's misses; None if all of them are fetched."""

    def serves(self, call: Call) -> bool:
        """Without gradients and adapters."""
        return call.adaptation is NOTHING and not call.needs_grad

    def forward(self, call: Call) -> Tensor:
        """The experts' contribution to each token, (T, H)."""
        experts, hidden = self.experts, call.inputs[0]
        cast_to = None if hidden.dtype == experts.dtype else experts.cast_for(hidden)  # one call less in most steps
        return sparse_forward(
            experts.cache,
            experts.index,
            self.mlp,
            call.module,
            *call.inputs,
            codecs=experts.codecs,
            cast_to=cast_to,
            started=None if experts.look_ahead is None else experts.look_ahead(hidden),
            host=self.host if cast_to is None else None,
        )
