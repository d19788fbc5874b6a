"""Dequantize tensors of another method with that method's own code, one at a time, without loading a model.

For code that reads such a checkpoint to write another one, or only inspects it. `quantizer.py` loads models from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from transformers_moe_offload.dtypes import dtype_name, torch_dtype
from transformers_moe_offload.formats.base import LayerCodecs
from transformers_moe_offload.hf.upstream import AutoHfQuantizer, HfQuantizer, get_model_conversion_mapping
from transformers_moe_offload.store.layer_source import LayerSource
from transformers_moe_offload.tensor_files.index import StoredTensor

_FOR_EXPERTS = "mxfp4"
"""The method that quantizes only experts."""


@dataclass(frozen=True)
class Opener:
    """A method's quantizer, set to dequantize all tensors."""

    quantizer: HfQuantizer
    name: str
    """The method's name in Transformers."""
    opens_dense: bool
    """Whether loading dequantizes the dense part on every device."""

    @property
    def is_for_dense(self) -> bool:
        """Whether the method quantizes more than experts."""
        return self.name != _FOR_EXPERTS

    @classmethod
    def take_from(cls, config: Any) -> Opener | None:
        """The opener of a checkpoint with this config, whose quantization config is removed; None if it has none."""
        holder = config if getattr(config, "quantization_config", None) else config.get_text_config(decoder=True)
        stored = getattr(holder, "quantization_config", None)
        if not stored:
            return None
        quantizer = AutoHfQuantizer.from_config(stored, pre_quantized=True)
        method = quantizer.quantization_config
        name = str(getattr(method.quant_method, "value", method.quant_method))
        opens_dense = bool(method.dequantize) or name == _FOR_EXPERTS
        method.dequantize = True
        del holder.quantization_config
        return cls(quantizer, name, opens_dense)

    @cached_property
    def keeps_dense(self) -> bool:
        """Whether loading on this machine keeps the dense part quantized: FP8, on a GPU that computes with it."""
        method = self.quantizer.quantization_config
        method.dequantize = self.opens_dense
        self.quantizer.validate_environment()  # may set `dequantize`, with a warning
        keeps, method.dequantize = not method.dequantize, True
        return keeps

    def conversions(self, model: Any) -> list[Any]:
        """The conversions, including dequantization, that turn the checkpoint's tensors into the model's."""
        conversions: list[Any] = self.quantizer.update_weight_conversions(get_model_conversion_mapping(model), model)
        return conversions

    def dtype_of(self, tensor: StoredTensor, converter: Any, dtype: str) -> str:
        """The dtype that a stored tensor is cast to before a conversion whose result has `dtype`."""
        like = torch.empty(0, dtype=torch_dtype(tensor.dtype), device="meta")
        cast = self.quantizer.get_new_dtype(converter, like, torch_dtype(dtype))
        return tensor.dtype if cast is None else dtype_name(cast)


@dataclass(frozen=True)
class StoredBytes:
    """Bytes of the weights of a checkpoint as another method has stored them."""

    codecs: tuple[LayerCodecs, ...]
    """How the experts of each sparse layer are stored."""
    expert_bytes: int
    dense_bytes: int

    @classmethod
    def of(cls, layers: Sequence[LayerSource], tensors: Mapping[str, StoredTensor]) -> StoredBytes:
        """From all tensors of a checkpoint, and the layers whose experts are among them."""
        expert_bytes = sum(piece.nbytes for layer in layers for expert in layer.experts for piece in expert.pieces)
        total = sum(tensor.nbytes for tensor in tensors.values())
        return cls(tuple(layer.codecs for layer in layers), expert_bytes, total - expert_bytes)
