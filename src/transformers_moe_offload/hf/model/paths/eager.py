"""Transformers' eager forward, over weights that are fetched when it indexes them."""

# T tokens, H hidden

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from transformers_moe_offload.backward.saved_tensors import Lending
from transformers_moe_offload.backward.weights import Lender
from transformers_moe_offload.expert import ExpertSpec
from transformers_moe_offload.hf.model.layer_forward import Call, LayerExperts
from transformers_moe_offload.hf.model.lazy_experts import copy_of, fetch_from
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer


@dataclass(frozen=True)
class EagerPath:
    """Computes every call, of every kind of experts."""

    layer: SparseLayer
    spec: ExpertSpec
    experts: LayerExperts
    lend: Callable[[torch.dtype | None], Lender]
    """A lender of the experts to the backward pass, which casts them to a dtype."""

    def serves(self, call: Call) -> bool:
        """Every call."""
        return True

    def forward(self, call: Call) -> Tensor:
        """The experts' contribution to each token, (T, H)."""
        layer, experts, hidden = self.layer, self.experts, call.inputs[0]
        cast_to = experts.cast_for(hidden)
        lender = self.lend(cast_to)
        wanted = layer.layout.wanted(layer.num_experts, *call.inputs, keep_zero_weights=call.needs_grad)
        wanted = [expert for expert in wanted if expert not in call.adaptation.own]
        lender.used(wanted)
        cache = experts.cache
        with (
            cache.turn,
            cache.visit(
                experts.index, wanted, None if experts.look_ahead is None else experts.look_ahead(hidden)
            ) as visit,
        ):
            fetch = fetch_from(visit, self.spec, hidden.device, codecs=experts.codecs, cast_to=cast_to)
            lending = Lending(fetch, lender.copy, call.adaptation)
            copied = copy_of(call.module, layer.plain_class, layer.fields, lending)
            try:
                with lending.recorded() if call.needs_grad else nullcontext():
                    out = layer.eager_forward(copied, *call.inputs)
            finally:
                lending.end()
        if call.needs_grad:
            cache.give_back()  # training is short of memory, and its steps are long compared with mapping again
        return out
