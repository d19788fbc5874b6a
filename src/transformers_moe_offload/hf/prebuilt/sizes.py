"""How large a model is before and after it is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.expert import ExpertSpec
from transformers_moe_offload.hf.plan import Placement, make_plan
from transformers_moe_offload.hf.prebuilt.source import Quantization

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes, and how many weights they stand for."""

    num_experts: int
    """In all sparse layers."""
    expert_weights: int
    plain_expert_bytes: int
    expert_bytes: int
    plain_dense_bytes: int
    dense_bytes: int
    cache_bytes: int
    """The cache budget with which no expert is read twice."""
    smallest_budget: int
    """The smallest cache budget that works."""

    @property
    def bits_per_expert_weight(self) -> float:
        """Bits that a weight of an expert takes on average, scales and zeros included."""
        return 8 * self.expert_bytes / self.expert_weights

    @property
    def plain_bytes(self) -> int:
        """Bytes of all weights as they are."""
        return self.plain_expert_bytes + self.plain_dense_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, quantized."""
        return self.expert_bytes + self.dense_bytes

    @classmethod
    def of(cls, quantization: Quantization) -> Sizes:
        """The sizes of a model that is about to be quantized."""
        pairs = list(zip(quantization.layers, quantization.codings, strict=True))
        placements = [
            Placement(ExpertSpec(layer.index, layer.name, layer.num_experts, coding.fields), _CPU, coding)
            for layer, coding in pairs
        ]
        plan = make_plan(placements, OffloadConfig(cache_budget="100%", mmap=False, direct_io=False))
        saved = quantization.saved_names()
        checkpoint, tensors = quantization.checkpoint, quantization.checkpoint.parameters
        return cls(
            num_experts=sum(layer.num_experts for layer, _ in pairs),
            expert_weights=sum(layer.num_experts * prod(f.shape) for layer, coding in pairs for f in coding.fields),
            plain_expert_bytes=sum(layer.num_experts * f.nbytes for layer, coding in pairs for f in coding.fields),
            expert_bytes=sum(layer.num_experts * part.nbytes for layer, coding in pairs for part in coding.stored),
            plain_dense_bytes=sum(tensors[name].numel() * checkpoint.dtype_of(name).itemsize for name in saved),
            dense_bytes=sum(part.nbytes for name in saved for part in quantization.parts_of(name)),
            cache_bytes=plan.expert_bytes,
            smallest_budget=plan.smallest_budget,
        )
