"""One sparse layer computed on the device, without the host ever seeing its routing.

Experts are found by an address table, so results have the same bits whether a record lies in a slot or in pinned host
memory. Launches depend on shapes only: a layer can be captured in a CUDA graph and replayed. `engine.py` fills the
table; `compute/forward.py` computes layers that cannot be computed like this.
"""

# T tokens, K experts per token, E experts, P = T * K pairs, H hidden

from __future__ import annotations

import torch
from torch import Tensor, nn

from transformers_moe_offload.compute.activation import recognised
from transformers_moe_offload.compute.grouped_mlp import ByAddress, placed
from transformers_moe_offload.compute.mlp import ExpertMlp
from transformers_moe_offload.dtypes import torch_dtype
from transformers_moe_offload.formats.base import Codec, LayerCodecs
from transformers_moe_offload.formats.codec import ExpertCodec
from transformers_moe_offload.kernels import gpu
from transformers_moe_offload.kernels.grouped import Pairs
from transformers_moe_offload.store.record import RecordLayout


def missing_on_device(mlp: ExpertMlp, layout: RecordLayout, codecs: LayerCodecs, device: torch.device) -> str | None:
    """Why a layer's experts cannot be computed by their addresses on this device; None if they can."""
    missing = gpu.missing(device)
    if missing is not None:
        return missing
    if len(codecs.kinds) > 1:
        return "some of its experts are stored in another format than the others"
    codec = codecs.usual
    if codec is not None and not (isinstance(codec, ExpertCodec) and codec.is_packed):
        return "its experts are stored in a format that has no kernels"
    expected = mlp.fields
    found = [field.name for field in (layout.fields if codec is None else codec.fields)]
    if sorted(found) != sorted(expected):
        return f"its experts have the fields {', '.join(found)} instead of {', '.join(expected)}"
    for field in layout.fields:
        is_part = codec is not None and "." in field.name
        if not is_part and torch_dtype(field.dtype) not in gpu.TYPES:
            return f"{field.name} is {field.dtype}, which the kernels do not take"
    return None


class OnDevice:
    """One layer's arithmetic by address."""

    def __init__(
        self,
        mlp: ExpertMlp,
        layout: RecordLayout,
        codec: Codec | None,
        num_experts: int,
        experts: nn.Module | None = None,
    ) -> None:
        """For layers for which `missing_on_device` is None. If kernels have the activation of the module `experts`,
        they compute it; if not, or without that module, the module of each call does."""
        assert codec is None or isinstance(codec, ExpertCodec)
        arrays = {field.name: field for field in layout.fields}
        first, second = (placed(mlp, arrays, layout.offsets, codec, name) for name in mlp.matrices)
        self._num_experts = num_experts
        self._experts = ByAddress(mlp, first, second, None if experts is None else recognised(mlp, experts))

    def __call__(
        self, experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, addresses: Tensor
    ) -> Tensor:
        """The experts' contribution to each token.

        hidden_states (T, H) float32, bfloat16 or float16, top_k_index (T, K) int64, top_k_weights (T, K),
        addresses (E,) int64 -> (T, H) in the dtype of hidden_states. A pair whose index is no expert's or whose weight
        is zero is idle: it adds nothing, and nothing is read for it.
        """
        from transformers_moe_offload.kernels.triton import grouped

        num_tokens, choices = top_k_index.shape
        assert addresses.shape == (self._num_experts,)
        rows, kind = hidden_states, hidden_states.device.type
        if torch.is_autocast_enabled(kind):
            rows = rows.to(torch.get_autocast_dtype(kind))
        pairs = Pairs(
            num_tokens * choices,
            addresses,
            choices,
            chosen=top_k_index.contiguous().view(-1),  # reshape alone keeps the strides of a column or an expansion
            weights=top_k_weights.contiguous().view(-1),
            rows_per_expert=min(num_tokens, -(-num_tokens * choices // self._num_experts)),
        )
        if num_tokens > 1:
            pairs = grouped.ordered(pairs)
        return grouped.combine(self._experts(experts, rows, pairs), pairs, hidden_states.dtype)
