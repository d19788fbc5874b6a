"""How large a model is before and after it is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.expert import ExpertSpec
from transformers_moe_offload.formats.base import LayerCodecs
from transformers_moe_offload.hf.loading.codecs import plain_fields
from transformers_moe_offload.hf.model.placements import Placement
from transformers_moe_offload.hf.model.planning import make_plan
from transformers_moe_offload.hf.other_quantizers.dequantize import StoredBytes
from transformers_moe_offload.hf.prebuilt.source import Quantization

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes and numbers of weights."""

    num_experts: int
    """In all sparse layers."""
    expert_weights: int
    plain_expert_bytes: int
    """Bytes of experts before they are quantized."""
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
        """Bytes of all weights before they are quantized."""
        return self.plain_expert_bytes + self.plain_dense_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, quantized."""
        return self.expert_bytes + self.dense_bytes

    @classmethod
    def of(cls, quantization: Quantization, stored: StoredBytes | None = None) -> Sizes:
        """The sizes of a model to quantize; `stored` if another method has already quantized it."""
        specs = [
            ExpertSpec(layer.index, layer.name, layer.num_experts, plain_fields(layer)) for layer in quantization.layers
        ]
        pairs = list(zip(specs, quantization.codecs, strict=True))
        placements = [Placement(spec, _CPU, codecs) for spec, codecs in pairs]
        plan = make_plan(placements, OffloadConfig(cache_budget="100%", mmap=False, direct_io=False))
        saved = quantization.saved_names()
        checkpoint, tensors = quantization.checkpoint, quantization.checkpoint.parameters
        plain_expert_bytes = sum(spec.num_experts * spec.expert_nbytes for spec in specs)
        plain_dense_bytes = sum(tensors[name].numel() * checkpoint.dtype_of(name).itemsize for name in saved)
        return cls(
            num_experts=sum(spec.num_experts for spec in specs),
            expert_weights=sum(spec.num_experts * prod(field.shape) for spec in specs for field in spec.fields),
            plain_expert_bytes=plain_expert_bytes if stored is None else stored.expert_bytes,
            expert_bytes=sum(_stored_bytes(spec, codecs) for spec, codecs in pairs),
            plain_dense_bytes=plain_dense_bytes if stored is None else stored.dense_bytes,
            dense_bytes=sum(part.nbytes for name in saved for part in quantization.parts_of(name)),
            cache_bytes=plan.expert_bytes,
            smallest_budget=plan.smallest_budget,
        )


def _stored_bytes(spec: ExpertSpec, codecs: LayerCodecs) -> int:
    """Bytes of all experts of a layer, without padding."""
    of_kind = {id(kind): sum(part.nbytes for part in kind.stored) for kind in codecs.kinds if kind is not None}
    return sum(of_kind[id(codecs.of(expert))] for expert in range(spec.num_experts))
