"""Open what another method has quantized, tensor by tensor, with that method's own code; no model is loaded.

Loading such a checkpoint is `quantizer.py`'s. This is for whoever reads it to write another one, or only looks at it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from transformers_moe_offload.dtypes import dtype_name, torch_dtype
from transformers_moe_offload.formats.by_expert import LayerCodings
from transformers_moe_offload.hf.upstream import AutoHfQuantizer, HfQuantizer, get_model_conversion_mapping
from transformers_moe_offload.store.layer_source import LayerSource
from transformers_moe_offload.tensor_files.index import StoredTensor

_FOR_EXPERTS = "mxfp4"
"""The method that leaves everything but experts as it is."""


@dataclass(frozen=True)
class Opener:
    """A method's quantizer, set to open whatever it finds."""

    quantizer: HfQuantizer
    name: str
    """The method's name, as Transformers has it."""
    opens_dense: bool
    """Whether loading opens the dense part, wherever that happens."""

    @property
    def is_for_dense(self) -> bool:
        """Whether the method quantizes more than experts."""
        return self.name != _FOR_EXPERTS

    @classmethod
    def take_from(cls, config: Any) -> Opener | None:
        """What opens a checkpoint with this config, which is a plain model's afterwards; None if it was before."""
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
        """Whether loading here would leave the dense part as it is stored: FP8, on a GPU that computes with it."""
        method = self.quantizer.quantization_config
        method.dequantize = self.opens_dense
        self.quantizer.validate_environment()  # may change its mind, and say so
        keeps, method.dequantize = not method.dequantize, True
        return keeps

    def conversions(self, model: Any) -> list[Any]:
        """What Transformers does to the checkpoint's tensors, opening included, so that they are the model's."""
        conversions: list[Any] = self.quantizer.update_weight_conversions(get_model_conversion_mapping(model), model)
        return conversions

    def dtype_of(self, tensor: StoredTensor, converter: Any, dtype: str) -> str:
        """The dtype in which a conversion that makes something of `dtype` gets a stored tensor."""
        like = torch.empty(0, dtype=torch_dtype(tensor.dtype), device="meta")
        cast = self.quantizer.get_new_dtype(converter, like, torch_dtype(dtype))
        return tensor.dtype if cast is None else dtype_name(cast)


@dataclass(frozen=True)
class StoredBytes:
    """What the weights of a checkpoint take as another method has stored them."""

    codings: tuple[LayerCodings, ...]
    """By sparse layer, how its experts are stored."""
    expert_bytes: int
    dense_bytes: int

    @classmethod
    def of(cls, layers: Sequence[LayerSource], tensors: Mapping[str, StoredTensor]) -> StoredBytes:
        """Of all the tensors that there are, and the layers whose experts are among them."""
        expert_bytes = sum(piece.nbytes for layer in layers for expert in layer.experts for piece in expert.pieces)
        total = sum(tensor.nbytes for tensor in tensors.values())
        return cls(tuple(layer.codings for layer in layers), expert_bytes, total - expert_bytes)
