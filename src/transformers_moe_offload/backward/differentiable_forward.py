"""One sparse layer whose experts are adapted or whose gradient is wanted, expert by expert.

As `compute/forward.py`, but recorded by autograd: rows are gathered once, every expert's products are differentiable,
and weights are fetched again in the backward pass. If there will be one, experts are computed in ascending order, so
that gradients are summed in an order that does not depend on what is resident.
"""

# T tokens, K experts per token, H hidden, P pairs that need an expert, N rows of one expert

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.backward.weights import Lender, borrowed_product
from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.compute.deltas import Adaptation
from transformers_moe_offload.compute.forward import combine, opened
from transformers_moe_offload.compute.mlp import ExpertMlp, ExpertWeights
from transformers_moe_offload.compute.row_buckets import padded
from transformers_moe_offload.compute.token_grouping import Grouping, group_by_expert
from transformers_moe_offload.formats.base import AS_USED, LayerCodecs


def adapted_forward(
    cache: ExpertCache,
    layer: int,
    mlp: ExpertMlp,
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    adaptation: Adaptation,
    lender: Lender,
    codecs: LayerCodecs = AS_USED,
    cast_to: torch.dtype | None = None,
    started: Callable[[Sequence[int]], None] | None = None,
) -> Tensor:
    """The experts' contribution to each token: as `sparse_forward`, differentiable, and with what is added to experts.

    hidden_states (T, H), top_k_index (T, K) int64, top_k_weights (T, K) -> (T, H) in the dtype of hidden_states.
    """
    is_taped = torch.is_grad_enabled()
    grouping = group_by_expert(top_k_index, top_k_weights, cache.num_experts(layer), keep_zero_weights=is_taped)
    rows = rows_by_expert(hidden_states, grouping)

    def rows_through(expert: int, weights: ExpertWeights) -> Tensor:
        def project(inputs: Tensor, name: str) -> Tensor:
            out = borrowed_product(mlp, inputs, weights, name, partial(lender.borrow, expert))
            for addition in adaptation.low_rank.get(name, ()):
                out = out + addition.product(expert, inputs).to(out.dtype)
            return out

        return mlp.through(experts, rows[expert], project)[: len(grouping.tokens[expert])]

    outputs = {
        expert: mlp(experts, rows[expert], weights)[: len(grouping.tokens[expert])]
        for expert, weights in adaptation.own.items()
        if expert in rows
    }
    wanted = [expert for expert in grouping.by_last_use if expert not in adaptation.own]
    lender.used(wanted)
    with cache.turn, cache.visit(layer, wanted, started) as visit:
        for expert, weights in visit.in_order() if is_taped or experts.training else visit:
            outputs[expert] = rows_through(expert, opened(weights, codecs.of(expert), cast_to))
    return combine([outputs[expert] for expert in grouping.experts], grouping, hidden_states, top_k_weights)


def rows_by_expert(hidden_states: Tensor, grouping: Grouping) -> dict[int, Tensor]:
    """hidden_states (T, H) -> each needed expert's rows, (N, H), and the rows that padding adds.

    The rows of the last expert come first: gradients of one token are then added up in the order in which autograd
    comes to the experts of Transformers' loop over them (`eager` experts, 5.23), from the last to the first.
    """
    tokens = {expert: grouping.tokens[expert] for expert in reversed(grouping.experts)}
    if not tokens:
        return {}
    device = hidden_states.device
    wanted = [torch.as_tensor(padded(wanting, hidden_states), device=device) for wanting in tokens.values()]
    parts = hidden_states.index_select(0, torch.cat(wanted)).split([len(some) for some in wanted])
    return dict(zip(tokens, parts, strict=True))
