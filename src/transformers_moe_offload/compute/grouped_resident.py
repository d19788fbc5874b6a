"""Experts that are held in slots of a GPU, computed together by their slots' addresses.

For layers whose routing the host has seen (`forward.py`): one launch for a product of all of them instead of one each,
and no weight is copied. Whether a layer is computed like this, and how its work is cut, does not depend on what is
resident: so the rows of an expert have the same bits whichever experts it is computed with.
"""

# T tokens, K experts per token, N rows of one expert, P rows of all, H hidden

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from transformers_moe_offload.compute.grouped_mlp import ByAddress, placed
from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.compute.token_grouping import Grouping
from transformers_moe_offload.dtypes import dtype_name
from transformers_moe_offload.expert import FieldSpec
from transformers_moe_offload.formats.base import LayerCodecs
from transformers_moe_offload.formats.codec import ExpertCodec
from transformers_moe_offload.kernels import gpu
from transformers_moe_offload.kernels.grouped import Pairs
from transformers_moe_offload.store.layer_source import Weights

FEW_TOKENS = 16
"""Dense experts are computed together for up to so many tokens: with more rows, torch's own matmul is better."""


def are_computed_together(mlp: ExpertMlp, hidden_states: Tensor, codecs: LayerCodecs) -> bool:
    """Whether experts of a layer are computed by address on this device: packed ones, and dense ones for few tokens.

    hidden_states (T, H).
    """
    if not hidden_states.is_cuda or hidden_states.dtype not in gpu.TYPES or len(codecs.kinds) > 1:
        return False
    if torch.is_autocast_enabled("cuda") or gpu.missing(hidden_states.device) is not None:
        return False
    codec = codecs.usual
    if codec is None:
        return len(hidden_states) <= FEW_TOKENS
    return isinstance(codec, ExpertCodec) and codec.is_packed


def together(
    mlp: ExpertMlp,
    experts: Any,
    hidden_states: Tensor,
    grouping: Grouping,
    held: Mapping[int, Weights],
    codecs: LayerCodecs,
) -> dict[int, Tensor]:
    """The rows of some experts, (N, H) each, of hidden_states (T, H)."""
    tokens = [grouping.tokens[expert] for expert in held]
    counts = [len(wanting) for wanting in tokens]
    records = list(held.values())
    assert codecs.usual is None or isinstance(codecs.usual, ExpertCodec)
    first = min(records[0], key=lambda name: records[0][name].data_ptr())
    compute = _by_address(mlp, codecs.usual, _arrays(records[0], first))
    addresses = [weights[first].data_ptr() for weights in records]
    device, count = hidden_states.device, sum(counts)
    rows_per_expert = -(-sum(map(len, grouping.tokens.values())) // len(grouping.tokens))
    if len(hidden_states) == 1:
        chosen = [expert for expert, number in enumerate(counts) for _ in range(number)]
        addressed, chosen_rows = _on_device([addresses, chosen], device)
        pairs = Pairs(count, addressed, choices=count, chosen=chosen_rows)
        rows = hidden_states
    else:
        offsets = list(accumulate(counts, initial=0))
        if all(isinstance(wanting, list) for wanting in tokens):
            addressed, begins, wanted = _on_device([addresses, offsets, list(chain(*tokens))], device)
        else:
            addressed, begins = _on_device([addresses, offsets], device)
            wanted = torch.cat([torch.as_tensor(wanting, device=device) for wanting in tokens])
        pairs = Pairs(count, addressed, choices=1, offsets=begins, rows_per_expert=rows_per_expert)
        rows = hidden_states.index_select(0, wanted)
    return dict(zip(held, compute(experts, rows, pairs).split(counts), strict=True))


def _arrays(weights: Weights, first: str) -> tuple[tuple[FieldSpec, int], ...]:
    """Each array of an expert, and how many bytes behind the first one it begins."""
    start = weights[first].data_ptr()
    return tuple(
        (FieldSpec(name, tuple(array.shape), dtype_name(array.dtype)), array.data_ptr() - start)
        for name, array in weights.items()
    )


@lru_cache(maxsize=64)
def _by_address(mlp: ExpertMlp, codec: ExpertCodec | None, arrays: tuple[tuple[FieldSpec, int], ...]) -> ByAddress:
    specs = {array.name: array for array, _ in arrays}
    places = {array.name: place for array, place in arrays}
    first, second = (placed(mlp, specs, places, codec, name) for name in mlp.matrices)
    return ByAddress(mlp, first, second)


def _on_device(lists: list[list[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Some numbers, int64, one tensor for each list."""
    numbers = torch.tensor([number for one in lists for number in one], dtype=torch.int64)
    if device.type == "cuda":
        numbers = numbers.pin_memory().to(device, non_blocking=True)  # copy: host -> device, async
    return tuple(torch.split(numbers, [len(one) for one in lists]))
