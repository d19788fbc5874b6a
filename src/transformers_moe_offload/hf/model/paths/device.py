"""Decoding on the device: kernels read experts by address, and the host does not wait for the routing."""

# T tokens, H hidden

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transformers_moe_offload.device_decode.counters import MOST_PAIRS
from transformers_moe_offload.hf.decode.decoding import MOST_TOKENS, AddressedLayer, Decoding
from transformers_moe_offload.hf.model.layer_forward import Call
from transformers_moe_offload.kernels import gpu


@dataclass(frozen=True)
class DevicePath:
    """Computes a few tokens without gradients, adapters and autocast, while nothing is traced."""

    decoding: Decoding
    layer: AddressedLayer

    def serves(self, call: Call) -> bool:
        """Whether the call can be computed without the host; logs once why not."""
        reason = self._not_now(call)
        if reason is not None:
            self.decoding.say(reason)
        return reason is None

    def forward(self, call: Call) -> Tensor:
        """The experts' contribution to each token, (T, H)."""
        return self.decoding.compute(self.layer, call.module, *call.inputs)

    def _not_now(self, call: Call) -> str | None:
        hidden, top_k_index = call.inputs[0], call.inputs[1]
        if hidden.shape[0] > MOST_TOKENS or top_k_index.numel() > MOST_PAIRS:
            return f"forwards of more than {MOST_TOKENS} tokens are computed expert by expert"
        if hidden.dtype not in gpu.TYPES or top_k_index.dtype != torch.int64:
            return f"no kernels take rows of {hidden.dtype} with indices of {top_k_index.dtype}"
        if call.needs_grad or call.module.training:
            return "in training experts are computed one by one"
        if call.adaptation:
            return "experts to which adapters add are computed one by one"
        if self.decoding.is_traced:
            return "while a model is traced the host has to know its routing"
        if torch.is_autocast_enabled(hidden.device.type):
            return "under autocast experts are computed one by one"
        return None
