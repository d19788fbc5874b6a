"""One sparse layer, computed expert by expert as experts become available.

Every (token, choice) pair gets a row of its own; the rows of a token are weighted and summed at the very end, in the
order of its choices. So the result does not depend on the order in which experts arrive.
"""

# T tokens, K experts per token, H hidden, P = T * K pairs

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.compute.grouped_resident import are_computed_together, together
from transformers_moe_offload.compute.mlp import ExpertMlp, ExpertWeights
from transformers_moe_offload.compute.row_buckets import padded
from transformers_moe_offload.compute.token_grouping import FEW_PAIRS, Grouping, group_by_expert
from transformers_moe_offload.formats.base import AS_USED, Codec, LayerCodecs
from transformers_moe_offload.store.layer_source import Weights


class HostWork(Protocol):
    """Experts that a host is computing meanwhile."""

    def finish(self) -> dict[int, Tensor]:
        """Wait for it: the rows of each expert, (N, H) on the accelerator."""


class HostHelp(Protocol):
    """A host that computes some of the experts that an accelerator lacks (`hybrid/cpu_experts.py`)."""

    def share(
        self, cache: ExpertCache, layer: int, grouping: Grouping, loads_under_way: int = 0
    ) -> dict[int, Sequence[int]]:
        """The experts that the host is to compute in a layer that is about to be visited, each with its tokens."""

    def start(
        self, mlp: ExpertMlp, experts: Any, hidden_states: Tensor, layer: int, share: dict[int, Sequence[int]]
    ) -> HostWork:
        """Begin to compute them: hidden_states (T, H) on the accelerator."""


def sparse_forward(
    cache: ExpertCache,
    layer: int,
    mlp: ExpertMlp,
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    codecs: LayerCodecs = AS_USED,
    cast_to: torch.dtype | None = None,
    started: Callable[[Sequence[int]], None] | None = None,
    host: HostHelp | None = None,
) -> Tensor:
    """The experts' contribution to each token.

    hidden_states (T, H), top_k_index (T, K) int64, top_k_weights (T, K) -> (T, H) in the dtype of hidden_states.
    `experts` is the module whose activation is used. `codecs` says what the slots hold, expert by expert;
    `cast_to` is the dtype to multiply in, where that is another one.
    `started` is called with the wanted experts once their loads are in flight. `host` may compute some of those that
    are absent, meanwhile.
    """
    grouping = group_by_expert(top_k_index, top_k_weights, cache.num_experts(layer))
    is_ordered = experts.training  # random numbers are drawn in the order of computation, which must be fixed
    outputs, share, computing = {}, {}, None
    if host is not None and not is_ordered and not torch.is_autocast_enabled(hidden_states.device.type):
        share = host.share(cache, layer, grouping, cache.num_loading)
        computing = host.start(mlp, experts, hidden_states, layer, share) if share else None
    with cache.turn, cache.visit(layer, grouping.by_last_use, started, share) as visit:
        if is_ordered:
            for expert, weights in visit.in_order():
                found = opened(weights, codecs.of(expert), cast_to)
                outputs[expert] = mlp(experts, rows_of(hidden_states, grouping.tokens[expert]), found)
        else:
            for batch in visit.batches():
                outputs |= outputs_of(mlp, experts, hidden_states, grouping, batch, codecs, cast_to)
        if computing is not None:
            outputs |= computing.finish()
    return combine([outputs[expert] for expert in grouping.experts], grouping, hidden_states, top_k_weights)


def outputs_of(
    mlp: ExpertMlp,
    experts: Any,
    hidden_states: Tensor,
    grouping: Grouping,
    held: Mapping[int, Weights],
    codecs: LayerCodecs,
    cast_to: torch.dtype | None = None,
) -> dict[int, Tensor]:
    """The rows of some experts that are held: together where kernels can, on a CPU if they are few, else one by one.

    The rows of each expert are the same in all three cases.
    """
    if hidden_states.is_cuda and are_computed_together(mlp, hidden_states, codecs):
        return together(mlp, experts, hidden_states, grouping, held, codecs)
    stored = [codecs.of(expert) for expert in held] if codecs.hot_experts else [codecs.usual] * len(held)
    if len(held) > 1:
        wanting = [grouping.tokens[expert] for expert in held]
        counts = [len(tokens) for tokens in wanting]
        if sum(counts) <= FEW_PAIRS and mlp.takes_several(hidden_states, counts, stored):
            weights = [opened(one, codec, cast_to) for one, codec in zip(held.values(), stored, strict=True)]
            return dict(zip(held, mlp.several(experts, _stacked(hidden_states, wanting), counts, weights), strict=True))
    outputs = {}
    for (expert, one), codec in zip(held.items(), stored, strict=True):
        tokens = grouping.tokens[expert]
        is_packed = codec is not None and codec.is_packed
        rows = rows_of(hidden_states, tokens if is_packed else padded(tokens, hidden_states))
        outputs[expert] = mlp(experts, rows, opened(one, codec, cast_to))[: len(tokens)]
    return outputs


def rows_of(hidden_states: Tensor, tokens: Tensor | list[int]) -> Tensor:
    """hidden_states (T, H) of some tokens, (N, H)."""
    return hidden_states if hidden_states.shape[0] == 1 == len(tokens) else hidden_states[tokens]


def _stacked(hidden_states: Tensor, wanting: list[Tensor | list[int]]) -> Tensor:
    """hidden_states (T, H) of several lists of tokens, one list after the other, (N, H)."""
    if hidden_states.shape[0] == 1:
        return hidden_states.expand(sum(map(len, wanting)), -1)
    return hidden_states[[int(token) for tokens in wanting for token in tokens]]


def opened(weights: Weights, codec: Codec | None, cast_to: torch.dtype | None = None) -> ExpertWeights:
    """The weights in a slot as matrices that can be multiplied with: those in low bits with rows of any dtype."""
    matrices = weights if codec is None else codec.matrices(weights)
    if cast_to is None:
        return matrices
    return {name: one.to(cast_to) if isinstance(one, Tensor) else one for name, one in matrices.items()}


def combine(outputs: list[Tensor], grouping: Grouping, hidden_states: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weigh the experts' rows, (N, H) for each of `grouping.experts`, and sum them over each token's choices: (T, H).

    Products are taken in the wider of the two dtypes and torch sums half precision in float32, so nothing is rounded
    more often than by Transformers' `batched_mm` experts (`integrations/moe.py`, 5.23).
    """
    if grouping.has_idle or not outputs:
        outputs = [*outputs, hidden_states.new_zeros(1, hidden_states.shape[-1])]
    if isinstance(grouping.row_of_pair, list) and len(outputs) == len(grouping.row_of_pair) and not grouping.has_idle:
        # Each output is one row: stacking them in the order of the pairs is all it takes.
        rows = torch.cat([outputs[row] for row in grouping.row_of_pair])
    else:
        rows = torch.cat(outputs)[grouping.row_of_pair]
    by_token = rows.view(*top_k_weights.shape, rows.shape[-1])
    return (by_token * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)
